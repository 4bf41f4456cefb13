"""Students that start from an export or a checkpoint (init_from): two processes, with and without tensor parallelism."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_weights
from ranks import run_ranks
from students import STEPS, newest, student_options, topology_of
from test_tensor_parallel import joined
from test_zero import Course, keep_weights, make_config

from piflow_dist.config import Config, ConfigError
from piflow_dist.launch.preflight import check_run

STARTS = {
    "tied from adapter": ("tied", "tied-adapter", ("lora.alpha=4",)),
    "tied from checkpoint": ("tied", "tied", ()),
    "tied from raw weights": ("tied", "tied", ("init_ema=false",)),
    "full from merged": ("full-dx", "full-dx-merged", ()),
    "full from checkpoint": ("full-dx", "full-dx", ()),
}


@dataclasses.dataclass
class Started:
    courses: dict[str, Course]
    lineage: dict[str, Any]
    resumed: dict[str, Any]


def start_config(
    name: str, students: Path, exports: Path, data: Path, teacher: Path, run_dir: Path, *more: str
) -> Config:
    student, source, options = STARTS[name]
    folder = exports / source if (exports / source).exists() else students / source
    return make_config((*student_options(student), f"init_from={folder}", *options, *more), data, teacher, run_dir)


def start_rank(
    rank: int, tp: int, names: tuple[str, ...], students: Path, exports: Path, data: Path, teacher: Path, out: Path
) -> Started:
    """Start students and look at their weights before the first step; the last one goes on, is saved and resumed."""
    from piflow_dist import train

    topology = topology_of(rank, 2, tp)
    parallel = ("launch.processes=2", f"parallel.tp={tp}", f"train.micro_batch_size={tp}")
    started = Started({}, {}, {})
    for name in names:
        config = start_config(name, students, exports, data, teacher, out / name, *parallel)
        run = train.build_run(config, topology)
        started.courses[name] = Course()
        keep_weights(started.courses[name], run)
        started.lineage[name] = run.started_from
        assert run.state.step == 0 and not run.model.optimizer_state()
    train.train_step(run)
    run.state.step += 1
    train.save(run)
    # Its source may be gone when it goes on.
    config.init_from = str(out / "gone")
    again = train.build_run(config, topology)
    train.resume(again)
    started.resumed = again.started_from
    return started


@pytest.fixture(scope="module")
def started(
    students: Path, exports: Path, tiny_data: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[Started]]:
    """By tensor-parallel size, on two processes."""
    names = {2: tuple(STARTS), 1: ("full from merged", "tied from adapter")}
    folders = (students, exports, tiny_data, teacher_run)
    return {
        tp: run_ranks(start_rank, 2, tp, chosen, *folders, tmp_path_factory.mktemp(f"started_{tp}"), time_limit=420)
        for tp, chosen in names.items()
    }


@pytest.mark.parametrize(
    ("tp", "name"), [*((2, name) for name in STARTS), (1, "full from merged"), (1, "tied from adapter")]
)
@pytest.mark.parametrize("kind", ["shards", "ema"])
def test_a_student_starts_with_the_weights_of_another(
    started: dict[int, list[Started]], students: Path, tp: int, name: str, kind: str
) -> None:
    found = joined([rank.courses[name] for rank in started[tp]], tp, kind)
    want = read_weights(newest(students / STARTS[name][0]), ema="raw" not in name)
    assert found.keys() == want.keys()
    for key, value in want.items():
        scale = 2 if "lora.alpha=4" in STARTS[name][2] and "lora_B" in key else 1  # alpha / rank was 2 and is 1
        assert torch.equal(found[key], scale * value), key


def test_lineage_is_written_down_and_outlives_its_source(started: dict[int, list[Started]], students: Path) -> None:
    lineage = started[2][0].lineage
    source = newest(students / "tied")
    assert lineage["tied from raw weights"]["weights"] == "raw" and lineage["tied from checkpoint"]["weights"] == "ema"
    assert lineage["tied from checkpoint"]["source"] == str(source)
    assert lineage["tied from checkpoint"]["step"] == STEPS
    assert started[2][0].resumed == lineage["full from checkpoint"]
    assert started[2][1].lineage == lineage


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tied from adapter", ("policy.num_components=4",), ("policy.num_components is 3 there and 4 here",)),
        ("tied from checkpoint", ("policy.type=dx",), ("policy.type is gmflow there and dx here",)),
        ("tied from adapter", ("lora.rank=8",), ("lora.rank is 4 there and 8 here",)),
        ("tied from adapter", (r"lora.targets=['transformer_blocks\.\d+\.img_mlp\.net\.2']",), ("unknown", "txt_mlp")),
        ("tied from checkpoint", ("mode=full",), ("a checkpoint of mode=tied", "mode=full", "format=merged")),
        ("full from merged", ("mode=tied",), ("a merged transformer", "mode=tied")),
        ("full from checkpoint", ("schedule.shift=3.2",), ("schedule.shift is 2.0 there and 3.2 here",)),
        ("tied from adapter", ("init_from=/nowhere",), ("init_from=/nowhere does not exist",)),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_the_start(
    students: Path, exports: Path, tiny_data: Path, teacher_run: Path, tmp_path: Path,
    name: str, options: tuple[str, ...], words: tuple[str, ...],
) -> None:  # fmt: skip
    config = start_config(name, students, exports, tiny_data, teacher_run, tmp_path / "run", *options)
    with pytest.raises(ConfigError) as error:
        check_run(config)
    assert all(word in str(error.value) for word in words), error.value


def test_adapters_of_another_teacher_are_refused(
    students: Path, exports: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from conftest import write_diffusers_teacher

    teacher = write_diffusers_teacher(tmp_path / "another")
    for name in ("tied from adapter", "tied from checkpoint"):
        config = start_config(name, students, exports, tiny_data, teacher, tmp_path / "run")
        with pytest.raises(ConfigError, match="Give that one"):
            check_run(config)
