"""models/flux.py against diffusers' FluxTransformer2DModel on the same weights: outputs and all gradients."""

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.compat import repair_torchvision
from piflow_dist.config import ModelConfig, load_config
from piflow_dist.models.architecture import plan_model
from piflow_dist.models.flux import Flux, by_heads
from piflow_dist.models.heads import VelocityHead, pack, unpack

repair_torchvision()
from diffusers import FluxTransformer2DModel  # noqa: E402  (imports torchvision)

TEXT, POOLED = 40, 12


def pair(guidance: bool, dtype: torch.dtype) -> tuple[Flux, FluxTransformer2DModel]:
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=24, num_attention_heads=4,
        joint_attention_dim=TEXT, pooled_projection_dim=POOLED, guidance_embeds=guidance, axes_dims_rope=(8, 8, 8),
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name and parameter.dim() == 1 and "linear" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # norms start at one: a swapped pair would not show
    config = Flux.read_shape(dict(theirs.config))
    ours = Flux(config, VelocityHead(config.width, 16)).to(dtype)
    views = Flux.from_published(theirs.state_dict(), config, {})
    ours.load_state_dict({name: view[:] for name, view in views.items()})
    return ours, theirs


def run_theirs(theirs: FluxTransformer2DModel, x, sigma, text, guidance) -> torch.Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    places = [(0, i, j) for i in range(rows) for j in range(columns)]
    tokens = theirs(
        hidden_states=pack(x), encoder_hidden_states=text[:, 1:], pooled_projections=text[:, 0, :POOLED], timestep=sigma,
        img_ids=torch.tensor(places, dtype=x.dtype), txt_ids=torch.zeros(text.shape[1] - 1, 3, dtype=x.dtype),
        guidance=guidance, return_dict=False,
    )[0]  # fmt: skip
    return unpack(tokens, tuple(x.shape[-2:]), 1)[:, 0]


@pytest.mark.parametrize(
    ("dtype", "guided", "size", "tolerance"),
    [
        (
            torch.float64,
            True,
            (8, 8),
            1e-4,
        ),  # the published sinusoids of 1000 times the scale are float32 whatever the rest is
        (torch.float64, False, (6, 10), 1e-4),
        (torch.bfloat16, True, (4, 14), 0.03),  # one bf16 operation rounds to 0.4 %
    ],
)
def test_matches_diffusers(dtype: torch.dtype, guided: bool, size: tuple[int, int], tolerance: float) -> None:
    """Outputs and all gradients, each within `tolerance` of its own norm. The first row of the text is the pooled vector."""
    ours, theirs = pair(guided, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, *size, generator=generator).to(dtype)
    text = torch.randn(3, 6, TEXT, generator=generator).to(dtype)
    weight = torch.randn(3, 16, *size, generator=generator)
    sigma = torch.tensor([0.03, 0.5, 1.0])
    guidance = torch.tensor([1.0, 3.5, 7.0]) if guided else None
    found, want = {}, {}
    for model, results in ((ours, found), (theirs, want)):
        x_in, text_in = x.clone().requires_grad_(), text.clone().requires_grad_()
        if model is ours:
            out = ours(x_in, sigma, text_in, torch.zeros(3, 6, dtype=torch.bool), guidance)  # masks are not looked at
        else:
            out = run_theirs(theirs, x_in, sigma, text_in, guidance)
        (out.float() * weight).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results |= {"output": out.detach(), "x": x_in.grad, "text": text_in.grad, **gradients}
    assert found["output"].dtype == dtype
    gradients = Flux.from_published(want, Flux.read_shape(dict(theirs.config)), {})
    assert found.keys() == gradients.keys() and len(found) > 100
    for name, value in gradients.items():
        wanted = value[:]
        off = ((found[name].double() - wanted.double()).norm() / wanted.double().norm()).item()
        assert off < tolerance, f"{name}: off by {off:.2g}"


def test_the_published_model_is_flux1_dev() -> None:
    """Counted by diffusers' own class: 11,901,408,320 parameters, name by name and shape by shape."""
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(guidance_embeds=True)
    config = load_config(["model=flux1_dev", "data.root=x", "run_dir=x", "distill.teacher=x"]).model
    assert Flux.read_shape(dict(theirs.config)) == config
    ours = plan_model(config)
    found = {Flux.published_name(name): parameter.shape for name, parameter in ours.named_parameters()}
    assert found == {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_901_408_320


def test_columns_by_heads_are_one_range_for_each_tensor_parallel_rank() -> None:
    config = ModelConfig(
        architecture="flux", num_single_layers=1, num_attention_heads=4, attention_head_dim=6, axes_dims_rope=[2, 2, 2],
        joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    order, width = by_heads(config), 24
    assert_close(order.sort().values, torch.arange(5 * width))
    for rank, columns in enumerate(order.chunk(2)):
        attention, mlp = range(rank * 12, rank * 12 + 12), range(width + rank * 48, width + rank * 48 + 48)
        assert sorted(columns.tolist()) == [*attention, *mlp]
    value = torch.arange(2 * 5 * width).reshape(2, 5 * width)
    name = "single_transformer_blocks.0.proj_out.weight"
    ours = Flux.from_published({name: value}, config, {})[name]
    assert torch.equal(Flux.to_published(name, ours[:], config), value)
    assert torch.equal(ours[slice(1, 2), slice(60, 120)], value[1:2][:, order[60:]])
