"""tools/compare.py: equal budgets, which trainings there are, and what its table and figure say. No tool is run."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import load_tool
from PIL import Image

from piflow_dist.config import ConfigError, changed_keys, load_config
from piflow_dist.evaluation.metrics import METRICS
from piflow_dist.evaluation.objectives import Budget, Entry, budget, panels, tables


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("compare")


def test_every_objective_gets_the_same_budget(tool: Any) -> None:
    config = tool.CompareConfig(seeds=2, steps=30, nfe=[1, 4], out="x")
    first, references, students = tool.plan(config)
    assert [stage.name for stage in first] == ["data", "teacher"]
    assert set(references) == {100, 1, 4}
    kinds = Counter(student.method for student in students)
    assert kinds == {"gmm": 4, "dx": 4, "datafree": 4, "meanflow": 2, "shortcut": 4, "shortcut2": 4}
    stages = [stage for student in students for stage in (student.stage, *student.samples.values())]
    assert len({stage.name for stage in stages}) == len({stage.makes for stage in stages}) == len(stages)
    trained = [load_config(student.stage.arguments[1:]) for student in students]
    may_differ = ("run_dir", "objective", "policy.", "distill.nfe", "distill.teacher_substeps", "train.seed")
    for other in trained[1:]:
        assert not [key for key in changed_keys(trained[0], other) if not key.startswith(may_differ)]
    assert {config.train.seed for config in trained} == {0, 1}
    for student, settings in zip(students, trained, strict=True):
        assert set(student.samples) == ({1, 4} if student.method == "meanflow" else {settings.distill.nfe})
        assert student.stage.after[0].name == "teacher"


def test_settings_that_cannot_work(tool: Any) -> None:
    for changes, said in (
        ({"methods": ["gm"]}, "gmm, dx, datafree, meanflow"),
        ({"nfe": [0]}, "1 or more"),
        ({"seeds": 0}, "greater than"),
    ):
        with pytest.raises(ConfigError, match=said):
            tool.CompareConfig(**changes)


def measured(psnr: float) -> dict[str, float | None]:
    return {metric.key: psnr / 100 for metric in METRICS} | {"psnr_db": psnr, "frechet_real": None}


def test_intervals_are_those_of_students_t() -> None:
    entry = Entry("a", 1, [measured(20.0), measured(22.0), measured(24.0)])
    middle, half = entry.interval("psnr_db")
    assert (middle, half) == (22.0, pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3))
    many = Entry(
        "a", 1, [measured(20.0 + value) for value in range(12)]
    )  # 11 degrees of freedom: 2.201, standard deviation sqrt(13)
    assert many.interval("psnr_db")[1] == pytest.approx(2.201 * 13**0.5 / 12**0.5, rel=1e-3)
    assert entry.interval("frechet_real") is None
    assert math.isnan(Entry("a", 1, [measured(20.0)]).interval("psnr_db")[1])


def test_what_a_step_costs(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"seconds": s}) + "\n" for s in (9.0, 0.2, 0.3)))
    common = ["data.root=x", "run_dir=x", "distill.teacher=x", "distill.guidance.scale=2"]
    for overrides, asked in (
        (["experiment=demo_gmm"], 4),  # two states, each with and without the prompt
        (["experiment=demo_gmm", "distill.guidance.scale=1"], 2),
        (["experiment=demo_datafree"], 16),
        (["experiment=demo_meanflow"], 2),
        (["experiment=demo_shortcut"], 16),
    ):
        found = budget("m", load_config([overrides[0], *common, *overrides[1:]]), [tmp_path])
        assert (found.teacher_evaluations, found.seconds) == (asked, 0.2), overrides
    assert budget("m", load_config(["experiment=demo_meanflow", *common]), [tmp_path]).nfe == "any"


def test_table_and_figure(tmp_path: Path) -> None:
    entries = [
        Entry("teacher, Euler", 100, [measured(50.0) | {"psnr_db": None}]),
        Entry("teacher, Euler", 1, [measured(10.0)]),
    ]
    entries += [Entry("a", nfe, [measured(20.0 + nfe), measured(22.0 + nfe)]) for nfe in (1, 4)]
    with pytest.raises(ValueError, match="colour"):
        panels([Entry(str(method), 1, [measured(20.0)]) for method in range(9)])
    lines = tables(entries, [Budget("a", "1", 300, 4, "1 forward and backward", 0.25)]).splitlines()
    assert lines[2].startswith("| teacher, Euler | 100 | — | 0.50 |") and lines[2].endswith("| — |")
    assert "| a | 1 | 22.0 ± 12.7 | 0.22 ± 0.13 |" in lines[4]
    assert lines[-1] == "| a | 1 | 300 | 4 | 1 forward and backward | 0.250 |"
    path = tmp_path / "figure.png"
    path.write_bytes(panels(entries))
    assert path.stat().st_size < 200_000 and Image.open(path).width > 800
