"""models/dit.py against SiT in plain float64 tensor operations, and against diffusers' DiT: outputs and all gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from data_pipeline.compat import repair_torchvision
from numerics.plain_sit import plain_sit, random_sit
from piflow_dist.config import ConfigError, ModelConfig, PolicyConfig, load_config
from piflow_dist.models.architecture import build_student, plan_model
from piflow_dist.models.dit import DiT
from piflow_dist.models.heads import VelocityHead
from piflow_dist.models.pretrained import DiffusersWeights, read_diffusers_config
from piflow_dist.models.published import read_model

WIDTH, HEADS, CHANNELS, CLASSES = 24, 2, 4, 5
SHAPE = {
    "num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "in_channels": CHANNELS,
    "num_embeds_ada_norm": CLASSES,
}  # fmt: skip
LABELS = [0, 4, CLASSES]  # the last one: no class


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, CHANNELS, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, CHANNELS, *size, generator=generator, dtype=torch.float64)
    onehot = torch.eye(CLASSES + 1, dtype=torch.float64)[LABELS][:, None]
    return x, torch.tensor([0.03, 0.5, 1.0], dtype=torch.float64), onehot, weight


def write_checkpoint(folder: Path, kind: str, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **SHAPE}))
    return folder


def load(folder: Path) -> DiT:
    model, weights = plan_model(read_diffusers_config(folder)).to_empty(device="cpu").double(), DiffusersWeights(folder)
    model.load_state_dict({name: weights.view(name)[:] for name in weights.shapes()})
    return model


@pytest.mark.parametrize("kind", ["REPA", "SiT"])
@pytest.mark.parametrize("outputs", [CHANNELS, 2 * CHANNELS])
def test_sit_checkpoints_predict_the_same_velocity(tmp_path: Path, kind: str, outputs: int) -> None:
    """REPA's network is asked at t = sigma for eps - x_0; SiT's own at t = 1 - sigma for x_0 - eps, of which we want the opposite.

    outputs: learn_sigma checkpoints predict twice the channels, of which the first half is the velocity.
    """
    weights = {name: value.float().double() for name, value in random_sit(WIDTH, 2, CHANNELS, CLASSES, outputs).items()}
    extra = {"projectors.0.0.weight": torch.ones(3, WIDTH)} if kind == "REPA" else {}
    model = load(write_checkpoint(tmp_path / kind, kind, {**weights, **extra}))
    x, sigma, onehot, weight = inputs()
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = model(x_ours, sigma, onehot, None)
    sign, time = (-1, 1 - sigma) if kind == "SiT" else (1, sigma)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items() if name != "pos_embed"}
    want = sign * plain_sit(leaves, x_theirs, time, LABELS, HEADS)[:, :CHANNELS]
    assert_close(found, want, rtol=1e-5, atol=1e-5)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    pairs = {
        "pos_embed.proj.weight": leaves["x_embedder.proj.weight"].grad.flatten(1),
        "emb.timestep_embedder.linear_2.weight": leaves["t_embedder.mlp.2.weight"].grad,
        "emb.class_embedder.embedding_table.weight": leaves["y_embedder.embedding_table.weight"].grad,
        "norm_out.linear.weight": leaves["final_layer.adaLN_modulation.1.weight"].grad,
    }
    for index in range(2):
        block = f"transformer_blocks.{index}"
        qkv = leaves[f"blocks.{index}.attn.qkv.weight"].grad.chunk(3)
        pairs |= {f"{block}.attn1.to_{part}.weight": grad for part, grad in zip("qkv", qkv, strict=True)}
        pairs |= {
            f"{block}.attn1.to_out.0.bias": leaves[f"blocks.{index}.attn.proj.bias"].grad,
            f"{block}.ff.net.0.proj.weight": leaves[f"blocks.{index}.mlp.fc1.weight"].grad,
            f"{block}.ff.net.2.weight": leaves[f"blocks.{index}.mlp.fc2.weight"].grad,
            f"{block}.norm1.linear.weight": leaves[f"blocks.{index}.adaLN_modulation.1.weight"].grad,
        }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, want in pairs.items():
        off = ((gradients[name] - want).norm() / want.norm()).item()
        assert off < 1e-4, f"{name}: off by {off:.2g}"


@pytest.mark.parametrize("norm_eps", [1e-6, 0.1])
def test_matches_diffusers_dit(norm_eps: float) -> None:
    """diffusers' class has an embedder in every block, of which all but the first norm's are copies, and other frequencies."""
    repair_torchvision()
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(**SHAPE, sample_size=8, norm_eps=norm_eps).double().eval()
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb = first
    first.time_proj.downscale_freq_shift = 0
    config = ModelConfig(
        architecture="dit", num_layers=2, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, latent_channels=4,
        joint_attention_dim=CLASSES + 1, axes_dims_rope=[], time_scale=1000.0, norm_eps=norm_eps,
    )  # fmt: skip
    state = {name.replace("transformer_blocks.0.norm1.emb", "emb"): value for name, value in theirs.named_parameters()}
    views = DiT.from_published(state, config, {})
    ours = DiT(config, VelocityHead(WIDTH, 4, channels_last=True)).double()
    ours.load_state_dict({name: view[:] for name, view in views.items()})
    x, sigma, onehot, _ = inputs()
    want = theirs(x, timestep=1000 * sigma, class_labels=torch.tensor(LABELS), return_dict=False)[0]
    assert_close(ours(x, sigma, onehot, None), want, rtol=1e-5, atol=1e-6)
    back = {DiT.published_name(n): DiT.to_published(n, v, config) for n, v in ours.state_dict().items()}
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("kind", "says", "norm_eps"),
    [
        ("REPA", {}, 1e-6),
        ("SiT", {}, 1e-6),
        ("DiTTransformer2DModelMod", {}, 1e-5),
        ("GMDiTTransformer2DModelV2", {}, 1e-5),
        ("DiTTransformer2DModelMod", {"norm_eps": 1e-6}, 1e-6),
    ],
)
def test_norm_eps_is_that_of_the_checkpoint(tmp_path: Path, kind: str, says: dict, norm_eps: float) -> None:
    """As diffusers' class has it, and LakonLab's: 1e-5 where its config.json does not say it."""
    found = {"_class_name": kind, **SHAPE, **says}
    config = read_model(tmp_path / "config.json", found)
    assert config.norm_eps == DiT.shape_json(config)["norm_eps"] == norm_eps


def test_dit_xl_has_the_published_size() -> None:
    """675,129,632 with the fixed positions and the variance channels that DiT's own checkpoint has."""
    config = load_config(["model=dit_xl", "data.root=x", "run_dir=x", "distill.teacher=x"]).model
    ours = sum(parameter.numel() for parameter in plan_model(config).parameters())
    assert ours + 16 * 16 * 1152 + 16 * (1152 + 1) == 675_129_632


