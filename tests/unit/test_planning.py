"""The planner: known sizes, every experiment, what does not fit and what then does; clusters as configuration."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import load_tool, run_tool

from data_pipeline.description import load_description
from piflow_dist.config import CONFIG_DIR, Config, ConfigError, changed_keys, config_from, config_values, load_config
from piflow_dist.launch.plan_report import PlannedRun
from piflow_dist.models.architecture import plan_model
from piflow_dist.parallel import memory
from piflow_dist.parallel.dryrun import build_models, extrapolate, fake_world, rank_bytes, trace_depth, trace_step
from piflow_dist.parallel.memory import GIB, Plan, Planner, Shape, changed, data_shape, recomputed_share

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (CONFIG_DIR / "cluster").glob("*.yaml"))
SMALL = ("experiment=qwen_gmm", "model=qwen_image_300m", "train.batch_size=64")


def planned(*overrides: str, shape: Shape | None = None) -> Plan:
    config = load_config(list(overrides))
    return Planner(shape or Shape()).plan(config)


def share_of(*overrides: str, rank: int = 0) -> Any:
    config = load_config(list(overrides))
    with fake_world(config.launch.processes, rank, config.parallel.tp) as topology:
        return rank_bytes(config, build_models(config, topology), topology)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(list(overrides), PlannedRun)
    return str(error.value)


def test_the_published_model() -> None:
    """Qwen-Image has 20,430,401,088 parameters; a block is 648 MiB in bf16."""
    model = plan_model(load_config(["experiment=qwen_gmm"]).model)
    assert sum(p.numel() for p in model.parameters()) == 20_430_401_088
    block = 2 * sum(p.numel() for p in model.transformer_blocks[0].parameters())
    assert round(block / 2**20) == 648
    many = share_of("+cluster=a100x64", "experiment=qwen_gmm")
    adapters = 2 * 2 * 256 * (3072 + 4 * 3072) * 2
    assert 0.999 < many.gathered / (block + adapters) <= 1  # what is small is kept whole
    assert share_of("+cluster=h100x1", "experiment=qwen_gmm").gathered == 0  # one GPU shares out nothing


def test_adapters_of_the_published_student() -> None:
    """Rank 256 on both MLPs of 60 blocks (not the last text MLP) and two linears of the time embedder; head and norm."""
    D, R = 3072, 256
    mlp = R * (D + 4 * D) * 2
    adapters = mlp * (2 * 60 - 1) + R * (256 + D) + R * (D + D)
    head = (D + 1) * (8 * 64 + 8 * 4) + (D + 1) * 1024 + 1025
    norm = (D + 1) * 2 * D
    share = share_of("+cluster=a100x64", "experiment=qwen_gmm")
    assert share.trained_whole == adapters + head + norm
    assert (
        share_of("+cluster=a100x64", "experiment=qwen_gmm", "parallel.tp=8", rank=13).trained_whole
        == share.trained_whole
    )


def test_arithmetic_is_two_operations_a_weight_and_token() -> None:
    """And four per pair of tokens and channel for attention; the backward pass of all weights costs twice the forward."""
    config = load_config(
        [
            "+cluster=h100x1",
            "objective=flow_matching",
            "model=qwen_image_300m",
            "data.root=x",
            "run_dir=x",
            "train.batch_size=2",
        ]
    )
    D, layers, T, L, B = 768, 12, 64, 16, 2
    blocks = (T + L) * 12 * D * D + 2 * 6 * D * D  # a stream's own weights, and its modulation once an image
    rest = T * 64 * D + L * 1024 * D + T * 64 * D + 256 * D + D * D + 2 * D * D
    forward = 2 * B * (layers * blocks + rest) + 4 * B * layers * (T + L) ** 2 * D
    plan = Planner(Shape((16, 16), L)).plan(config)
    assert plan.flops["student forward"] == pytest.approx(forward, rel=1e-3)
    attention = 4 * B * layers * (T + L) ** 2 * D
    # Attention is formed once more in the backward pass. The first layers need no gradient of their input.
    assert plan.flops["backward"] == pytest.approx(2 * (forward - attention) + 2.5 * attention, rel=0.02)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_planned(name: str) -> None:
    overrides = ["+cluster=local", f"experiment={name}", "model.num_layers=3", "data.root=none"]
    plan = planned(*overrides, shape=Shape((8, 8), 6))
    assert plan.memory > 0 and plan.seconds > 0 and plan.checkpoint > 0
    assert sum(plan.components.values()) == plan.memory
    assert all(size >= 0 for size in plan.components.values())
    teacher = plan.flops.get("teacher", 0)
    assert (teacher > 0) == plan.config.distils


@pytest.mark.parametrize("options", [(), ("optim=muon",), ("optim.type=sgd",), ("parallel.offload_optimizer=true",)])
def test_optimizers_of_a_full_student(options: tuple[str, ...]) -> None:
    base = planned(
        "+cluster=local", *SMALL, "mode=full", "model.num_layers=3", "parallel.tp=1", *options, shape=Shape((8, 8), 6)
    )
    elements = base.share.trained_shard
    if "optim=muon" in options:
        assert 2 * elements < base.share.optimizer < 3 * elements  # bf16 momentum of the matrices, which are nearly all
    else:
        assert base.share.optimizer == (4 if "optim.type=sgd" in options else 8) * elements
    if "parallel.offload_optimizer=true" in options:
        assert "optimizer" not in base.components and base.host["in host memory"] > 0


def test_shallow_models_stand_for_a_deep_one() -> None:
    """Bytes, operations and messages of 60 blocks are a line through those of a few, exactly; two kinds of blocks, two lines."""
    qwen, flux = ("experiment=qwen_gmm", "model=qwen_image_300m"), ("experiment=flux_gmm", "model=flux_tiny")
    for experiment, *options in (
        (qwen, "parallel.recompute_every=0"),
        (qwen, "parallel.recompute_every=1"),
        (qwen, "parallel.recompute_every=2", "mode=full"),
        (flux, "parallel.recompute_every=1", "model.num_single_layers=12"),
        (flux, "parallel.recompute_every=2", "mode=full", "model.num_single_layers=12"),
    ):
        config = load_config(["+cluster=local", *experiment, "train.batch_size=64", "model.num_layers=9", *options])
        with fake_world(2, 1, 1) as topology:
            drawn = trace_step(config, topology, (16, 16), 8, 0)
            followed = trace_depth(config, {"num_layers": 9}, topology, (16, 16), 8, 0)
        assert drawn.kept == pytest.approx(followed.kept)
        assert drawn.flops == pytest.approx(followed.flops)
        assert {k: p.total for k, p in drawn.peaks.items()} == pytest.approx(
            {k: p.total for k, p in followed.peaks.items()}
        )
    assert extrapolate(followed, [(followed, 7.0)]).flops == followed.flops


def test_tensor_parallelism_shares_out_weights_activations_and_arithmetic() -> None:
    one, two = (planned("+cluster=local", *SMALL, f"parallel.tp={tp}", shape=Shape((16, 16), 8)) for tp in (1, 2))
    assert two.share.trained_slice < 0.7 * one.share.trained_slice
    # The group of two has the images of both: as much arithmetic, the small replicated layers twice.
    assert sum(two.flops.values()) == pytest.approx(sum(one.flops.values()), rel=0.05)
    D, tokens, images = 768, 64 + 8, 32
    each = 2 * tokens * images * D * 2  # attention and MLP of both streams, bf16
    found = {row.name: row.bytes for row in two.traffic}
    micro_batches = 64 // 2
    teacher = found["tensor-parallel all-reduce, teacher"]
    assert teacher == pytest.approx(
        micro_batches * 4 * 2 * 12 * each / images, rel=1e-6
    )  # two states, with and without prompt
    assert not any("tensor-parallel" in row.name for row in one.traffic)


def test_what_does_not_fit_is_told_what_would() -> None:
    """Images of 1024 x 1024 on small GPUs: more than one way out, each of which is planned again from its overrides."""
    tight = ("+cluster=h100x8", *SMALL, "model.num_layers=4", "train.micro_batch_size=8", "cluster.gpu_memory_gib=4.2")
    tight += ("parallel.recompute_every=0",)
    planner = Planner(Shape((64, 64), 64))
    config = load_config(list(tight))
    plan = planner.plan(config)
    assert not plan.fits and plan.memory > 4.2 * GIB
    suggestions = planner.suggestions(config)
    assert len(suggestions) > 1
    for overrides, promised in suggestions:
        again = planned(*tight, *overrides, shape=planner.shape)
        assert again.fits and again.memory == promised.memory
    times = [fitting.seconds for _, fitting in suggestions]
    assert times == sorted(times)


def test_where_nothing_helps_nothing_is_suggested() -> None:
    config = load_config(["+cluster=h100x1", *SMALL, "model.num_layers=3", "cluster.gpu_memory_gib=0.1"])
    assert Planner(Shape()).suggestions(config) == []


def test_changes_are_checked_as_a_whole() -> None:
    config = load_config(["+cluster=a100x8", "experiment=qwen_gmm"])
    assert changed(config, {"parallel.tp": 8, "train.micro_batch_size": 4, "mode": "full"}).mode == "full"
    with pytest.raises(ConfigError, match="does not divide"):
        changed(config, {"train.micro_batch_size": 5})
    assert [recomputed_share(changed(config, {"parallel.recompute_every": n})) for n in (0, 1, 7)] == [0, 1, 9 / 60]


def test_the_shape_of_images_comes_from_the_data_set(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["experiment=qwen_gmm", f"data.root={tiny_data}"])
    assert data_shape(config, None, None) == Shape((4, 4), 6)  # "a very large green ring" and the start token
    assert data_shape(config, (8, 16), 99) == Shape((8, 16), 99)
    assert data_shape(load_config(["experiment=qwen_gmm", "data.root=nowhere"]), None, None) == Shape((128, 128), 512)
    description = load_description(tiny_data)
    for encoder, length in (({"kind": "class_labels"}, 1), ({"kind": "t5_clip", "max_tokens": 256}, 257)):
        other = dataclasses.replace(description, prompt_encoder=encoder)
        monkeypatch.setattr(memory, "load_description", lambda root, other=other: other)
        assert data_shape(config, None, None) == Shape((4, 4), length)


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_loads_and_sets_the_world(name: str) -> None:
    config = load_config([f"+cluster={name}", "experiment=qwen_gmm"])
    assert config.launch.processes == config.cluster.nodes * config.cluster.gpus_per_node
    assert config.launch.device == config.cluster.device
    assert config_from(config_values(config)) == config
    assert "cluster" in changed_keys(load_config(["experiment=qwen_gmm"]), config)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("parallel.tp=16",), ("parallel.tp=16", "a node of 8 GPUs", "cluster.gpus_per_node", "smaller")),
        (("parallel.tp=3",), ("parallel.tp=3", "8 GPUs", "divisor")),
        (("model.num_attention_heads=20", "parallel.tp=8"), ("parallel.tp=8", "20 attention heads")),
        (("cluster.nodes=0",), ("cluster.nodes=0", "greater than zero")),
        (("cluster.achieved_share=1.5",), ("cluster.achieved_share=1.5", "(0, 1]")),
        (("cluster.device=gpu",), ("cluster.device=gpu", "cuda, cpu")),
        (("cluster.partition=a",), ("partition",)),
        (("train.batch_size=100",), ("train.batch_size=100", "multiple of 64")),
        (("plan.latent=[3,4]",), ("plan.latent=[3, 4]", "even")),
        (("plan.text_length=0",), ("plan.text_length=0",)),
        (("plan.rank=64",), ("plan.rank=64", "0 to 63")),
    ],
)
def test_clusters_that_cannot_work(overrides: tuple[str, ...], said: tuple[str, ...]) -> None:
    message = refused("+cluster=a100x64", "experiment=qwen_gmm", *overrides)
    assert all(word in message for word in said), message


def test_a_plan_without_a_cluster_is_refused(refused_by: Callable) -> None:
    message = refused_by("plan")("experiment=qwen_gmm")
    assert "+cluster=NAME" in message and "a100x64" in message
    assert "Leave cluster away" in refused_by("plan")("experiment=qwen_gmm", "+cluster=a100x8", "plan.table=true")


def test_the_tool(capsys: pytest.CaptureFixture) -> None:
    plan = load_tool("plan").plan
    common = ["+cluster=local", *SMALL, "plan.latent=[8,8]", "plan.text_length=6", "model.num_layers=3"]
    plan([*common, "plan.json=true"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["gpu_bytes"] == sum(found["components"].values())
    plan(common)
    text = capsys.readouterr().out
    assert all(word in text for word in ("all-gather", "per checkpoint", "Host memory", "Fits"))
    plan([*common, "cluster.gpu_memory_gib=0.1"])
    assert "Does not fit" in capsys.readouterr().out
    plan([*common, "parallel.tp=2", "plan.rank=1"])
    assert "tensor-parallel rank 1 of 2" in capsys.readouterr().out


def test_a_dry_run_shows_the_plan(tmp_path: Path, tiny_data: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    run = ("objective=flow_matching", "model=qwen_image_tiny", f"data.root={tiny_data}", "train.batch_size=32", run_dir)
    done = run_tool("launch", "+cluster=local_slurm", *run, "launch.dry_run=true")
    assert done.returncode == 0, done.stdout
    assert "would be submitted" in done.stdout and "Memory per GPU" in done.stdout


def test_a_rank_is_like_the_others() -> None:
    shares = [share_of("+cluster=a100x64", *SMALL, "parallel.tp=2", rank=rank) for rank in (0, 17, 63)]
    assert shares[0] == shares[1] == shares[2]


def test_configurations_compare_without_clusters() -> None:
    assert isinstance(load_config(["experiment=qwen_gmm"]), Config)
    assert load_config(["experiment=qwen_gmm"]).cluster is None


def test_meanflows_derivative_costs_two_to_three_forward_passes() -> None:
    """Linear layers twice (value and derivative), products inside attention three times; attention S x S takes its memory."""
    plan = planned(
        "+cluster=h100x1", "experiment=qwen_gmm", "policy=mean", "objective=meanflow", "model=qwen_image_300m", "train.batch_size=2",
        shape=Shape((32, 32), 64),
    )  # fmt: skip
    ratio = plan.flops["derivative"] / plan.flops["student forward"]
    assert 2 < ratio < 3, ratio
    B, N, S = 2, 8, 16 * 16 + 64
    assert plan.phases["derivative"] - plan.phases["teacher"] > 2 * (
        2 * B * N * S * S
    )  # scores and their derivative, bf16
