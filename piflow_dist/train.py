"""A training process: build -> resume -> loop -> save. `python -m piflow_dist.train CONFIG.yaml`, one per rank.

Started by tools/launch.py, which checks the configuration first. The same code trains teachers (flow matching) and
students (imitation), on one process or many.
"""

import hashlib
import logging
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.description import load_description
from data_pipeline.prompts import load_prompt_encoder
from data_pipeline.stream import LatentStream
from piflow_dist.checkpoint.reader import load_checkpoint
from piflow_dist.checkpoint.sharded import find_checkpoint, save_checkpoint
from piflow_dist.config import Config, config_values, read_config
from piflow_dist.distill.ema import Ema
from piflow_dist.distill.objectives import (
    Batch,
    build_schedule,
    flow_matching_step,
    imitation_data_step,
    imitation_datafree_step,
    teacher_ratio,
)
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.launch.console import StepProgress, start_logging
from piflow_dist.models.pretrained import open_teacher, plan_training
from piflow_dist.models.qwen_image import build_teacher, plan_model
from piflow_dist.parallel.topology import Topology, start_process_group
from piflow_dist.parallel.zero import FrozenModel, StepResult, TiedTeacher, TrainedModel
from piflow_dist.tracking.tracker import Tracker

log = logging.getLogger("piflow_dist.train")  # __name__ is "__main__" in a training process


@dataclass
class TrainState:
    step: int = 0
    """Optimiser steps done, skipped ones included."""
    skipped_in_a_row: int = 0
    skipped_total: int = 0


@dataclass
class Run:
    """What a process holds between steps."""

    config: Config
    topology: Topology
    schedule: FlowSchedule
    model: TrainedModel
    teacher: FrozenModel | TiedTeacher | None
    ema: Ema
    stream: LatentStream
    empty_LD: Tensor
    state: TrainState
    teacher_fingerprint: str | None
    """Saved with the run, which preflight refuses to continue with another teacher."""


def build_run(config: Config, topology: Topology) -> Run:
    description = load_description(config.data.root)
    encoder = load_prompt_encoder(description.prompt_encoder)
    parallel, dtype = config.parallel, config.train.dtype
    if config.distils:
        module, start = plan_training(config)
    else:
        module, start = build_teacher(config.model, config.train.seed), None
    model = TrainedModel(module, start, topology, config.optim, parallel, dtype)
    teacher = None
    if config.mode == "tied":
        teacher = TiedTeacher(model)
    elif config.distils:
        teacher = FrozenModel(plan_model(config.model), open_teacher(config), topology, parallel, dtype)
    _, micro = config.train.accumulation(topology.dp_size)
    stream = LatentStream(
        config.data.root,
        config.data.split,
        batch_size=micro,
        seed=config.train.seed,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        global_batch=config.train.batch_size,
        num_workers=config.data.num_workers,
        cache_dir=config.data.cache_dir,
        cache_bytes=config.data.cache_bytes,
        device=topology.device,
        augment=config.data.augment,
    )
    return Run(
        config=config,
        topology=topology,
        schedule=build_schedule(config.schedule, description.typical_shape),
        model=model,
        teacher=teacher,
        ema=Ema(model.masters, config.ema.gamma, config.ema.start_step),
        stream=stream,
        empty_LD=encoder.encode([""])[0].to(topology.device),
        state=TrainState(),
        teacher_fingerprint=open_teacher(config).fingerprint() if config.distils else None,
    )


