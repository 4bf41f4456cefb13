"""Exports are the published layouts and sample what their checkpoints sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_weights, run_tool
from images import sample_here
from safetensors import safe_open
from safetensors.torch import load_file
from students import STEPS, STUDENTS, newest
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.checkpoint.files import CheckpointError
from piflow_dist.checkpoint.reshard import reshard
from piflow_dist.config import ConfigError
from piflow_dist.evaluation.samples import load_samples
from piflow_dist.models.pretrained import DiffusersWeights, load_model
from piflow_dist.models.qwen_image import unread_parameters
from piflow_dist.sampling.settings import SampleConfig, build_request


def latents(source: Path, **options: Any) -> Tensor:
    # h: every part of a student's sampler has a say in the images.
    own = {"steps": 4} if "teacher" in source.name or source.name == "uninterrupted" else {"h": "0.5"}
    request = build_request(SampleConfig(source=str(source), out="nowhere", seed=3, **own, **options))
    return sample_here(request)[1]


@pytest.mark.parametrize("name", ["tied", "tied-dx"])
def test_an_adapter_samples_its_checkpoints_images(
    students: Path, exports: Path, teacher_run: Path, tiny_data: Path, name: str
) -> None:
    want = latents(students / name)
    for base in (teacher_run, exports / "teacher-merged"):  # the run, and its export in diffusers' layout
        got = latents(exports / f"{name}-adapter", base=str(base), dataset=str(tiny_data))
        assert torch.equal(got, want)  # to the bit: alpha / rank is a power of two
    assert (want - latents(students / name, ema=False)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*STUDENTS, "full", "teacher"])
def test_a_merged_transformer_samples_its_checkpoints_images(
    students: Path, student_run: Path, teacher_run: Path, exports: Path, tiny_data: Path, name: str
) -> None:
    source = {"full": student_run, "teacher": teacher_run}.get(name, students / name)
    want, got = latents(source), latents(exports / f"{name}-merged", dataset=str(tiny_data))
    # To rounding where adapters were merged (W + B A is one matrix now), else to the bit.
    assert_close(got, want, rtol=0, atol=1e-5 if name.startswith("tied") else 0)
    if name.startswith("tied"):
        assert not torch.equal(got, want) and torch.equal(latents(source, merge=True), got)


def test_the_tool_samples_an_adapter(
    students: Path, exports: Path, teacher_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Adapters and their base split over two processes."""
    options = ("seed=3", "h=0.5", "launch.device=cpu", "launch.threads=1", f"dataset={tiny_data}")
    options, out = (*options, "launch.processes=2", "parallel.tp=2"), tmp_path / "samples"
    done = run_tool("sample", f"source={exports / 'tied-adapter'}", f"base={teacher_run}", f"out={out}", *options)
    assert done.returncode == 0, done.stdout
    assert_close(load_samples(out).latents_BCHW, latents(students / "tied"), rtol=0, atol=1e-4)


LINEARS = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
PUBLISHED = {
    *(f"transformer_blocks.0.{layer}.lora_{part}.weight" for layer in LINEARS for part in "AB"),
    *(f"transformer_blocks.1.{layer}.lora_{part}.weight" for layer in LINEARS[:2] for part in "AB"),
    *(f"time_text_embed.timestep_embedder.linear_{i}.lora_{part}.weight" for i in (1, 2) for part in "AB"),
    *(f"norm_out.linear.{kind}" for kind in ("weight", "bias")),
}
GM_HEAD = {f"proj_out_{name}.{kind}" for name in ("means", "logweights", "logstds.1", "logstds.3") for kind in ("weight", "bias")}  # fmt: skip


