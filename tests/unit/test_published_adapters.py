"""Adapters as third parties publish them: written here from the layout's description alone, and compared with diffusers and peft."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_diffusers_teacher
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.config import ConfigError
from piflow_dist.models.adapters import open_student, student_config, student_folder
from piflow_dist.models.heads import pack, unpack
from piflow_dist.models.pretrained import load_model

RANK, WIDTH, PACKED, K, N, INNER = 4, 32, 64, 3, 5, 24
LINEARS = {  # name: (inputs, outputs); the last block's text branch has none
    "time_text_embed.timestep_embedder.linear_1": (256, WIDTH),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "transformer_blocks.0.img_mlp.net.0.proj": (WIDTH, 4 * WIDTH),
    "transformer_blocks.0.img_mlp.net.2": (4 * WIDTH, WIDTH),
    "transformer_blocks.0.txt_mlp.net.0.proj": (WIDTH, 4 * WIDTH),
    "transformer_blocks.0.txt_mlp.net.2": (4 * WIDTH, WIDTH),
    "transformer_blocks.1.img_mlp.net.0.proj": (WIDTH, 4 * WIDTH),
    "transformer_blocks.1.img_mlp.net.2": (4 * WIDTH, WIDTH),
}
HEADS = {
    "GMFlow": {
        "proj_out_means": (WIDTH, K * PACKED),
        "proj_out_logweights": (WIDTH, K * 4),
        "proj_out_logstds.1": (WIDTH, INNER),
        "proj_out_logstds.3": (INNER, 1),
    },
    "DX": {"proj_out": (WIDTH, N * PACKED)},
}
SHAPE = {
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": [4, 6, 6],
}
CONFIGS = {
    "GMFlow": {
        "_class_name": "GMQwenImageTransformer2DModel",
        "_diffusers_version": "0.35.1",
        **SHAPE,
        "out_channels": 64,
        "num_gaussians": K,
        "constant_logstd": None,
        "logstd_inner_dim": INNER,
        "gm_num_logstd_layers": 2,
        "logweights_channels": 4,
    },
    "DX": {"_class_name": "DXQwenImageTransformer2DModel", **SHAPE, "patch_size": 1, "out_channels": N * 64},
}
POLICIES = {"GMFlow": {"type": "GMFlow"}, "DX": {"segment_size": 1 / 3.5, "shift": 3.2, "type": "DX"}}


def write_adapter(folder: Path, kind: str = "GMFlow", dtype: torch.dtype = torch.float32, prefix: str = "") -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, (inputs, outputs) in LINEARS.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) / RANK**0.5
    for name, (inputs, outputs) in {**HEADS[kind], "norm_out.linear": (WIDTH, 2 * WIDTH)}.items():
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"{name}.bias"] = torch.randn(outputs, generator=generator)
    folder.mkdir()
    tensors = {prefix + name: value.to(dtype) for name, value in tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"policy_config": json.dumps(POLICIES[kind])})
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict | None = None) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"policy_config": json.dumps(POLICIES["GMFlow"] if metadata is None else metadata)})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_teacher(tmp_path_factory.mktemp("base") / "pipeline")


def ours(folder: Path, base: Path) -> Callable[..., dict[str, Tensor]]:
    student = open_student(student_folder(str(folder)))
    config = student_config(student, str(base), "nowhere")
    return load_model(folder, config).eval()


def theirs(folder: Path, base: Path) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """diffusers' transformer with the adapter's own final norm, and the adapters put in by diffusers and peft."""
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(base / "transformer").eval()
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    model.norm_out.load_state_dict({"linear.weight": tensors["norm_out.linear.weight"], "linear.bias": tensors["norm_out.linear.bias"]})  # fmt: skip
    model.load_lora_adapter({name: value for name, value in tensors.items() if "lora" in name}, prefix=None)
    model.proj_out = torch.nn.Identity()
    return model, tensors


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x_BCHW": torch.randn(2, 16, 4, 6, generator=generator),
        "sigma_B": torch.tensor([0.2, 0.9]),
        "text_BLD": torch.randn(2, 3, 64, generator=generator),
        "mask_BL": torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(),
    }


def tokens_of(model: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
    return model(
        hidden_states=pack(given["x_BCHW"]), encoder_hidden_states=given["text_BLD"],
        encoder_hidden_states_mask=given["mask_BL"], timestep=given["sigma_B"],
        img_shapes=[[(1, 2, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip


def linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


@torch.no_grad()
def test_a_gm_adapter_is_the_mixture_that_diffusers_and_peft_compute(base: Path, tmp_path: Path) -> None:
    folder, given = write_adapter(tmp_path / "gm"), inputs()
    model, tensors = theirs(folder, base)
    embeddings: list[Tensor] = []
    model.time_text_embed.register_forward_hook(lambda module, given, temb: embeddings.append(temb))
    tokens = tokens_of(model, given)
    got = ours(folder, base)(**given)
    assert_close(got["means"], unpack(linear(tensors, "proj_out_means", tokens), (4, 6), K), rtol=1e-4, atol=1e-5)
    logits = unpack(linear(tensors, "proj_out_logweights", tokens), (4, 6), K)
    assert_close(got["logweights"], logits - logits.logsumexp(1, keepdim=True), rtol=1e-4, atol=1e-5)
    inner = linear(tensors, "proj_out_logstds.1", F.silu(embeddings[0]))
    assert_close(got["logstds"].flatten(), linear(tensors, "proj_out_logstds.3", F.silu(inner))[:, 0])


@torch.no_grad()
def test_a_dx_adapter_is_the_grid_that_diffusers_and_peft_compute(base: Path, tmp_path: Path) -> None:
    folder, given = write_adapter(tmp_path / "dx", "DX"), inputs()
    model, tensors = theirs(folder, base)
    want = unpack(linear(tensors, "proj_out", tokens_of(model, given)), (4, 6), N)
    assert_close(ours(folder, base)(**given)["out"], want, rtol=1e-4, atol=1e-5)
    student = open_student(folder)
    assert (student.policy.type, student.policy.mode, student.policy.num_nodes) == ("dx", "grid", N)
    assert (student.distill.nfe, student.schedule.shift) == (4, 3.2)


@torch.no_grad()
def test_prefixes_and_half_precision_are_read(base: Path, tmp_path: Path) -> None:
    plain = ours(write_adapter(tmp_path / "plain", dtype=torch.bfloat16), base)(**inputs())
    prefixed = ours(write_adapter(tmp_path / "prefixed", dtype=torch.bfloat16, prefix="transformer."), base)(**inputs())
    assert torch.equal(plain["means"], prefixed["means"])
    edit_tensors(
        tmp_path / "plain", lambda t: t.update({n.replace(".lora_A.", ".lora_A.default."): t.pop(n) for n in list(t)})
    )
    assert torch.equal(ours(tmp_path / "plain", base)(**inputs())["means"], prefixed["means"])


def test_a_polynomial_policy_and_diffusers_class_are_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "dx", "DX")
    edit_tensors(folder, lambda tensors: None, {"mode": "polynomial", "shift": 3.2, "type": "DX"})
    (folder / "config.json").write_text(json.dumps(CONFIGS["DX"] | {"_class_name": "QwenImageTransformer2DModel"}))
    student = open_student(student_folder(str(folder)))
    assert (student.policy.mode, student.policy.num_nodes, student.schedule.shift) == ("polynomial", N, 3.2)


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        open_student(folder)
    return str(error.value)


A, B = (f"transformer_blocks.0.img_mlp.net.2.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(B), ("missing", B)),
        (lambda t: t.pop("proj_out_logstds.3.bias"), ("missing: head.proj_out_logstds.3.bias",)),
        (lambda t: t.update({"transformer_blocks.0.img_mlp.net.2.alpha": torch.ones(1)}), ("unknown", "net.2.alpha")),
        (
            lambda t: t.update({A.replace(".0.", ".7.", 1): t[A].clone()}),
            ("transformer_blocks.7.img_mlp.net.2.lora_A",),
        ),
        (lambda t: t.update({A: t[A][:2].clone(), B: t[B][:, :2].clone()}), ("ranks 2", "and 4")),
        (lambda t: t.update({A: t[A][:, :7].clone()}), (f"{A} is (4, 7) instead of (4, 128)",)),
        (lambda t: t.update({"proj_out_means.bias": torch.ones(64)}), ("head.proj_out_means.bias is (64,)",)),
        (lambda t: [t.pop(name) for name in list(t) if "lora" in name], ("neither a transformer", "nor an adapter")),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Callable, words: tuple[str, ...]) -> None:
    folder = write_adapter(tmp_path / "bad")
    edit_tensors(folder, change)
    message = refused(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "GMSD3Transformer2DModel"}, ("GMSD3Transformer2DModel", "GMQwenImageTransformer2DModel")),
        ({"_class_name": "DXQwenImageTransformer2DModel"}, ("of type GMFlow", "a DXQwenImageTransformer2DModel")),
        ({"constant_logstd": -3.0}, ("constant_logstd=-3.0",)),
        ({"gm_num_logstd_layers": 1}, ("gm_num_logstd_layers=1",)),
        ({"logweights_channels": 1}, ("logweights_channels=1", "every latent pixel")),
        ({"out_channels": 128}, ("out_channels=128", "in_channels=64")),
        ({"num_gaussians": 4}, ("head.proj_out_means.weight is (192, 32) instead of (256, 32)",)),
        ({"num_layers": 1}, ("transformer_blocks.1.img_mlp.net.2.lora_A.weight",)),
        ({"num_attention_heads": None}, ("does not describe a transformer",)),
        ({"num_gaussians": "three"}, ("wrong type",)),
        ({"axes_dims_rope": [4, 6, 8]}, ("axes_dims_rope",)),
    ],
)
def test_configurations_that_do_not_fit_are_named(tmp_path: Path, changes: dict, words: tuple[str, ...]) -> None:
    folder = write_adapter(tmp_path / "bad")
    (folder / "config.json").write_text(json.dumps(CONFIGS["GMFlow"] | changes))
    message = refused(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"type": "Spline"}, ("policy of type 'Spline'", "GMFlow and DX")),
        ({"type": "GMFlow", "sharpness": 2}, ("not known: sharpness",)),
        ({"type": "GMFlow", "eps": 1e-6}, ("eps=1e-06",)),
        ({"shift": 3.2}, ("instead of JSON of the policy's arguments and its type",)),
    ],
)
def test_policies_that_are_not_known_are_named(tmp_path: Path, metadata: dict, words: tuple[str, ...]) -> None:
    folder = write_adapter(tmp_path / "bad")
    edit_tensors(folder, lambda tensors: None, metadata)
    message = refused(folder)
    assert all(word in message for word in words), message


def test_a_segment_of_no_whole_number_of_steps_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "bad", "DX")
    edit_tensors(folder, lambda tensors: None, {"segment_size": 0.3, "shift": 3.2, "type": "DX"})
    assert "segment_size=0.3" in refused(folder)


@pytest.mark.parametrize("value", [0, "a third"])
def test_values_of_wrong_types_are_refused(tmp_path: Path, value: object) -> None:
    folder = write_adapter(tmp_path / "bad", "DX")
    edit_tensors(folder, lambda tensors: None, {"segment_size": value, "shift": 3.2, "type": "DX"})
    assert "wrong type" in refused(folder)


def test_an_adapter_needs_its_base(tmp_path: Path) -> None:
    student = open_student(write_adapter(tmp_path / "gm"))
    with pytest.raises(ConfigError, match="base=PATH"):
        student_config(student, None, "nowhere")
