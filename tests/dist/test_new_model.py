"""docs/new_model.md, followed to the letter in a copy of the code: its files, its edits, its commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, TINY

PAGE = (REPO / "docs" / "new_model.md").read_text()
SHORT = [option for option in TINY if not option.startswith("model=")] + [
    *("train.steps=2", "train.batch_size=4", "policy.num_components=2", "policy.logstd_inner_dim=8", "lora.rank=2"),
    "tracking.enabled=false",
]


def follow(page: str, copy: Path) -> list[str]:
    """Write and edit what the page says, inside `copy`; the commands of its last section with any."""
    commands: list[str] = []
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        path = re.match(r"\d+\. `(.+)`\n", section)
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", section, flags=re.M | re.S):
            if language == "diff":
                lines = block.splitlines(keepends=True)
                before = "".join(line[1:] for line in lines if line[0] != "+")
                text = (copy / path[1]).read_text()
                assert text.count(before) == 1, f"{path[1]} does not hold once:\n{before}"
                after = "".join(line[1:] for line in lines if line[0] != "-")
                (copy / path[1]).write_text(text.replace(before, after))
            elif path is not None:
                (copy / path[1]).write_text(block)
            else:
                commands += block.splitlines()
    return commands


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    for name in ("piflow_dist", "data_pipeline", "configs", "tools"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_a_third_architecture(copy: Path, tiny_data: Path) -> None:
    commands = follow(PAGE, copy)
    assert len(commands) == 5
    environment = os.environ | {"PYTHONPATH": str(copy)}
    for command in commands:
        words = [word.replace("DATA", str(tiny_data)) for word in shlex.split(command)]
        tool = Path(words[1]).stem
        words += SHORT if tool == "launch" else ["launch.device=cpu"] if tool == "sample" else []
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=copy, env=environment, text=True, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
    assert len(list((copy / "IMAGES" / "images").glob("*.png"))) == 3
    assert "Fits" in done.stdout
