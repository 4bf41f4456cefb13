"""When a job is tried again after its processes have ended, and when it is given up."""

import json
from pathlib import Path

import pytest

from piflow_dist.launch.exits import FAILED, FINISHED, GAVE_UP, HUNG, REFUSED, STOPPED, STOPPED_AT_ONCE
from piflow_dist.launch.failure_record import Failure, failure_path
from piflow_dist.launch.restarts import LONGEST_WAIT, WAIT, decide, tries_without_progress


def reach(run_dir: Path, step: int) -> None:
    rows = [json.dumps({"step": number, "loss": 1.0}) + "\n" for number in range(1, step + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(rows))


def fail_at(run_dir: Path, step: int, code: int = FAILED, job: str = "7") -> int:
    reach(run_dir, step)
    return decide(run_dir, job, code).code


def test_the_third_failure_at_a_step_is_the_last(tmp_path: Path) -> None:
    assert [fail_at(tmp_path, 12) for _ in range(2)] == [STOPPED, STOPPED]
    reach(tmp_path, 12)
    decision = decide(tmp_path, "7", HUNG)
    assert decision.code == GAVE_UP
    assert "Failed 3 times without getting past step 12" in decision.message and "exit code 70" in decision.message


def test_a_failure_that_comes_a_step_sooner_is_no_progress(tmp_path: Path) -> None:
    assert [fail_at(tmp_path, step) for step in (12, 11, 12)] == [STOPPED, STOPPED, GAVE_UP]


def test_progress_starts_the_count_anew(tmp_path: Path) -> None:
    assert [fail_at(tmp_path, step) for step in (12, 12, 40, 41, 41, 41)] == [STOPPED] * 5 + [GAVE_UP]


def test_a_failure_before_the_first_step_counts(tmp_path: Path) -> None:
    assert [decide(tmp_path, "7", FAILED).code for _ in range(3)] == [STOPPED, STOPPED, GAVE_UP]


def test_another_submission_starts_the_count_anew(tmp_path: Path) -> None:
    assert [fail_at(tmp_path, 12, job="7") for _ in range(2)] == [STOPPED, STOPPED]
    assert [fail_at(tmp_path, 12, job="8") for _ in range(3)] == [STOPPED, STOPPED, GAVE_UP]


@pytest.mark.parametrize("code", [STOPPED, STOPPED_AT_ONCE])
def test_stops_are_not_counted_and_not_delayed(tmp_path: Path, code: int) -> None:
    reach(tmp_path, 12)
    decisions = [decide(tmp_path, "7", code) for _ in range(10)]
    assert {(decision.code, decision.wait) for decision in decisions} == {(STOPPED, 0)}


def test_each_failure_waits_twice_as_long(tmp_path: Path) -> None:
    reach(tmp_path, 12)
    assert [decide(tmp_path, "7", FAILED).wait for _ in range(2)] == [WAIT, 2 * WAIT]
    assert LONGEST_WAIT >= 2 * WAIT


def test_what_cannot_work_is_not_tried_again(tmp_path: Path) -> None:
    assert decide(tmp_path, "7", REFUSED).code == REFUSED
    assert decide(tmp_path, "7", FINISHED).code == FINISHED
    assert not (tmp_path / "attempts.jsonl").exists()


def test_the_reason_is_the_ranks_own_or_the_signal(tmp_path: Path) -> None:
    assert "signal 9" in decide(tmp_path, "7", 137).message
    (tmp_path / "logs").mkdir()
    failure = Failure(3, 5, "data", "ValueError: a shard is damaged", "Traceback ...")
    failure_path(tmp_path).write_text(json.dumps(vars(failure)))
    assert "ValueError: a shard is damaged" in decide(tmp_path, "7", 1).message


def test_tries() -> None:
    def tries(*steps: int) -> int:
        return tries_without_progress([{"step": step} for step in steps])

    assert [tries(5), tries(5, 5), tries(5, 6), tries(5, 6, 5), tries(6, 5, 4)] == [1, 2, 1, 2, 3]
