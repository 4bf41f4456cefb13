"""Tensor parallelism over four ranks of one head each: every gradient of the split model, then trainings. Slices for eight."""

import copy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import write_diffusers_teacher
from ranks import run_ranks
from test_tensor_parallel import assert_same_training
from test_zero import ADAMW, CLIPPED, DATAFREE, MIXED, SGD, TIED, Course, make_config, train_steps
from torch.testing import assert_close

from piflow_dist.config import load_config

SHAPE = {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": (4, 2, 2)}
MODEL = ("model.num_attention_heads=4", "model.attention_head_dim=8", "model.axes_dims_rope=[4,2,2]")
EVERY_LINEAR = (
    r"lora.targets=['transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)',"
    r"'transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)',"
    r"'transformer_blocks\.\d+\.(img|txt)_mod\.1','time_text_embed\.timestep_embedder\.linear_[12]','(img|txt)_in']"
)
SCENARIOS = {
    "tied-every-linear": (*MIXED, *TIED, *ADAMW, *CLIPPED, "parallel.recompute_every=1", EVERY_LINEAR),
    "full-datafree": (*DATAFREE, *SGD, "optim.lr=0.02", *CLIPPED),
}


@dataclass(frozen=True)
class Place:
    """As much of a process group as layers need to choose their slices."""

    tp: int
    tp_rank: int

    def size(self) -> int:
        return self.tp

    def rank(self) -> int:
        return self.tp_rank


def train_rank(rank: int, world_size: int, data: Path, teacher: Path, out: Path) -> dict[str, Course]:
    from piflow_dist.parallel.groups import start_groups
    from piflow_dist.parallel.topology import Topology

    if world_size == 4:
        start_groups(4, timedelta(seconds=600))
        compare_gradients(rank, data, teacher, out)
    else:
        cut_for_eight()
    topology = Topology(rank, world_size, rank, torch.device("cpu"), world_size)
    parallel = (f"launch.processes={world_size}", f"parallel.tp={world_size}")
    return {
        name: train_steps(make_config((*options, *MODEL, *parallel), data, teacher, out / name), topology)
        for name, options in SCENARIOS.items()
    }


def compare_gradients(rank: int, data: Path, teacher: Path, out: Path) -> None:
    """With and without adapters, masks and dropout on: outputs, and the gradients of both inputs and of all parameters."""
    from piflow_dist.models.pretrained import plan_training
    from piflow_dist.models.weights import fill
    from piflow_dist.parallel.groups import ParallelUnit
    from piflow_dist.parallel.tensor import split_layers
    from piflow_dist.parallel.topology import partition_dim

    config = make_config((*MIXED, *TIED, *MODEL, EVERY_LINEAR), data, teacher, out / "unused")
    whole, start = plan_training(config)
    fill(whole, start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in whole.parameters():  # adapters' B and norms start where a mistake would not show
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    whole.requires_grad_(True)
    split = copy.deepcopy(whole)
    split_layers(split, ParallelUnit().get_tensor_model_parallel_group())

    x_BCHW, text_BLD = torch.randn(2, 16, 4, 6, generator=generator), torch.randn(2, 3, 64, generator=generator)
    sigma_B, mask_BL = torch.tensor([0.9, 0.3]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    for adapted in (True, False):
        results = []
        for model in (whole, split):
            x, text = x_BCHW.clone().requires_grad_(), text_BLD.clone().requires_grad_()
            torch.manual_seed(1)
            model.zero_grad()
            output = model(x, sigma_B, text, mask_BL, adapted=adapted)
            output = output["means"] if adapted else output
            output.sin().sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            results.append({"output": output.detach(), "x": x.grad, "text": text.grad, **gradients})
        wanted, found = results
        assert found.keys() == wanted.keys()
        dims = {name: partition_dim(parameter) for name, parameter in split.named_parameters()}
        assert sum(dim is not None for dim in dims.values()) > 60
        for name, want in wanted.items():
            if want is None:
                assert found[name] is None, name
                continue
            if (dim := dims.get(name)) is not None:
                want = want.chunk(4, dim)[rank]
            size = want.abs().max().item()
            assert_close(
                found[name],
                want,
                rtol=1e-4,
                atol=1e-5 * size + 1e-7,
                msg=lambda text, about=f"{name}, {adapted=}": f"{about}: {text}",
            )


def cut_for_eight() -> None:
    """The eight ranks' slices of every parameter, put together, are the parameter; most of the model is split."""
    from piflow_dist.models.architecture import build_teacher
    from piflow_dist.models.lora import add_adapters
    from piflow_dist.parallel.tensor import split_layers
    from piflow_dist.parallel.topology import partition_dim

    eight = ("model.num_attention_heads=8", "model.attention_head_dim=6", "model.axes_dims_rope=[2,2,2]")
    config = load_config(
        [
            "model=qwen_image_tiny",
            *eight,
            "objective=flow_matching",
            "data.root=x",
            "run_dir=x",
            EVERY_LINEAR,
            "lora.rank=2",
        ]
    )
    whole = build_teacher(config.model, seed=0)
    add_adapters(whole, config.lora)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    ranks = []
    for tp_rank in range(8):
        split = copy.deepcopy(whole)
        split_layers(split, Place(8, tp_rank))
        ranks.append(dict(split.named_parameters()))
    for name, want in whole.named_parameters():
        dim = partition_dim(ranks[0][name])
        parts = [rank[name] for rank in ranks]
        assert all(part.requires_grad == want.requires_grad for part in parts), name
        if dim is None:
            assert all(torch.equal(part, want) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, dim), want), name
    held = sum(parameter.numel() for parameter in ranks[0].values())
    assert held < 0.3 * sum(parameter.numel() for parameter in whole.parameters())


@pytest.fixture(scope="module")
def outcomes(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Course]]]:
    out = tmp_path_factory.mktemp("four")
    teacher = write_diffusers_teacher(out / "teacher", **SHAPE)
    return {size: run_ranks(train_rank, size, size, tiny_data, teacher, out, time_limit=900) for size in (1, 4)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_four_ranks_train_like_one(outcomes: dict[int, list[dict[str, Course]]], name: str) -> None:
    # Rounding grows faster than on two: adapters of a small rank start with large A (standard deviation 1/rank).
    assert_same_training([rank[name] for rank in outcomes[4]], 4, outcomes[1][0][name], rtol=1e-5)
