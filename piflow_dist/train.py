"""A training process: build -> resume -> loop -> save. `python -m piflow_dist.train CONFIG.yaml`, one per rank.

Started by tools/launch.py, which checks the configuration first. The same code trains teachers (flow matching) and
students (imitation), on one process or many.
"""

import logging
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from piflow_dist.build import Run, TrainState, build_run
from piflow_dist.checkpoint.files import CheckpointError
from piflow_dist.checkpoint.reader import load_checkpoint
from piflow_dist.checkpoint.runs import none_left
from piflow_dist.checkpoint.sharded import find_checkpoint
from piflow_dist.config import Config, config_values, read_config, require
from piflow_dist.distill.baselines import meanflow_step, shortcut_step
from piflow_dist.distill.objectives import (
    Batch,
    flow_matching_step,
    imitation_data_step,
    imitation_datafree_step,
    teacher_ratio,
)
from piflow_dist.launch.console import StepLine, StepProgress, start_logging
from piflow_dist.launch.exits import FINISHED, STOPPED
from piflow_dist.launch.watchdog import Watchdog, start_watchdog
from piflow_dist.models.heads import PATCH
from piflow_dist.parallel.topology import Topology, start_process_group
from piflow_dist.parallel.zero import StepResult
from piflow_dist.seeds import seed_from
from piflow_dist.tracking.planned import start_planning
from piflow_dist.tracking.secrets import masked
from piflow_dist.tracking.tracker import Tracker, read_run_id
from piflow_dist.version import code_version

log = logging.getLogger("piflow_dist.train")  # __name__ is "__main__" in a training process
LOSS_FORGETS = 0.02


