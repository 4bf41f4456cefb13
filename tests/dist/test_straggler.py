"""A rank whose data or device is slow is named by all ranks alike."""

import torch
from ranks import run_ranks

from piflow_dist.launch.straggler import StragglerProbe, slowest


def measure(rank: int, late_data: int, slow_device: int) -> list[dict[str, float]]:
    probe = StragglerProbe(torch.device("cpu"), every=2)
    probe._probe = lambda: 0.5 if rank == slow_device else 0.1
    found = []
    for step in range(1, 5):
        probe.add_wait(2.0 if rank == late_data and step <= 2 else 0.25)
        found.append(probe.measure(step))
    return found


def test_the_slow_ranks_are_named() -> None:
    answers = run_ranks(measure, 3, 1, 2)
    assert answers[0] == answers[1] == answers[2]
    first, second, third, fourth = answers[0]
    assert first == third == {}
    assert (second["data_wait_slowest_rank"], second["data_wait_slowest"], second["data_wait_slowest_ratio"]) == (
        1,
        2,
        8,
    )
    assert second["device_slowest_rank"] == 2 and abs(second["device_slowest_ratio"] - 5) < 1e-5
    assert fourth["data_wait_slowest"] == 0.25  # each measurement is of the steps since the last


def test_the_probe_takes_time_on_the_device() -> None:
    assert 0 < StragglerProbe(torch.device("cpu"), every=1)._probe() < 60


def test_ranks_that_wait_for_nothing() -> None:
    assert slowest("data_wait", (0.0, 0.0))["data_wait_slowest_ratio"] == 0
