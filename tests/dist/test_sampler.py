"""tools/sample.py: images that depend on their request alone, folders that are whole or say so, plain refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTS, run_tool
from numerics.reference import GaussianMixture, sample, warp
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from data_pipeline.codec import load_codec
from data_pipeline.prompts import TokenTableEncoder, vocabulary
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.checkpoint.runs import read_run_config
from piflow_dist.models.pretrained import load_model
from piflow_dist.models.qwen_image import QwenImage
from piflow_dist.sampling.sampler import write_part
from piflow_dist.sampling.settings import part_path

IMAGES = 2 * len(PROMPTS)
COMMON = ("images_per_prompt=2", "seed=5", "launch.device=cpu", "launch.threads=1")
# Noise between the steps and a sharpened mixture: every part of the sampler has a say in the images.
STUDENT = (*COMMON, "h=0.5", "temperature=auto")
TEACHER = (*COMMON, "steps=6", "guidance=2")


def run_sampler(source: Path, out: Path, *arguments: str) -> str:
    done = run_tool("sample", f"source={source}", f"out={out}", *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout


def latents_of(folder: Path) -> Tensor:
    return load_file(folder / "samples.safetensors")["latents"]


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def student_images(tmp_path_factory: pytest.TempPathFactory, student_run: Path) -> Path:
    """From 2 processes, in batches of 2."""
    out = tmp_path_factory.mktemp("samples") / "student"
    run_sampler(student_run, out, *STUDENT, "launch.processes=2", "batch_size=2")
    return out


@pytest.fixture(scope="module")
def teacher_images(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Path:
    out = tmp_path_factory.mktemp("samples") / "teacher"
    run_sampler(teacher_run, out, *TEACHER)
    return out


def test_images_do_not_depend_on_processes_or_batches(student_images: Path, student_run: Path, tmp_path: Path) -> None:
    run_sampler(student_run, tmp_path / "one", *STUDENT, "launch.processes=1", "batch_size=4")
    assert_close(latents_of(tmp_path / "one"), latents_of(student_images), rtol=0, atol=1e-5)


def test_a_finished_folder_is_left_alone(student_images: Path, student_run: Path) -> None:
    before = written_at(student_images)
    said = run_sampler(student_run, student_images, *STUDENT, "launch.processes=1", "batch_size=2")
    assert f"all {IMAGES} images are there" in said
    assert written_at(student_images) == before


def test_only_missing_parts_are_made(student_images: Path, student_run: Path, tmp_path: Path) -> None:
    """A folder as a kill leaves it: two of three parts, told apart from real ones by what they hold, and half a third."""
    out = tmp_path / "killed"
    shutil.copytree(student_images, out)
    for path in ("meta.json", "manifest.jsonl", "samples.safetensors"):
        (out / path).unlink()
    (out / "parts").mkdir()
    like = latents_of(student_images)
    for part in (0, 2):
        marked = torch.full_like(like[:2], 7.0 + part)
        write_part(part_path(out, part), marked, torch.zeros(2, 1, 16, 16), seconds=0.0)
    part_path(out, 1).with_suffix(".99999.tmp").write_bytes(b"half a part")
    run_sampler(student_run, out, *STUDENT, "launch.processes=2", "batch_size=2")
    found = latents_of(out)
    assert_close(found[2:4], like[2:4], rtol=0, atol=1e-5)
    assert (found[:2] == 7).all() and (found[4:] == 9).all()
    assert (out / "meta.json").exists() and not (out / "parts").exists()


def test_what_a_folder_holds(student_images: Path) -> None:
    lines = [json.loads(line) for line in (student_images / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in sorted(PROMPTS) for _ in range(2)]
    assert len({line["seed"] for line in lines}) == IMAGES
    stored = load_file(student_images / "samples.safetensors")["images"]
    codec = load_codec({"kind": "block_dct", "image_channels": 1, "block": 4, "scale": 1.0})
    decoded = (codec.decode(latents_of(student_images)).clamp(-1, 1) + 1) * 127.5
    assert (decoded.round().to(torch.uint8) == stored).all()
    for line, image_chw in zip(lines, stored, strict=True):
        with Image.open(student_images / line["file"]) as picture:
            assert (np.asarray(picture) == image_chw[0].numpy()).all()
            assert picture.text["prompt"] == line["prompt"] and picture.text["seed"] == str(line["seed"])
    meta = json.loads((student_images / "meta.json").read_text())
    assert (meta["kind"], meta["network_evaluations"], meta["images"]) == ("student", 4, IMAGES)


# The same images from plain loops, one image at a time, in which only the network is the package's.


def network_of(run: Path) -> QwenImage:
    checkpoint, _ = newest_complete(run / "checkpoints")
    return load_model(checkpoint, read_run_config(checkpoint)).eval()


def encode(prompt: str) -> Tensor:
    (text_LD,) = TokenTableEncoder(vocabulary(PROMPTS), dim=64).encode([prompt])
    return text_LD[None]


@torch.no_grad()
def test_a_student_image_is_the_formulas(student_images: Path, student_run: Path) -> None:
    model, found = network_of(student_run), latents_of(student_images)
    lines = [json.loads(line) for line in (student_images / "manifest.jsonl").read_text().splitlines()]
    for line, want_CHW in zip(lines, found, strict=True):
        generator = torch.Generator().manual_seed(line["seed"])
        text = encode(line["prompt"])

        def predict(x: Tensor, sigma: float, text: Tensor = text) -> GaussianMixture:
            out = model(x[None].float(), torch.tensor([sigma]), text, torch.ones(text.shape[:2], dtype=torch.bool))
            out = {name: value[0].double() for name, value in out.items()}
            return GaussianMixture(out["means"], out["logstds"].reshape(()), out["logweights"], x, sigma)

        def noise(generator: torch.Generator = generator) -> Tensor:
            return torch.randn(16, 4, 4, generator=generator).double()

        got = sample(predict, noise(), 1.0, 4, last_scale=0.5, total_substeps=128, temperature=0.3, h=0.5, noise=noise)
        assert_close(want_CHW.double(), got, rtol=0, atol=2e-4 * got.abs().max().item())


@torch.no_grad()
def test_a_teacher_image_is_the_formulas(teacher_images: Path, teacher_run: Path) -> None:
    model, found = network_of(teacher_run), latents_of(teacher_images)
    lines = [json.loads(line) for line in (teacher_images / "manifest.jsonl").read_text().splitlines()]
    empty = encode("")
    for line, want_CHW in zip(lines, found, strict=True):
        x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(line["seed"])).double()
        for i in range(6):
            here, there = warp(1 - i / 6, 1.0), warp(1 - (i + 1) / 6, 1.0)
            sigma = torch.tensor([here])
            u, u_empty = (
                model(x.float(), sigma, text, torch.ones(text.shape[:2], dtype=torch.bool)).double()
                for text in (encode(line["prompt"]), empty)
            )
            x = x + (there - here) * (u_empty + 2 * (u - u_empty))
        assert_close(want_CHW[None].double(), x, rtol=0, atol=2e-4 * x.abs().max().item())


# Requests that cannot work: refused before a process starts, exit code 2, value and option in the message.


@pytest.fixture
def refuse(refused_by: Callable[..., Callable[..., str]]) -> Callable[..., str]:
    return refused_by("sample")


def test_images_of_other_settings_are_kept(refuse: Callable[..., str], student_images: Path, student_run: Path) -> None:
    before = written_at(student_images)
    message = refuse(f"source={student_run}", f"out={student_images}", *STUDENT, "batch_size=2", "seed=6")
    assert "seed: 5 -> 6" in message and "overwrite=true" in message
    assert written_at(student_images) == before


def test_overwrite_makes_them_again(student_images: Path, student_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(student_images, out)
    run_sampler(student_run, out, *STUDENT, "batch_size=2", "seed=6", "overwrite=true")
    assert (latents_of(out) - latents_of(student_images)).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("nfe=2", ("nfe=2 is below the 4", "Use 4 or more")),
        ("temperature=3", ("temperature=3", "(0, 1]")),
        ("temperature=warm", ("temperature=warm is not a number",)),
        ("steps=8", ("steps=8 is for teachers", "is a student", "nfe, temperature, h, substeps")),
        ("guidance=2", ("guidance=2.0 is for teachers",)),
        ("h=-1", ("h=-1", "0 (ODE) or more")),
        ("images_per_prompt=0", ("images_per_prompt",)),
        ("guidanse=2", ("guidanse", "guidance")),
        ("prompts=/nowhere/prompts.txt", ("prompts=/nowhere/prompts.txt does not exist",)),
        ("source=/nowhere/run", ("source=/nowhere/run does not exist",)),
    ],
)
def test_refused(
    refuse: Callable[..., str], student_run: Path, tmp_path: Path, option: str, words: tuple[str, ...]
) -> None:
    message = refuse(f"source={student_run}", f"out={tmp_path / 'out'}", *COMMON, option)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["nfe=4", "temperature=0.3", "h=0.5", "substeps=64"])
def test_a_students_keys_are_refused_for_a_teacher(
    refuse: Callable[..., str], teacher_run: Path, tmp_path: Path, option: str
) -> None:
    message = refuse(f"source={teacher_run}", f"out={tmp_path / 'out'}", *COMMON, option)
    assert f"{option} is for students" in message and "steps, guidance" in message


def test_a_folder_of_somebody_else_is_refused(refuse: Callable[..., str], student_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert "is not empty" in refuse(f"source={student_run}", f"out={tmp_path}", "overwrite=true")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