def train_step(run: Run) -> tuple[Tensor, StepResult]:
    """One optimiser step: backwards of all micro-batches, then the update. Returns (mean loss over ranks, result)."""
    config, state, watchdog = run.config, run.state, run.watchdog
    meter, clock = run.gauges.meter, run.gauges.clock
    micro_batches, _ = config.train.accumulation(run.topology.dp_size)
    losses = []
    for micro in range(micro_batches):
        # By step and place in the global batch: any step can be replayed alone, and two micro-batches of one process
        # get the noise that one micro-batch of two processes gets.
        seed = seed_from(config.train.seed, state.step, micro * run.topology.dp_size + run.topology.dp_rank)
        generator = torch.Generator(run.topology.device).manual_seed(seed)
        torch.manual_seed(seed)
        watchdog.enter("data")
        clock.enter("data")
        began = time.perf_counter()
        batch = next_batch(run)
        run.straggler.add_wait(time.perf_counter() - began)
        watchdog.enter("forward and backward")
        clock.enter("forward and backward")
        meter.add_tokens(len(batch.x0_BCHW), math.prod(batch.x0_BCHW.shape[-2:]) // PATCH**2, batch.mask_BL)
        losses.append(micro_step(run, batch, 1 / micro_batches, generator))
    watchdog.enter("optimizer")
    clock.enter("optimizer")
    clip = config.optim.clip if state.step >= config.optim.clip_from_step else 0.0
    result = run.model.step(lr_scale(state.step, config), clip)
    watchdog.enter("loss")
    clock.enter("loss")
    # A signal reaches the ranks at different moments, before this step's end on one and after it on another: they agree in
    # the sum that they make anyway. Over all ranks, not the data-parallel ones, as those of another slice must agree too.
    loss = torch.stack(losses).mean()
    totals = torch.stack([loss, torch.full_like(loss, float(watchdog.stop_requested))])
    dist.all_reduce(totals)
    loss, run.stopping_ranks = totals
    return loss / run.topology.world_size, result


def micro_step(run: Run, batch: Batch, scale: float, generator: torch.Generator) -> Tensor:
    meter = run.gauges.meter
    match run.config.objective:
        case "flow_matching":
            return flow_matching_step(run.model, batch, run.config, run.schedule, scale, generator, meter)
        case "imitation":
            return imitation_data_step(
                run.model, run.teacher, batch, run.config, run.schedule, run.state.step, scale, generator, meter
            )
        case "imitation_datafree":
            return imitation_datafree_step(
                run.model, run.teacher, batch, run.config, run.schedule, run.state.step, scale, generator, meter
            )
        case "meanflow":
            return meanflow_step(run.model, run.teacher, batch, run.config, run.schedule, scale, generator, meter)
        case "shortcut_regression":
            return shortcut_step(run.model, run.teacher, batch, run.config, run.schedule, scale, generator, meter)
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
    state, limit = run.state, min(run.config.train.max_skipped, run.config.train.steps)
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

    The launcher has set checkpoints aside that are not to be continued (checkpoint.resume): a process that is started again must
    neither start afresh nor go back once more. Nothing random has to be restored: noise, dropout and the order of samples
    are functions of the seed, the step and the place in the global batch.
    """
    folder, place = run.saver.folder, run.topology
    path, problems = find_checkpoint(folder, place)
    for problem in problems:
        log.warning("%s", problem)
    if path is None and problems:
        raise CheckpointError(none_left(run.config.run_dir, problems))
    if path is None:
        if place.is_main:
            log.info("starting at step 0")
        return
    split_dims = {shard.name: shard.split_dim for shard in run.model.shards}
    loaded = load_checkpoint(path, place.dp_rank, place.dp_size, place.tp_rank, place.tp, split_dims)
    run.model.load(loaded.weights, loaded.optimizer)
    for name, average in run.model.named(run.ema.averages).items():
        average.copy_(loaded.ema[name])
    run.stream.load_state_dict(loaded.state["data"])
    run.state = TrainState(**loaded.state["train"])
    run.parent, run.metrics = str(path), loaded.state.get("metrics", {})
    run.started_from = loaded.state.get("started_from")
    if place.is_main:
        saved_on = f"dp {loaded.state['dp_size']} x tp {loaded.state['tp']}"
        log.info("continuing from %s (saved on %s, now dp %d x tp %d)", path, saved_on, place.dp_size, place.tp)


def save(run: Run) -> None:
    """Save the state of this moment and wait until it is on disk."""
    start_save(run)
    run.saver.wait()


def start_save(run: Run) -> dict[str, float]:
    """Save the state of this moment beside what follows; the figures of an earlier save that has become complete by it."""
    data = run.stream.description
    state = {
        "config": config_values(run.config) | {"tracking": masked(config_values(run.config.tracking))},
        "train": vars(run.state),
        "metrics": {key: value for key, value in run.metrics.items() if math.isfinite(value)},
        "parent": run.parent,
        "data": run.stream.state_dict(),
        "trained_on": {"codec": dict(data.codec), "prompt_encoder": dict(data.prompt_encoder)},
        "teacher": run.teacher_fingerprint,
        "base": run.config.distill.teacher if run.config.mode == "tied" else None,
        "started_from": run.started_from,
        "mlflow_run": read_run_id(Path(run.config.run_dir)),
        "code": code_version(),
        "torch": torch.__version__,
    }
    return run.saver.start(run.state.step, run.model, run.ema.averages, state)


def train(run: Run, tracker: Tracker | None) -> bool:
    """The loop. Every step is recorded; checkpoints when they are due (checkpoint.every, .every_minutes) and at the end.

    Returns whether all steps are done: a request to stop (launch/signals.py) ends the loop after a checkpoint.
    """
    config, state, watchdog = run.config, run.state, run.watchdog
    line = StepLine()
    title, stop = Path(config.run_dir).name, False
    lines = Path(config.run_dir) / "logs" / "progress.log" if tracker is not None else None
    figures = evaluate(run, tracker) if run.evaluation.is_owed(state.step) else {}
    with StepProgress(title, config.train.steps, state.step, config.tracking.log_every * 5, lines) as progress:
        while state.step < config.train.steps and not stop:
            began = time.perf_counter()
            watchdog.begin_step(state.step + 1)
            loss_tensor, result = train_step(run)
            loss, stop = loss_tensor.item(), run.stopping_ranks.item() > 0
            state.step += 1
            run.gauges.clock.enter("ema")
            guard_not_finite(run, loss, result)
            if result.applied:
                run.ema.update(run.model.masters, state.step)
                smooth = loss if state.loss_smooth is None else state.loss_smooth
                state.loss_smooth = smooth + LOSS_FORGETS * (loss - smooth)
            run.metrics = step_values(run, loss, result, time.perf_counter() - began)
            check_best_metric(run)
            run.metrics |= measure(run, result)
            save_is_due, settled = run.saver.at_boundary(state.step)
            watchdog.end_step("metrics and checkpoint")
            if run.evaluation.is_due(state.step) and not stop:
                run.metrics |= evaluate(run, tracker)
            if tracker is not None:
                tracker.log(state.step, figures | run.metrics | settled)
                if figures or settled:
                    tracker.checkpoints_changed()
                progress.update(state.step, line(run.metrics, next_save(config, state.step)))
            figures = {}
            if save_is_due or stop or state.step == config.train.steps:
                figures = start_save(run)
        figures |= run.saver.wait()
    if tracker is not None:
        tracker.log_late(state.step, figures)
    return state.step == config.train.steps


def evaluate(run: Run, tracker: Tracker | None) -> dict[str, float]:
    """Images of fixed prompts beside the teacher's (evaluation.every); metrics on rank 0. Between two steps."""
    run.watchdog.enter("evaluation")
    values, picture = run.evaluation.run(run.state.step, run.model, run.teacher, run.ema.averages)
    if tracker is not None and picture is not None:
        tracker.log_artifact(picture, "evaluation")
    run.watchdog.enter("metrics and checkpoint")
    return values


def measure(run: Run, result: StepResult) -> dict[str, float]:
    """What is not known of every step: means over the last ones, ranks, memory, the probe. Collective; alike on the ranks that log."""
    step, every = run.state.step, run.config.tracking.probe_every
    run.gauges.end_step(run.metrics["seconds"], result.clipped)
    values = run.straggler.measure(step) | run.gauges.measure(step)
    if run.probe is not None and step % every == 0:
        run.watchdog.enter("probe")
        values |= run.probe.measure()
    return values


def next_save(config: Config, step: int) -> int | None:
    """The step of the next checkpoint, where steps decide it; the last step has one."""
    every, last = config.checkpoint.every, config.train.steps
    return min((step // every + 1) * every, last) if every and step < last else None


def check_best_metric(run: Run) -> None:
    """At the first step of a process, when it is known what there is."""
    name = run.config.checkpoint.best_metric
    require(
        name in run.metrics or not run.config.checkpoint.keep_best,
        f"checkpoint.best_metric={name} is not logged by this run. Choose one of: {', '.join(sorted(run.metrics))}.",
    )


def step_values(run: Run, loss: float, result: StepResult, seconds: float) -> dict[str, float]:
    config, step = run.config, run.state.step
    values = {
        "loss": loss,
        "loss_smooth": loss if run.state.loss_smooth is None else run.state.loss_smooth,
        "grad_norm": result.grad_norm,
        "lr": config.optim.lr * lr_scale(step - 1, config),
        "ema_decay": run.ema.decay(step),
        "skipped": run.state.skipped_total,
        "seconds": seconds,
        "images_per_second": config.train.batch_size / seconds,
    }
    if config.objective.startswith("imitation"):
        values["teacher_ratio"] = teacher_ratio(step - 1, config)
    return values


def work(config: Config, topology: Topology, watchdog: Watchdog) -> int:
    """A whole training; the exit code (launch/exits.py)."""
    run = build_run(config, topology, watchdog)
    resume(run)
    tracker = Tracker(config, run.state.step + 1, topology.world_size) if topology.is_main else None
    planning = start_planning(config) if topology.is_main else None
    status = "FAILED"
    try:
        done = train(run, tracker)
        status = "FINISHED" if done else "SCHEDULED"  # MLflow's word for a run that is to go on
    finally:
        run.saver.close(config.launch.timeout_seconds)
        if planning is not None and planning.poll() is None:
            planning.terminate()
        if tracker is not None:
            tracker.close(status)
    if not done and topology.is_main:
        log.info("stopped by %s after step %d, with a checkpoint", watchdog.request.name, run.state.step)
    return FINISHED if done else STOPPED


@record
def main(config_file: str | None = None) -> int:
    """A training process; its exit code (launch/exits.py). config_file: default: the first argument of the command."""
    config = read_config(Path(config_file or sys.argv[1]))
    # Ctrl-C reaches every process of a terminal at once; the launcher alone answers it and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    topology = start_process_group(config.launch.device, config.launch.timeout_seconds, config.parallel.tp)
    require(
        topology.world_size == config.launch.processes,
        f"{topology.world_size} processes were started for launch.processes={config.launch.processes}.",
    )
    logs = Path(config.run_dir) / "logs"
    console = start_logging(topology.rank, logs, config.launch.log_level)
    with start_watchdog(config, topology, logs, console) as watchdog:
        try:
            code = work(config, topology, watchdog)
            dist.barrier()  # rank 0 may hold the store that the watchdogs ask
        except BaseException as error:
            watchdog.failed(error)
            raise
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
