"""Which of several failed processes is named, and what it leaves to be said."""

import json
import re
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from piflow_dist.launch.exits import FAILED
from piflow_dist.launch.failure_record import Failure, failure_path, read_failure, write_first_failure
from piflow_dist.launch.failures import last_words
from piflow_dist.launch.local import describe

LOST = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:5"
OWN = "ValueError: a socket of an image that is damaged"
"""Looks like a lost connection, and is none."""


def failed(folder: Path, *ends: tuple[int, str]) -> str:
    """What the launcher says of processes with these exit codes and recorded exceptions, found dead in this order."""
    failures = {}
    for rank, (code, text) in enumerate(ends):
        path = folder / f"error_{rank}.json"
        if text:
            # All in the same second: the clock of error files is no finer.
            path.write_text(
                json.dumps({"message": {"message": text, "extraInfo": {"timestamp": "1", "py_callstack": ""}}})
            )
        failures[rank] = ProcessFailure(rank, 10 + rank, code, str(path))
    return describe(ChildFailedError("sample", failures), folder / "logs")


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        (((1, LOST), (1, OWN)), f"Process 1 ended with exit code 1; the other processes were ended too.*{OWN}"),
        (((1, OWN), (-signal.SIGTERM, LOST)), f"Process 0 ended with exit code 1.*{OWN}"),  # the agent's SIGTERM
        (((-signal.SIGTERM, ""), (1, "")), "Process 1 ended with exit code 1"),
        (((1, LOST), (-signal.SIGKILL, "")), "Process 1 was ended by SIGKILL"),
        (((1, LOST), (-signal.SIGTERM, "")), "Process 1 was ended by SIGTERM"),
        (((1, LOST), (1, LOST)), "Process 0 ended with exit code 1"),
    ],
)
def test_the_process_that_failed_by_itself_is_named(tmp_path: Path, ends: tuple, named: str) -> None:
    assert re.match(named, failed(tmp_path, *ends), re.DOTALL)


def test_what_was_kept_is_said_unless_a_process_was_killed(tmp_path: Path) -> None:
    write_first_failure(tmp_path, Failure(0, 0, "", "a.png is damaged", "a.png is damaged"))
    said = failed(tmp_path, (1, ""), (-signal.SIGTERM, ""))
    assert said.startswith("Process 0 failed; the other") and said.endswith("\na.png is damaged")
    assert "Process 1 was ended by SIGKILL" in failed(tmp_path, (1, ""), (-signal.SIGKILL, ""))


def test_the_first_error_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError), last_words(tmp_path, 0, (ValueError,)):
        raise RuntimeError("Connection closed by peer")  # says no more than that another one failed
    assert read_failure(tmp_path) is None
    with pytest.raises(SystemExit) as end, last_words(tmp_path, 1, (ValueError,)):
        raise ValueError("a.png is damaged")
    assert end.value.code == FAILED and capsys.readouterr().err == "rank 1: a.png is damaged\n"
    with pytest.raises(KeyError), last_words(tmp_path, 2, (ValueError,)):
        raise KeyError("later")
    assert read_failure(tmp_path).describe() == "a.png is damaged\nRank 1 failed."


def test_an_unexpected_error_is_kept_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError), last_words(tmp_path, 2, (ValueError,)):
        raise KeyError("gone")
    failure = read_failure(tmp_path)
    assert failure.reason == "KeyError: 'gone'" and failure.text.startswith("Traceback")
    assert failure_path(tmp_path).parent == tmp_path / "logs"
