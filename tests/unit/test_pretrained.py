"""Teachers in diffusers' layout: read piece by piece, and refused where they are not what the run asks for."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_diffusers_teacher
from safetensors.torch import load_file, save_file

from piflow_dist.config import ConfigError, load_config
from piflow_dist.launch.preflight import check_teacher
from piflow_dist.models.architecture import plan_model
from piflow_dist.models.pretrained import INDEX, DiffusersWeights, diffusers_folder, read_diffusers_config
from piflow_dist.models.weights import fill

CONFIG = load_config([*TINY, "objective=flow_matching", "data.root=x", "run_dir=x"])


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_diffusers_teacher(tmp_path / "pipeline")


def refused(teacher: Path, *overrides: str) -> str:
    config = load_config([*TINY, "data.root=x", "run_dir=x", f"distill.teacher={teacher}", *overrides])
    with pytest.raises(ConfigError) as error:
        check_teacher(config)
    return str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("place", ["pipeline", "pipeline/transformer"])
def test_velocities_are_those_of_diffusers(teacher: Path, place: str) -> None:
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import QwenImageTransformer2DModel

    from piflow_dist.models.heads import pack

    folder = diffusers_folder(str(teacher.parent / place))
    model = plan_model(read_diffusers_config(folder))
    fill(model, DiffusersWeights(folder))
    theirs = QwenImageTransformer2DModel.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    x_BCHW, text_BLD = torch.randn(2, 16, 4, 6, generator=generator), torch.randn(2, 3, 64, generator=generator)
    sigma_B, mask_BL = torch.tensor([0.2, 0.9]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    want = theirs(
        hidden_states=pack(x_BCHW), encoder_hidden_states=text_BLD, encoder_hidden_states_mask=mask_BL,
        timestep=sigma_B, img_shapes=[[(1, 2, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    got = model(x_BCHW, sigma_B, text_BLD, mask_BL)
    assert (pack(got) - want).abs().max() < 1e-5 * want.abs().max()


def test_a_whole_checkpoint_is_accepted(teacher: Path) -> None:
    check_teacher(load_config([*TINY, "data.root=x", "run_dir=x", f"distill.teacher={teacher}"]))


def test_missing_extra_and_misshapen_tensors_are_named(teacher: Path) -> None:
    path = sorted((teacher / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(path)
    lost, bent = sorted(tensors)[0], sorted(tensors)[1]
    tensors["surplus.weight"] = tensors.pop(lost)
    tensors[bent] = tensors[bent][:1].clone()
    save_file(tensors, path)
    message = refused(teacher)
    assert f"missing: {lost}" in message and "unknown: surplus.weight" in message and f"{bent} is (1" in message


def test_a_missing_file_is_named(teacher: Path) -> None:
    path = sorted((teacher / "transformer").glob("*.safetensors"))[0]
    path.unlink()
    assert path.name in refused(teacher)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("zero_cond_t", True, "zero_cond_t=true"),
        ("use_additional_t_cond", True, "use_additional_t_cond=true"),
        ("use_layer3d_rope", True, "use_layer3d_rope=true"),
        ("_class_name", "SD3Transformer2DModel", "describes a SD3Transformer2DModel"),
        ("num_layers", 3, "num_layers=3"),
        ("patch_size", 1, "2 x 2 patches"),
    ],
)
def test_other_architectures_are_refused(teacher: Path, key: str, value: object, words: str) -> None:
    path = teacher / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert words in refused(teacher)


def test_the_fingerprint_sees_other_weights(teacher: Path) -> None:
    folder = teacher / "transformer"
    before = DiffusersWeights(folder).fingerprint()
    assert DiffusersWeights(folder).fingerprint() == before
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    save_file({name: value + 1e-3 for name, value in tensors.items()}, path)
    assert DiffusersWeights(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "[]", "is not a JSON object"),
        (
            "config.json",
            '{"_class_name": "QwenImageTransformer2DModel", "in_channels": 64}',
            "does not say patch_size, out_channels",
        ),
        (INDEX, "[]", "cannot be read as a transformer in diffusers' layout"),
        (INDEX, '{"weight_map": {}}', "lists no files"),
    ],
)
def test_files_that_are_something_else(teacher: Path, file: str, text: str, words: str) -> None:
    (teacher / "transformer" / file).write_text(text)
    with pytest.raises(ConfigError, match=words):
        DiffusersWeights(teacher / "transformer")
        read_diffusers_config(teacher / "transformer")


def test_quantised_weights_are_refused(teacher: Path) -> None:
    folder = teacher / "transformer"
    name = json.loads((folder / INDEX).read_text())["weight_map"]["img_in.weight"]
    tensors = load_file(folder / name)
    save_file(tensors | {"img_in.weight": tensors["img_in.weight"].to(torch.int64)}, folder / name)
    with pytest.raises(ConfigError, match="img_in.weight is stored as I64"):
        DiffusersWeights(folder)