def test_an_untrained_student_is_its_teacher_in_every_component(tmp_path: Path) -> None:
    weights = {name: value.float() for name, value in random_sit(WIDTH, 2, CHANNELS, CLASSES, CHANNELS).items()}
    folder = write_checkpoint(tmp_path / "REPA", "REPA", weights)
    config, teacher = read_diffusers_config(folder), load(folder).float()
    x, sigma, onehot, _ = (value.float() for value in inputs((6, 10)))
    u = teacher(x, sigma, onehot, None)
    student = build_student(teacher, config, PolicyConfig(type="dx", num_nodes=3), seed=0)
    assert_close(student(x, sigma, onehot, None)["out"], u[:, None].expand(-1, 3, -1, -1, -1))
    student = build_student(teacher, config, PolicyConfig(num_components=4, logstd_inner_dim=8), seed=0)
    out = student(x, sigma, onehot, None)
    apart = out["means"] - u[:, None]  # one number a component and channel, of a standard deviation of 0.05
    assert_close(apart, apart[:1, ..., :1, :1].expand_as(apart), rtol=0, atol=1e-5)
    assert 0.03 < apart.std() < 0.07 and apart[0].std(dim=0).min() > 1e-3
    assert out["logweights"].shape == (3, 4, 1, 6, 10)


def test_learnt_positions_are_refused(tmp_path: Path) -> None:
    weights = random_sit(WIDTH, 2, CHANNELS, CLASSES, CHANNELS)
    weights["pos_embed"] = weights["pos_embed"] + 0.01
    with pytest.raises(ConfigError, match="is not the fixed embedding"):
        DiffusersWeights(write_checkpoint(tmp_path / "SiT", "SiT", weights))
