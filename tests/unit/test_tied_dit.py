"""A tied DiT: teacher and student on one trunk, and its adapter written, read again and merged, to the same velocities."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.checkpoint.files import FORMAT, MANIFEST, STATE, file_digest, shard_name
from piflow_dist.config import Config, config_values, load_config
from piflow_dist.models.adapters import open_student, student_config
from piflow_dist.models.architecture import plan_model
from piflow_dist.models.dit import DiT
from piflow_dist.models.pretrained import load_model, open_teacher, plan_training, read_diffusers_config
from piflow_dist.models.published import model_json
from piflow_dist.models.weights import fill

TARGETS = (
    r"lora.targets=['transformer_blocks\.\d+\.(ff\.net\.(0\.proj|2)|attn1\.(to_[qkv]|to_out\.0)|norm1\.linear)',"
    r"'emb\.timestep_embedder\.linear_[12]','pos_embed\.proj']"
)
ADAPTED = 2 * 7 + 2 + 1
"""Layers: seven in each of two blocks, the embedder's two, the patches'."""
POLICIES = {
    "gm": ("policy.num_components=3", "policy.logstd_inner_dim=16"),
    "dx": ("policy.type=dx", "policy.num_nodes=3", "policy.mode=polynomial"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder with the published names. norm_eps and time_scale are not the usual ones."""
    folder = tmp_path_factory.mktemp("base")
    config = load_config(["model=dit_tiny", "model.norm_eps=0.01", "model.time_scale=100", "objective=flow_matching",
                          "run_dir=x", "data.root=x"]).model  # fmt: skip
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, parameter in plan_model(config).named_parameters():
        value = 0.2 * torch.randn(parameter.shape, generator=generator)
        tensors[DiT.published_name(name)] = DiT.to_published(name, value, config).contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(model_json(config, None)))
    return folder


def inputs() -> tuple[Tensor, ...]:
    """A batch with two classes and none."""
    onehot_BLD = torch.eye(11)[[0, 4, 10]][:, None]
    return (
        torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(1)),
        torch.tensor([1.0, 0.6, 0.05]),
        onehot_BLD,
        None,
    )


def trained(base: Path, policy: str) -> tuple[Config, DiT]:
    """A tied student, none of whose trained parameters is as it began."""
    options = ("mode=tied", "lora.rank=2", "lora.alpha=6", "model.norm_eps=0.01", "model.time_scale=100", TARGETS)
    config = load_config(
        ["model=dit_tiny", *options, *POLICIES[policy], f"distill.teacher={base}", "run_dir=x", "data.root=x"]
    )
    model, start = plan_training(config)
    fill(model, start)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return config, model.eval()


def write_checkpoint(folder: Path, config: Config, model: DiT) -> Path:
    """As one process saves it, its averaged weights alone."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file({f"ema/{name}": value.flatten() for name, value in values.items()}, folder / shard_name(0))
    state = {
        "step": 1, "dp_size": 1, "tp": 1, "config": config_values(config), "teacher": open_teacher(config).fingerprint(),
        "parameters": {name: {"shape": list(value.shape), "split_dim": None} for name, value in values.items()},
    }  # fmt: skip
    (folder / STATE).write_text(json.dumps(state))
    files = {name: file_digest(folder / name) for name in (STATE, shard_name(0))}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))
    return folder


@torch.no_grad()
def test_the_pass_without_adapters_is_the_teachers(base: Path) -> None:
    config, model = trained(base, "gm")
    teacher = plan_model(read_diffusers_config(base))
    fill(teacher, open_teacher(config))
    want_BCHW = teacher(*inputs())
    assert torch.equal(model(*inputs(), adapted=False), want_BCHW)
    assert (model(*inputs())["means"].mean(1) - want_BCHW).abs().max() > 0.1


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_the_exported_adapter_and_the_merged_student_predict_the_same(base: Path, tmp_path: Path, policy: str) -> None:
    config, model = trained(base, policy)
    (tmp_path / "checkpoint").mkdir()
    checkpoint, want = write_checkpoint(tmp_path / "checkpoint", config, model), model(*inputs())
    for format in ("adapter", "merged"):
        out = tmp_path / format
        export(ExportConfig(source=str(checkpoint), out=str(out), format=format, dtype="fp32"))
        student = open_student(out)
        assert (student.lora is None) == (format == "merged") and student.model == config.model
        read = student_config(student, str(base) if student.lora else None, "nowhere")
        found = load_model(out, read).eval()(*inputs())
        assert found.keys() == want.keys()
        for name, value in want.items():
            # To rounding: alpha is in B now, or in the merged matrix.
            assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
    tensors = load_file(tmp_path / "adapter" / "diffusion_pytorch_model.safetensors")
    assert sum(name.endswith(".lora_B.weight") for name in tensors) == ADAPTED
    rest = {name.rpartition(".")[0] for name in tensors if "lora" not in name}
    heads = {
        "gm": {"proj_out_means", "proj_out_logweights", "proj_out_logstds.1", "proj_out_logstds.3"},
        "dx": {"proj_out_2"},
    }
    assert rest == heads[policy] | {"proj_out_1"}
