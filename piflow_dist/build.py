"""What a training process holds between steps, and how it is built from its configuration: models, engine, data, schedule."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.description import load_description
from data_pipeline.empty_prompt import read_empty_prompt
from data_pipeline.stream import LatentStream, first_prompts
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.checkpoint.saver import CheckpointSaver
from piflow_dist.config import Config
from piflow_dist.distill.ema import Ema
from piflow_dist.distill.objectives import Batch, build_schedule
from piflow_dist.distill.probe import PolicyProbe
from piflow_dist.evaluation.during import TrainingEvaluation
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.launch.straggler import StragglerProbe
from piflow_dist.launch.watchdog import UNWATCHED, Unwatched, Watchdog
from piflow_dist.models.architecture import build_teacher, plan_model
from piflow_dist.models.initial import open_initial
from piflow_dist.models.pretrained import open_teacher, plan_training
from piflow_dist.parallel.topology import Topology
from piflow_dist.parallel.zero import FrozenModel, TiedTeacher, TrainedModel
from piflow_dist.seeds import seed_from
from piflow_dist.tracking.gauges import Gauges


@dataclass
class TrainState:
    step: int = 0
    """Optimiser steps done, skipped ones included."""
    skipped_in_a_row: int = 0
    skipped_total: int = 0
    loss_smooth: float | None = None
    """Average of the losses that forgets within some 1 / train.LOSS_FORGETS steps."""


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
    watchdog: Watchdog | Unwatched
    straggler: StragglerProbe
    gauges: Gauges
    saver: CheckpointSaver
    evaluation: TrainingEvaluation
    probe: PolicyProbe | None = None
    """With tracking.probe_every."""
    parent: str | None = None
    """The checkpoint that this process went on from."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last step; saved with the weights that it gave."""
    started_from: dict[str, Any] | None = None
    """The student that init_from named, for the record; None for one that started from its teacher."""
    stopping_ranks: Tensor | None = None
    """How many ranks had been asked to stop by the end of the last step; the same on all of them."""


def build_run(config: Config, topology: Topology, watchdog: Watchdog | Unwatched = UNWATCHED) -> Run:
    description = load_description(config.data.root)
    model, teacher, started_from = build_models(config, topology)
    stream = build_stream(config, topology)
    schedule = build_schedule(config.schedule, description.typical_shape)
    empty_LD = read_empty_prompt(description).to(topology.device)
    probe = None
    if config.distils and config.tracking.probe_every:
        images = probe_batch(config, topology, empty_LD, description.typical_shape)
        probe = PolicyProbe(config, schedule, model, teacher, *images)
    return Run(
        config=config,
        topology=topology,
        schedule=schedule,
        model=model,
        teacher=teacher,
        ema=Ema(model.masters, config.ema.gamma, config.ema.start_step),
        stream=stream,
        empty_LD=empty_LD,
        probe=probe,
        state=TrainState(),
        teacher_fingerprint=open_teacher(config).fingerprint() if config.distils else None,
        watchdog=watchdog,
        straggler=StragglerProbe(topology.device, config.tracking.log_every),
        gauges=Gauges(config, topology),
        saver=CheckpointSaver(Path(config.run_dir) / "checkpoints", topology, config.checkpoint),
        evaluation=TrainingEvaluation(config, description, schedule, topology),
        started_from=started_from,
    )


def build_models(
    config: Config, topology: Topology
) -> tuple[TrainedModel, FrozenModel | TiedTeacher | None, dict[str, Any] | None]:
    """(the model that is trained, its teacher if it distils, what init_from named for the record)."""
    parallel, dtype = config.parallel, config.train.dtype
    initial = None
    if config.distils:
        if config.init_from is not None and newest_checkpoint_of(config) is None:
            initial = open_initial(config)
        module, start = plan_training(config, None if initial is None else initial.weights)
    else:
        module, start = build_teacher(config.model, config.train.seed), None
    model = TrainedModel(module, start, topology, config.optim, parallel, dtype)
    teacher = None
    if config.mode == "tied":
        teacher = TiedTeacher(model)
    elif config.distils:
        teacher = FrozenModel(plan_model(config.model), open_teacher(config), topology, parallel, dtype)
    return model, teacher, None if initial is None else initial.lineage


def newest_checkpoint_of(config: Config) -> Path | None:
    """What the run will continue from, judged by file sizes: a source of initial weights may be gone by then."""
    return newest_complete(Path(config.run_dir) / "checkpoints", contents=False)[0]


def build_stream(config: Config, topology: Topology) -> LatentStream:
    _, micro = config.train.accumulation(topology.dp_size)
    return LatentStream(
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


def probe_batch(
    config: Config, topology: Topology, empty_LD: Tensor, shape: tuple[int, int, int]
) -> tuple[Batch, Tensor]:
    """The data set's first prompts and noise of their own, shared out over the data-parallel ranks, and which of them count.

    The same images on any number of ranks and devices. Every rank takes equally many, the last one again where they do not share
    out: with sharded weights a forward pass of one is a forward pass of all.
    """
    count, device = config.tracking.probe_images, topology.device
    found = first_prompts(config.data.root, config.data.split, count, cache_dir=config.data.cache_dir)
    share = math.ceil(count / topology.dp_size)
    indices = range(topology.dp_rank * share, (topology.dp_rank + 1) * share)
    mine = [min(index, count - 1) for index in indices]
    noises = []
    for index in mine:
        generator = torch.Generator().manual_seed(seed_from(config.train.seed, "probe", index))
        noises.append(torch.randn(shape, generator=generator))
    counts_B = torch.tensor([float(index < count) for index in indices], device=device)
    batch = Batch(torch.stack(noises).to(device), *(tensor[mine].to(device) for tensor in found), empty_LD)
    return batch, counts_B
