"""Adapters: the published targets, targets that cannot work, and a tied student before its first step."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_diffusers_teacher
from torch.testing import assert_close

from piflow_dist.config import Config, ConfigError, LoraConfig, load_config
from piflow_dist.models.architecture import plan_model
from piflow_dist.models.lora import LoraLinear, MergedWeights, add_adapters
from piflow_dist.models.pretrained import plan_training
from piflow_dist.models.qwen_image import QwenImage
from piflow_dist.models.weights import TensorWeights, fill

B, L = 3, 5


def tied_config(teacher: Path, *overrides: str) -> Config:
    options = ("mode=tied", "data.root=x", "run_dir=x", "lora.rank=4", "policy.type=dx", "policy.num_nodes=3")
    return load_config([*TINY, *options, f"distill.teacher={teacher}", *overrides])


def tied_model(config: Config) -> QwenImage:
    model, start = plan_training(config)
    fill(model, start)
    return model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_teacher(tmp_path_factory.mktemp("base"))


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(B, 16, 4, 6, generator=generator)
    mask_BL = torch.tensor([[True] * L, [True] * 3 + [False] * 2, [True] + [False] * (L - 1)])
    return x_BCHW, torch.tensor([1.0, 0.6, 0.05]), torch.randn(B, L, 64, generator=generator), mask_BL


def test_the_published_targets_of_the_published_model() -> None:
    """Both MLPs of 60 blocks but the last text one, and the timestep embedder: 240 linear layers of rank 256."""
    model = plan_model(load_config(["objective=flow_matching", "data.root=x", "run_dir=x"]).model)
    add_adapters(model, LoraConfig())
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    wanted = {
        f"transformer_blocks.{block}.{stream}_mlp.net.{layer}"
        for block in range(60)
        for stream in ("img", "txt")
        for layer in ("0.proj", "2")
        if (block, stream) != (59, "txt")
    } | {f"time_text_embed.timestep_embedder.linear_{index}" for index in (1, 2)}
    assert found == wanted and len(wanted) == 240
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in trained)
    mlp, embedder = 256 * (3072 + 12288), 256 * (256 + 3072 + 3072 + 3072)
    assert sum(trained.values()) == 238 * mlp + embedder


@torch.no_grad()
def test_a_fresh_tied_student_is_its_teacher(teacher: Path, inputs: tuple[torch.Tensor, ...]) -> None:
    """With a grid DX head: every node is the teacher's velocity, to the bit of the head's arithmetic."""
    model = tied_model(tied_config(teacher)).eval()
    want_BCHW = model(*inputs, adapted=False)
    assert want_BCHW.std() > 0.1
    for node_BCHW in model(*inputs)["out"].unbind(1):
        assert_close(node_BCHW, want_BCHW, rtol=0, atol=1e-6)


@torch.no_grad()
def test_training_leaves_the_teacher_as_it_was(teacher: Path, inputs: tuple[torch.Tensor, ...]) -> None:
    """Whatever is trained, the pass without adapters does not read it."""
    model = tied_model(tied_config(teacher)).eval()
    teacher_BCHW, student = model(*inputs, adapted=False), model(*inputs)["out"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    assert torch.equal(model(*inputs, adapted=False), teacher_BCHW)
    assert (model(*inputs)["out"] - student).abs().max() > 0.1


def test_adapters_are_the_published_formula() -> None:
    """y = W x + b + alpha/rank B A x, and dropout acts on the adapter's input alone, with its mean kept."""
    torch.manual_seed(0)
    base, x = torch.nn.Linear(12, 7), torch.randn(5, 12)
    layer = LoraLinear(base, LoraConfig(rank=3, alpha=6, dropout=0.5))
    torch.nn.init.normal_(layer.lora_B.weight)
    want = x @ base.weight.T + base.bias + 2 * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    assert_close(layer.eval()(x, True), want)
    assert_close(layer(x, False), base(x))
    layer.train()
    assert torch.equal(layer(x, False), base(x))
    with torch.no_grad():
        off = torch.stack([layer(x, True) for _ in range(4000)]) - want
    assert off.std() > 0.5 and off.mean(0).abs().max() < 6 * (off.std(0) / 4000**0.5).max()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (r"blocks\.\d+\.mlp", "matches no linear layer of the model"),
        (r"transformer_blocks\.\d+\.img_mlp", "It matches transformer_blocks.0.img_mlp, which is no linear layer"),
        (r"transformer_blocks\.\d+\.attn\.to_q", "or has an adapter"),
        (r"norm_out\.linear", "matches norm_out.linear, which is trained in full"),
        (
            r"transformer_blocks\.1\.txt_mlp\.net\.2",
            "transformer_blocks.1.txt_mlp.net.2 alone, which no output depends on",
        ),
    ],
)
def test_targets_that_cannot_be_adapted(target: str, said: str, teacher: Path) -> None:
    config = LoraConfig(targets=[r"transformer_blocks\.\d+\.attn\.to_q", target])
    with pytest.raises(ConfigError) as error:
        add_adapters(plan_model(tied_config(teacher).model), config)
    assert "lora.targets" in str(error.value) and repr(target) in str(error.value) and said in str(error.value)


def test_the_launcher_refuses_targets_that_match_nothing(
    refused_by: Callable[..., Callable[..., str]], teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Before a process starts."""
    message = refused_by("launch")(
        *TINY, "mode=tied", r"lora.targets=['transformer_blocks\.\d+\.mlp']", "train.batch_size=4",
        f"data.root={tiny_data}", f"distill.teacher={teacher}", f"run_dir={tmp_path}",
    )  # fmt: skip
    assert "lora.targets" in message and "matches no linear layer" in message and "Traceback" not in message


def test_a_merged_weight_is_the_same_whoever_reads_which_part() -> None:
    generator = torch.Generator().manual_seed(0)
    base, up, down = (torch.randn(*shape, generator=generator) for shape in ((700, 48), (700, 6), (6, 48)))
    trained = {
        "up.lora_A.weight": down,
        "up.lora_B.weight": up,
        "norm_out.weight": torch.ones(1),
        "head.x": torch.ones(2),
    }
    below = {
        "up.weight": base.bfloat16(),
        "norm_out.weight": torch.zeros(1),
        "head.weight": torch.zeros(3),
        "in.weight": torch.zeros(4),
    }
    merged = MergedWeights(TensorWeights(trained, "trained"), TensorWeights(below, "base"), 0.5)
    assert merged.shapes() == {"up.weight": (700, 48), "norm_out.weight": (1,), "head.x": (2,), "in.weight": (4,)}
    assert merged.view("norm_out.weight") == 1 and len(merged.view("in.weight")) == 4
    whole = merged.view("up.weight")[:]
    want = base.bfloat16().double() + 0.5 * up.double() @ down.double()
    assert_close(whole.double(), want, rtol=1e-6, atol=1e-6)
    for first, last in ((0, 1), (3, 260), (255, 257), (512, 700), (699, 700)):
        assert torch.equal(merged.view("up.weight")[first:last], whole[first:last])
    assert_close(merged.view("up.weight")[10:20, 24:48], whole[10:20, 24:48])
    assert torch.equal(below["up.weight"], base.bfloat16())
