"""Whole trainings against a plain one that shares neither model, adapters, policy nor engine: benchmarks/plain.py.

diffusers' transformer, peft's adapters, torch's optimisers, the policy's textbook form, one teacher state at a time.
"""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import REPO, TINY
from ranks import run_ranks
from torch.testing import assert_close

from piflow_dist.config import load_config

sys.path.append(str(REPO / "benchmarks"))
from meter import Arithmetic, Meter  # noqa: E402

STEPS = 4
COMMON = (
    *TINY,
    "bench.size=32",
    "bench.text_length=6",
    "train.batch_size=3",
    "policy.logstd_inner_dim=16",
    "distill.guidance.scale=2.0",
    "optim.clip=0.05",
    "optim.clip_from_step=1",
)
TIED = ("mode=tied", "lora.rank=4", "lora.alpha=8", "lora.dropout=0")
SGD = ("optim.type=sgd", "optim.lr=1.0")
ADAMW = ("optim.type=adamw", "optim.lr=0.01", "optim.eps=1e-3", "optim.weight_decay=0.1")
SCENARIOS = {
    "tied": (*TIED, *SGD, "parallel.recompute_every=1"),
    "tied, mixed": (*TIED, *ADAMW, "distill.num_decay_iters=3", "distill.num_intermediate_states=3"),
    "full, from noise": (*ADAMW, "objective=imitation_datafree"),
    "full, dx": (*SGD, "policy.type=dx", "policy.num_nodes=4"),
    "tied, polynomial, from noise": (*TIED, *SGD, "objective=imitation_datafree", "policy.type=dx", "policy.mode=polynomial"),
}  # fmt: skip


@dataclass
class Both:
    """What the two trainings did. moved, off: largest change of each parameter in the plain one, and ours from it."""

    ours: list[float]
    plain: list[float]
    moved: dict[str, float]
    off: dict[str, float]


def train_both(rank: int) -> dict[str, Both]:
    from step import DEFAULTS, OurStep, Plain, StepBenchmark

    from piflow_dist.models.lora import InitialAdapters
    from piflow_dist.parallel.topology import Topology

    topology, found = Topology(0, 1, 0, torch.device("cpu")), {}
    for name, options in SCENARIOS.items():
        config = load_config([*DEFAULTS, *COMMON, "run_dir=x", *options], StepBenchmark)
        meter = Meter(topology.device)
        ours = OurStep(config, topology, meter)
        plain = Plain(config, topology, meter, ours)
        plain.plain.policy_dtype = torch.float64
        adapters = InitialAdapters(plain_names(plain.plain.model), config.train.seed)
        with torch.no_grad():
            for key, parameter in plain.plain.model.named_parameters():
                if ".lora_A." in key:
                    parameter.copy_(adapters.view(key.replace(".default.", ".")))
        start = {key: p.detach().clone() for key, p in trained(plain.plain).items()}
        losses = [ours.step() for _ in range(STEPS)], [plain.step() for _ in range(STEPS)]
        masters = ours.model.named(ours.model.masters)
        assert masters.keys() == start.keys(), masters.keys() ^ start.keys()
        moved, off = {}, {}
        for key, parameter in trained(plain.plain).items():
            moved[key] = (parameter - start[key]).abs().max().item()
            off[key] = (parameter.detach().flatten() - masters[key]).abs().max().item()
        found[name] = Both(*losses, moved, off)
    return found


def trained(plain: Any) -> dict[str, torch.Tensor]:
    """The plain step's trained parameters, under our names."""
    places = {"": plain.model, "norm_out.": plain.student_output[0], "head.": plain.head}
    names = {
        parameter: (prefix + name).replace(".default.", ".").replace("logstds_", "logstds.")
        for prefix, module in places.items()
        for name, parameter in module.named_parameters()
    }
    return {names[parameter]: parameter for parameter in plain.parameters}


def plain_names(model: torch.nn.Module) -> torch.nn.Module:
    """Something with the parameters of peft's adapters under our names."""

    class Named(torch.nn.Module):
        def named_parameters(self, *args: object, **kwargs: object):
            return ((name.replace(".default.", "."), p) for name, p in model.named_parameters())

    return Named()


@pytest.fixture(scope="module")
def trainings() -> dict[str, Both]:
    return run_ranks(train_both, 1, time_limit=600)[0]


@pytest.mark.parametrize("name", SCENARIOS)
def test_trains_like_a_plain_training(trainings: dict[str, Both], name: str) -> None:
    """The first loss shows forward and policy; gradients, clipping and updates show in the weights."""
    both = trainings[name]
    assert_close(both.ours, both.plain, rtol=2e-5, atol=0)
    for key, moved in both.moved.items():
        assert both.off[key] < 0.005 * moved + 3e-7, f"{key} moved by {moved:.2e}, and is {both.off[key]:.2e} off"
    adapters = [moved for key, moved in both.moved.items() if "lora_B" in key]
    assert min(adapters, default=1) > 2e-6, sorted(adapters)[:3]
    assert bool(adapters) == name.startswith("tied")


@pytest.mark.parametrize("mode", ["tied", "full"])
@pytest.mark.parametrize("policy", ["gmflow", "dx"])
def test_arithmetic_is_what_torch_counts(mode: str, policy: str) -> None:
    """Forward and backward, but what the model computes of the last block's text and nothing reads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from piflow_dist.models.architecture import plan_model, plan_tied
    from piflow_dist.models.weights import TensorWeights, fill

    options = (
        "model.attention_head_dim=64",
        "model.axes_dims_rope=[16,24,24]",
        "lora.rank=8",
        f"mode={mode}",
        f"policy.type={policy}",
    )
    config = load_config(
        [*TINY, "data.root=x", "run_dir=x", "distill.teacher=x", "policy.logstd_inner_dim=8", *options]
    )
    shapes = {name: torch.zeros(p.shape) for name, p in plan_model(config.model).named_parameters()}
    if mode == "tied":
        model, start = plan_tied(config.model, config.policy, config.lora, TensorWeights(shapes, "zeros"), 0)
    else:
        model = plan_model(config.model, config.policy)
        start = TensorWeights({name: torch.zeros(p.shape) for name, p in model.named_parameters()}, "zeros")
    fill(model, start)
    B, L, side = 2, 24, 16
    x = torch.randn(B, 16, side, side, requires_grad=True)
    inputs = x, torch.rand(B), torch.randn(B, L, 64, requires_grad=True), None
    count = Arithmetic.of(config, (side // 2) ** 2, L)
    unread = 2 * L * 9 * config.model.width**2
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        with FlopCounterMode(display=False) as forward:
            output = model(*inputs)
        with FlopCounterMode(display=False) as backward:
            sum(value.float().sum() for value in output.values()).backward()
        with torch.no_grad(), FlopCounterMode(display=False) as teacher:
            model(*inputs, adapted=False)
    assert forward.get_total_flops() == pytest.approx(B * (count.forward + unread), rel=0.005)
    assert backward.get_total_flops() == pytest.approx(B * count.backward(mode == "tied"), rel=0.03)
    if mode == "tied":
        assert teacher.get_total_flops() == pytest.approx(B * (count.teacher + unread), rel=0.02)
