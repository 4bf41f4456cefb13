"""Three small students, trained by one process, and what is exported of them; conftest.py's fixtures make them once.

test_export.py samples the exports, test_starting.py starts students from them, test_checkpoint_tool.py rewrites the checkpoints.
"""

from datetime import timedelta
from pathlib import Path

import torch
from ranks import run_ranks
from test_zero import ADAMW, MIXED, TIED, make_config

from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.parallel.topology import Topology

STUDENTS = {
    "tied": (*MIXED, *TIED),  # alpha / rank = 2
    "tied-dx": (*MIXED, *TIED, "policy.type=dx", "policy.num_nodes=3"),
    "full-dx": (*MIXED, "policy.type=dx", "policy.num_nodes=3", "policy.mode=polynomial"),
}
FAST = (*ADAMW, "optim.lr=0.02", "optim.warmup_steps=0", "ema.start_step=1", "schedule.shift=2.0")
STEPS = 3


def student_options(name: str) -> tuple[str, ...]:
    return (*STUDENTS[name], *FAST)


def topology_of(rank: int, world_size: int, tp: int = 1) -> Topology:
    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timedelta(seconds=600))
    return Topology(rank, world_size, rank, torch.device("cpu"), tp)


def train_students(rank: int, data: Path, teacher: Path, out: Path) -> None:
    from piflow_dist import train

    topology = topology_of(rank, 1)
    for name in STUDENTS:
        run = train.build_run(make_config(student_options(name), data, teacher, out / name), topology)
        for _ in range(STEPS):
            train.train_step(run)
            run.state.step += 1
            run.ema.update(run.model.masters, run.state.step)
        train.save(run)


def write_students(data: Path, teacher: Path, out: Path) -> None:
    run_ranks(train_students, 1, data, teacher, out, time_limit=420)


def write_exports(students: Path, gmflow_student: Path, teacher: Path, out: Path) -> None:
    """NAME-adapter of the tied students and NAME-merged of all, of the student of conftest.py ("full") and of the teacher."""
    for name in ("tied", "tied-dx"):
        export(ExportConfig(source=str(students / name), out=str(out / f"{name}-adapter")))
    sources = {name: students / name for name in STUDENTS} | {"full": gmflow_student, "teacher": teacher}
    for name, source in sources.items():
        whole = {"format": "merged", "dtype": "fp32", "max_shard_size": "150KB"}
        export(ExportConfig(source=str(source), out=str(out / f"{name}-merged"), **whole))


def newest(run: Path) -> Path:
    found, _ = newest_complete(run / "checkpoints")
    return found
