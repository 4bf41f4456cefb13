"""Tensor parallelism alone and with ZeRO-3: the same training as one process, to rounding, weight by weight."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_zero import (
    ADAMW,
    CLIPPED,
    DATAFREE,
    MEANFLOW,
    MIXED,
    SGD,
    TEACHING,
    TIED,
    Course,
    make_config,
    train_steps,
    whole,
)
from torch.testing import assert_close

WORLDS = {"one": (1, 1), "dp2 x tp2": (4, 2), "tp2": (2, 2)}
"""(processes, of these in a tensor-parallel group), in the order in which they run: what one saves the next ones resume."""
SAVERS = (1, 4)
SCENARIOS = {
    "teacher-sgd": (*TEACHING, *SGD, *CLIPPED),
    "mixed-adamw": (*MIXED, *ADAMW, *CLIPPED),
    "tied-adamw": (*MIXED, *TIED, *ADAMW, *CLIPPED),
    "tied-recomputed": (*MIXED, *TIED, *ADAMW, *CLIPPED, "parallel.recompute_every=1"),
    "tied-datafree-sgd": (*DATAFREE, *TIED, *SGD, "optim.lr=0.02", *CLIPPED),
    "recomputed-datafree-sgd": (*DATAFREE, *SGD, "optim.lr=0.02", *CLIPPED, "parallel.recompute_every=2"),
    "datafree-sgd": (*DATAFREE, *SGD, "optim.lr=0.02", *CLIPPED),
    "tied-meanflow": (*MEANFLOW, *TIED, *ADAMW, *CLIPPED),
}
SAVED = "mixed-adamw"


def train_rank(rank: int, world_size: int, tp: int, data: Path, teacher: Path, out: Path) -> dict[str, Course]:
    from datetime import timedelta

    from piflow_dist.parallel.topology import Topology

    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timedelta(seconds=600))
    topology = Topology(rank, world_size, rank, torch.device("cpu"), tp)
    parallel = (f"launch.processes={world_size}", f"parallel.tp={tp}")
    trained = {}
    for name, options in SCENARIOS.items():
        micro = 4 // (world_size // tp) // (1 if world_size == 4 else 2)
        config = make_config((*options, *parallel, f"train.micro_batch_size={micro}"), data, teacher, out / name)
        config = dataclasses.replace(config, run_dir=str(out / f"saved_by_{world_size}"))
        trained[name] = train_steps(config, topology, save=name == SAVED and world_size in SAVERS)
    return trained | resume_on(topology, data, teacher, out)


def resume_rank(rank: int, world_size: int, data: Path, teacher: Path, out: Path) -> dict[str, Course]:
    from piflow_dist.parallel.topology import Topology

    return resume_on(Topology(rank, world_size, rank, torch.device("cpu")), data, teacher, out)


def resume_on(topology: Any, data: Path, teacher: Path, out: Path) -> dict[str, Course]:
    """Continue what other worlds have saved."""
    parallel = (f"launch.processes={topology.world_size}", f"parallel.tp={topology.tp}")
    resumed = {}
    for saver in SAVERS:
        folder = out / f"saved_by_{saver}"
        if folder.exists() and saver != topology.world_size:
            config = make_config((*SCENARIOS[SAVED], *parallel), data, teacher, folder)
            resumed[f"resumed from {saver}"] = train_steps(config, topology, from_checkpoint=True)
    return resumed


@pytest.fixture(scope="module")
def outcomes(
    tiny_data: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Course]]]:
    out = tmp_path_factory.mktemp("tensor_parallel")
    ranks = {
        name: run_ranks(train_rank, size, size, tp, tiny_data, teacher_run, out, time_limit=900)
        for name, (size, tp) in WORLDS.items()
    }
    ranks["one again"] = run_ranks(resume_rank, 1, 1, tiny_data, teacher_run, out, time_limit=900)
    return ranks


def joined(ranks: list[Course], tp: int, kind: str = "shards") -> dict[str, torch.Tensor]:
    """Whole parameters from all ranks' shards; replicated ones must be equal on all tensor-parallel ranks, to the bit."""
    slices = [whole(ranks[tp_rank::tp], kind) for tp_rank in range(tp)]
    weights: dict[str, torch.Tensor] = {}
    for name, split_dim in ranks[0].split_dims.items():
        parts = [part[name] for part in slices]
        if split_dim is None:
            assert all(torch.equal(part, parts[0]) for part in parts), name
        weights[name] = parts[0] if split_dim is None else torch.cat(parts, split_dim)
    return weights


def assert_same_training(found: list[Course], tp: int, want: Course, rtol: float = 1e-6) -> None:
    assert min(want.norms[2:]) > 1.5 * 0.05, want.norms  # clipping binds
    for course in found:
        assert_close(course.losses, want.losses, rtol=rtol, atol=0)
        assert_close(course.norms, want.norms, rtol=rtol, atol=0)
    for kind in ("shards", "ema"):
        weights, wanted = joined(found, tp, kind), joined([want], 1, kind)
        assert weights.keys() == wanted.keys()
        for name in wanted:
            assert_close(weights[name], wanted[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world", ["tp2", "dp2 x tp2"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_trains_like_one_process(outcomes: dict[str, Any], name: str, world: str) -> None:
    # A derivative magnifies what the order of sums rounds away: the time embedding's sinusoids turn 1000 radians.
    rtol = 1e-5 if name == "tied-meanflow" else 1e-6
    assert_same_training([rank[name] for rank in outcomes[world]], WORLDS[world][1], outcomes["one"][0][name], rtol)


@pytest.mark.parametrize(("world", "saver"), [("dp2 x tp2", 1), ("tp2", 1), ("tp2", 4), ("one again", 4)])
def test_resumes_what_another_world_saved(outcomes: dict[str, Any], world: str, saver: int) -> None:
    found, want = [rank[f"resumed from {saver}"] for rank in outcomes[world]], outcomes["one"][0][SAVED]
    for course in found:
        assert_close(course.losses, want.losses[-len(course.losses) :], rtol=1e-5, atol=0)
    weights, wanted = joined(found, WORLDS.get(world, (1, 1))[1]), joined([want], 1)
    assert all((weights[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)


@pytest.mark.parametrize(
    ("kept", "recomputed"), [("tied-adamw", "tied-recomputed"), ("datafree-sgd", "recomputed-datafree-sgd")]
)
def test_recomputed_activations_change_nothing(outcomes: dict[str, Any], kept: str, recomputed: str) -> None:
    assert_same_training([outcomes["one"][0][recomputed]], 1, outcomes["one"][0][kept])


def test_a_tied_model_trains_and_saves_adapters_and_head_alone(outcomes: dict[str, Any]) -> None:
    trained = joined([outcomes["one"][0]["tied-adamw"]], 1)
    assert all("lora_" in name or name.startswith(("norm_out.", "head.")) for name in trained)
    adapters = {name for name in trained if "lora_B" in name}
    # 2 MLP linears a stream and block but the last text MLP's, and the 2 of the timestep embedder.
    assert len(adapters) == 2 * 2 * 2 - 2 + 2
    assert all(trained[name].abs().max() > 1e-3 for name in adapters)  # B starts at zero


def test_the_plan_splits_what_is_large(outcomes: dict[str, Any]) -> None:
    one, two = (
        sum(shard.size for shard in outcomes[world][0]["teacher-sgd"].shards.values()) for world in ("one", "tp2")
    )
    assert two < 0.7 * one