def test_an_adapter_folder_is_the_published_layout(students: Path, exports: Path) -> None:
    folder = exports / "tied-adapter"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "piflow_dist.json",
    }  # fmt: skip
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == PUBLISHED | GM_HEAD
        assert json.loads(file.metadata()["policy_config"]) == {"type": "GMFlow"}
    assert json.loads((folder / "config.json").read_text()) == {
        "_class_name": "GMQwenImageTransformer2DModel", "num_gaussians": 3, "constant_logstd": None, "logstd_inner_dim": 16,
        "gm_num_logstd_layers": 2, "logweights_channels": 4, "in_channels": 64, "out_channels": 64, "num_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip
    averages, written = (
        read_weights(newest(students / "tied")),
        load_file(folder / "diffusion_pytorch_model.safetensors"),
    )
    for name, value in averages.items():
        scale = 2 if "lora_B" in name else 1  # readers take alpha = rank
        assert torch.equal(written[name.removeprefix("head.")], scale * value), name
    assert str(students) not in (folder / "piflow_dist.json").read_text()  # a folder to give away knows no paths


def test_a_dx_adapter_folder_says_where_its_nodes_are(exports: Path) -> None:
    folder = exports / "tied-dx-adapter"
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == PUBLISHED | {"proj_out.weight", "proj_out.bias"}
        policy = json.loads(file.metadata()["policy_config"])
    assert policy == {"type": "DX", "segment_size": 1 / 3.5, "shift": 2.0}
    written = json.loads((folder / "config.json").read_text())
    assert (written["_class_name"], written["patch_size"], written["out_channels"]) == (
        "DXQwenImageTransformer2DModel",
        1,
        192,
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "groups"), [("teacher", 1), ("tied-dx", 3), ("full-dx", 3)])
def test_diffusers_loads_merged_transformers(exports: Path, name: str, groups: int) -> None:
    """A teacher is its own QwenImageTransformer2DModel; a DX student the same class with N times the outputs."""
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import QwenImageTransformer2DModel

    from piflow_dist.models.adapters import open_student, student_config, teacher_config
    from piflow_dist.models.heads import pack, unpack

    folder = exports / f"{name}-merged"
    assert len(list(folder.glob("*.safetensors"))) > 2
    theirs, said = QwenImageTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    config = teacher_config(folder, "x") if name == "teacher" else student_config(open_student(folder), None, "x")
    generator = torch.Generator().manual_seed(0)
    x_BCHW, text_BLD = torch.randn(2, 16, 4, 6, generator=generator), torch.randn(2, 3, 64, generator=generator)
    sigma_B, mask_BL = torch.tensor([0.2, 0.9]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    want = theirs(
        hidden_states=pack(x_BCHW), encoder_hidden_states=text_BLD, encoder_hidden_states_mask=mask_BL,
        timestep=sigma_B, img_shapes=[[(1, 2, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    got = load_model(folder, config)(x_BCHW, sigma_B, text_BLD, mask_BL)
    got = got["out"] if groups > 1 else got[:, None]
    assert_close(got, unpack(want, (4, 6), groups), rtol=1e-4, atol=1e-5)


def test_adapters_are_merged_in_fp32_and_cast_once(students: Path, teacher_run: Path, tmp_path: Path) -> None:
    export(ExportConfig(source=str(students / "tied"), out=str(tmp_path / "bf16"), format="merged"))
    written, trained = DiffusersWeights(tmp_path / "bf16"), read_weights(newest(students / "tied"))
    base = read_weights(newest(teacher_run))
    name = "transformer_blocks.0.img_mlp.net.2"
    want = base[f"{name}.weight"] + 2 * trained[f"{name}.lora_B.weight"] @ trained[f"{name}.lora_A.weight"]
    assert written.view(f"{name}.weight")[:].dtype == torch.bfloat16
    assert (
        written.view(f"{name}.weight")[:] != want.bfloat16()
    ).float().mean() < 0.01  # ties of another summation order
    assert torch.equal(written.view("img_in.weight")[:], base["img_in.weight"].bfloat16())
    assert all((written.view(name)[:] == 0).all() for name in unread_parameters(2))  # nobody reads or trained them


def test_what_cannot_be_exported_is_refused(students: Path, exports: Path, teacher_run: Path, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            export(ExportConfig(**{"source": str(students / "full-dx"), "out": str(tmp_path / "out"), **options}))
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    assert "mode=full" in refused() and "format=merged" in refused()
    assert "nothing is overwritten" in refused(out=str(exports / "tied-adapter"))
    assert "max_shard_size=tall" in refused(max_shard_size="tall")
    assert "is not the teacher" in refused(
        source=str(students / "tied"), format="merged", base=str(exports / "teacher-merged")
    )
    assert "base=PATH" in refused(source=str(students / "tied"), format="merged", base="/nowhere")
    assert "mode=full" in refused(source=str(teacher_run))


def test_the_tool_says_what_it_wrote(students: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from conftest import load_tool

    load_tool("export").run_export(
        [f"source={students / 'tied'}", f"out={tmp_path / 'out'}", "ema=false", "dtype=bf16"]
    )
    said = capsys.readouterr().out
    assert "26 tensors" in said and "raw weights" in said and f"step {STEPS}" in said
    written, raw = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), read_weights(newest(students / "tied"), False)  # fmt: skip
    assert torch.equal(written["norm_out.linear.weight"], raw["norm_out.linear.weight"].bfloat16())


def test_a_full_disk_leaves_nothing_behind(students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("piflow_dist.checkpoint.streaming.TensorFile.write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(ExportConfig(source=str(students / "tied"), out=str(tmp_path / "out")))
    with pytest.raises(CheckpointError, match="No space left"):
        reshard(newest(students / "tied"), tmp_path / "run", 2, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset": None}, ("dataset=DIR",)),
        ({"base": None}, ("base=PATH",)),
        ({"base": "another"}, ("is not the transformer", "likeness")),
        ({"dataset": "/nowhere"}, ("dataset=/nowhere",)),
    ],
)
def test_an_adapter_that_cannot_be_sampled_is_refused(
    exports: Path, teacher_run: Path, tiny_data: Path, tmp_path: Path, changed: dict, words: tuple[str, ...]
) -> None:
    if changed.get("base") == "another":
        from conftest import write_diffusers_teacher

        changed = {"base": str(write_diffusers_teacher(tmp_path / "another"))}
    options = {"base": str(teacher_run), "dataset": str(tiny_data), **changed}
    with pytest.raises(ConfigError) as error:
        build_request(SampleConfig(source=str(exports / "tied-adapter"), out="nowhere", **options))
    assert all(word in str(error.value) for word in words), error.value