def seed_from(*parts: int) -> int:
    """A 63-bit seed that differs wherever any part does."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def train_step(run: Run) -> tuple[Tensor, StepResult]:
    """One optimiser step: backwards of all micro-batches, then the update. Returns (mean loss over ranks, result)."""
    config, state = run.config, run.state
    micro_batches, _ = config.train.accumulation(run.topology.dp_size)
    losses = []
    for micro in range(micro_batches):
        # By step and place in the global batch: any step can be replayed alone, and two micro-batches of one process
        # get the noise that one micro-batch of two processes gets.
        seed = seed_from(config.train.seed, state.step, micro * run.topology.dp_size + run.topology.dp_rank)
        generator = torch.Generator(run.topology.device).manual_seed(seed)
        torch.manual_seed(seed)
        batch = next_batch(run)
        losses.append(micro_step(run, batch, 1 / micro_batches, generator))
    clip = config.optim.clip if state.step >= config.optim.clip_from_step else 0.0
    result = run.model.step(lr_scale(state.step, config), clip)
    loss = torch.stack(losses).mean()
    dist.all_reduce(loss, group=run.topology.dp_group)
    return loss / run.topology.dp_size, result


def micro_step(run: Run, batch: Batch, scale: float, generator: torch.Generator) -> Tensor:
    match run.config.objective:
        case "flow_matching":
            return flow_matching_step(run.model, batch, run.config, run.schedule, scale, generator)
        case "imitation":
            return imitation_data_step(
                run.model, run.teacher, batch, run.config, run.schedule, run.state.step, scale, generator
            )
        case "imitation_datafree":
            return imitation_datafree_step(
                run.model, run.teacher, batch, run.config, run.schedule, run.state.step, scale, generator
            )
        case unknown:
            raise ValueError(f"objective={unknown} has no training step.")


def next_batch(run: Run) -> Batch:
    raw, device = run.stream.next(), run.topology.device
    tensors = (raw[name].to(device, non_blocking=True) for name in ("latents", "prompt_embeds", "prompt_mask"))
    return Batch(*tensors, run.empty_LD)


def lr_scale(step: int, config: Config) -> float:
    """Factor of the learning rates at step (from 0): linear warm-up, then constant or a decay to zero."""
    optim = config.optim
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    remaining = 1 - max(0, step - optim.warmup_steps) / max(1, config.train.steps - optim.warmup_steps)
    match optim.decay:
        case "linear":
            return warmup * remaining
        case "cosine":
            return warmup * 0.5 * (1 - torch.cos(torch.tensor(torch.pi * remaining)).item())
        case _:
            return warmup


def guard_not_finite(run: Run, loss: float, result: StepResult) -> None:
    """Count skipped updates; stop before a checkpoint could hide that nothing is learnt any more."""
    state, limit = run.state, run.config.train.max_skipped
    if result.applied:
        state.skipped_in_a_row = 0
        return
    state.skipped_in_a_row += 1
    state.skipped_total += 1
    log.warning("step %d: the gradient is not finite (loss %s); the weights were left as they were", state.step, loss)
    if state.skipped_in_a_row >= limit:
        raise FloatingPointError(
            f"The gradient was not finite in {limit} steps in a row (up to step {state.step}, loss {loss}). "
            "The newest checkpoint is from before. Try a lower optim.lr, or raise train.max_skipped."
        )


def resume(run: Run) -> None:
    """Continue from the newest complete checkpoint of the run folder, if there is one.

    The launcher has set checkpoints aside that are not to be continued: a process that is started again must not start afresh.
    """
    folder = Path(run.config.run_dir) / "checkpoints"
    path, problems = find_checkpoint(folder, run.topology)
    for problem in problems:
        log.warning("%s", problem)
    if path is None:
        return
    place = run.topology
    split_dims = {shard.name: shard.split_dim for shard in run.model.shards}
    loaded = load_checkpoint(path, place.dp_rank, place.dp_size, place.tp_rank, place.tp, split_dims)
    run.model.load(loaded.weights, loaded.optimizer)
    for name, average in run.model.named(run.ema.averages).items():
        average.copy_(loaded.ema[name])
    run.stream.load_state_dict(loaded.state["data"])
    run.state = TrainState(**loaded.state["train"])
    if run.topology.is_main:
        log.info("continuing from %s", path)


def save(run: Run) -> None:
    data = run.stream.description
    state = {
        "config": config_values(run.config),
        "train": vars(run.state),
        "data": run.stream.state_dict(),
        "trained_on": {"codec": dict(data.codec), "prompt_encoder": dict(data.prompt_encoder)},
        "teacher": run.teacher_fingerprint,
        "torch": torch.__version__,
    }
    folder = Path(run.config.run_dir) / "checkpoints"
    keep = run.config.checkpoint.keep
    save_checkpoint(folder, run.state.step, run.model, run.ema.averages, state, run.topology, keep)


def train(run: Run, tracker: Tracker | None) -> None:
    """The loop. Every step is recorded; checkpoints every checkpoint.every steps and at the end."""
    config, state = run.config, run.state
    title = Path(config.run_dir).name
    with StepProgress(title, config.train.steps, state.step, config.tracking.log_every * 5) as progress:
        while state.step < config.train.steps:
            began = time.perf_counter()
            loss, result = train_step(run)
            state.step += 1
            guard_not_finite(run, loss.item(), result)
            if result.applied:
                run.ema.update(run.model.masters, state.step)
            if tracker is not None:
                values = step_values(run, loss.item(), result, time.perf_counter() - began)
                tracker.log(state.step, values)
                progress.update(state.step, f"loss {values['loss']:.4f}  {values['seconds']:.3f} s/step")
            if state.step % config.checkpoint.every == 0 or state.step == config.train.steps:
                save(run)


def step_values(run: Run, loss: float, result: StepResult, seconds: float) -> dict[str, float]:
    config, step = run.config, run.state.step
    values = {
        "loss": loss,
        "grad_norm": result.grad_norm,
        "lr": config.optim.lr * lr_scale(step - 1, config),
        "ema_decay": run.ema.decay(step),
        "skipped": run.state.skipped_total,
        "seconds": seconds,
        "images_per_second": config.train.batch_size / seconds,
    }
    if config.distils:
        values["teacher_ratio"] = teacher_ratio(step - 1, config)
    return values


@record
def main() -> None:
    config = read_config(Path(sys.argv[1]))
    # Ctrl-C reaches every process of a terminal at once; the launcher alone answers it and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    topology = start_process_group(config.launch.device, config.launch.timeout_seconds, config.parallel.tp)
    start_logging(topology.rank, f"{config.run_dir}/logs/rank_{topology.rank}.log")
    run = build_run(config, topology)
    resume(run)
    tracker = Tracker(config, run.state.step + 1, topology.world_size) if topology.is_main else None
    status = "FAILED"
    try:
        train(run, tracker)
        status = "FINISHED"
    finally:
        if tracker is not None:
            tracker.close(status)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
