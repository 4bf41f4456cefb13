"""evaluation/shares.py: who computes what."""

import pytest

from piflow_dist.evaluation.shares import Share

SOURCE = [30.0, 2.0, 9.0, 100.0, 0.0, 0.0, 0.0, 0.0]
"""Costs of one source's metrics: every fourth of three sources is the heaviest of its source."""


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_heaviest_tasks_are_on_different_ranks(world_size: int) -> None:
    costs = SOURCE * 3
    dealt = [Share(rank, world_size).tasks(costs) for rank in range(world_size)]
    assert sorted(task for tasks in dealt for task in tasks) == list(range(len(costs)))
    loads = [sum(costs[task] for task in tasks) for tasks in dealt]
    assert max(loads) <= sum(costs) / world_size + max(costs) / 2
    for tasks in dealt:
        assert [costs[task] for task in tasks] == sorted((costs[task] for task in tasks), reverse=True)
