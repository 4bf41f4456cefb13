"""piflow_dist/launch/lock.py: one user of a folder at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from piflow_dist.config import ConfigError
from piflow_dist.launch.lock import only_user

HOLD = "import sys; from pathlib import Path; from piflow_dist.launch.lock import only_user\n" + (
    "with only_user(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_user_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        message = rf"run_dir=run is in use by process {first.pid} on \S+\. Wait for it, or choose another folder\."
        with pytest.raises(ConfigError, match=message), only_user(lock, "run_dir=run"):
            pytest.fail("both had it")
        first.kill()
        first.wait()
    with only_user(lock, "run_dir=run"):
        assert lock.read_text().startswith(f"process {os.getpid()}")
    assert lock.read_text() == ""


def test_an_error_inside_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), only_user(tmp_path / ".lock", "x"):
        raise ValueError("inside")
    with only_user(tmp_path / ".lock", "x"):
        pass


def test_a_folder_that_cannot_be_written() -> None:
    with (
        pytest.raises(ConfigError, match="out=/dev/null/x cannot be written"),
        only_user(Path("/dev/null/x/.lock"), "out=/dev/null/x"),
    ):
        pass
