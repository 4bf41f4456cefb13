"""Sample folders, their evaluation, and tools/evaluate.py."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from data_sets import write_set
from evaluation_samples import striped_images, write_samples
from PIL import Image
from safetensors.torch import load_file, save_file

from piflow_dist.cli import run_tool
from piflow_dist.evaluation import evaluate as evaluate_module
from piflow_dist.evaluation.evaluate import Judge, as_json, read_real_images
from piflow_dist.evaluation.metrics import METRICS
from piflow_dist.evaluation.samples import EvaluationError, check_same_noises, load_samples, read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Judge:
    splits = {"train": striped_images(900, 0), "test": striped_images(90, 1)}
    monkeypatch.setattr(evaluate_module, "read_real_images", lambda root, split: splits[split])
    return Judge.from_dataset("unused", cache_dir=cache)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A student's folder, and its teacher's: the same images with a little noise in the student's."""
    images, prompts = striped_images(120, 2)
    noise = torch.randint(-6, 7, images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    reference = write_samples(tmp_path / "teacher", images, prompts, steps=100, evaluations_per_step=2, seconds=60)
    return write_samples(tmp_path / "student", noisy, prompts, kind="student"), reference


def test_a_folder_is_read_in_the_order_of_its_index(pair: tuple[Path, Path]) -> None:
    manifest = pair[0] / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(reversed(lines)))
    samples = load_samples(pair[0])
    assert (len(samples), samples.title, samples.phrase) == (120, "student, 4 NFE", "student at 4 NFE")
    assert samples.seeds == list(range(1000, 1120))
    assert samples.prompts[1] == "a drawing of columns"


IMAGE, LATENTS = "images/00003_1003.png", "latents/00007_1007.safetensors"


@pytest.mark.parametrize("name", ["meta.json", "manifest.jsonl", IMAGE, LATENTS])
def test_missing_files_are_named(pair: tuple[Path, Path], name: str) -> None:
    (pair[0] / name).unlink()
    with pytest.raises(EvaluationError, match=f"{name} is missing"):
        load_samples(pair[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("meta.json", "{", "meta.json is not JSON"),
        ("meta.json", '{"kind": "cat"}', "kind='cat' should be teacher or student"),
        ("meta.json", '{"kind": "student", "images": 3, "seconds": 1}', "has no nfe, network_evaluations"),
        (IMAGE, "damaged", f"{IMAGE} is damaged"),
        (LATENTS, "damaged", f"{LATENTS} is damaged"),
        ("manifest.jsonl", '{"index": 0, "seed": 1, "prompt": "a", "file": "a"}\n', "does not hold one set of samples"),
        ("manifest.jsonl", '{"index": 0}\n', "line 1 has no seed, prompt, file"),
        ("manifest.jsonl", "{]\n", "line 1 is not JSON"),
    ],
)
def test_damaged_files_are_named(pair: tuple[Path, Path], name: str, content: str, message: str) -> None:
    (pair[0] / name).write_text(content)
    with pytest.raises(EvaluationError, match=message):
        load_samples(pair[0])


def test_latents_that_are_not_finite_are_an_error(pair: tuple[Path, Path]) -> None:
    path = pair[0] / LATENTS
    tensors = load_file(path)
    tensors["latents"][0, 0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(EvaluationError, match="1 of 120 latents are not finite .first at index 7"):
        load_samples(pair[0])


def test_other_noises_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    samples, reference = (load_samples(path) for path in pair)
    check_same_noises(samples, reference)
    images, prompts = striped_images(120, 2)
    fewer = load_samples(write_samples(tmp_path / "fewer", images[:60], prompts[:60]))
    with pytest.raises(EvaluationError, match="holds 60 samples and .* 120"):
        check_same_noises(fewer, reference)
    swapped = load_samples(write_samples(tmp_path / "swapped", images, prompts[1:] + prompts[:1]))
    with pytest.raises(EvaluationError, match="Sample 0 of .*swapped has seed 1000 and prompt 'a drawing of columns'"):
        check_same_noises(swapped, reference)


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_jsonl(path, ("step", "loss")) == [{"step": 1, "loss": 2.0}]


def test_evaluation_of_a_student(judge: Judge, pair: tuple[Path, Path]) -> None:
    found = judge.measure(*(load_samples(path) for path in pair))
    assert found.notes == {}
    values = found.values
    assert 34 < values["psnr_db"] < 38 and values["psnr_pooled_db"] == pytest.approx(values["psnr_db"], abs=0.2)
    assert 0 <= values["frechet_reference"] < values["frechet_real"]
    assert values["diversity"] == pytest.approx(1, abs=0.1) and values["diversity_pixels"] == pytest.approx(1, abs=0.1)
    assert values["prompt_accuracy"] > 0.95
    assert 0.01 < values["latent_relative_error"] < 0.1
    assert (values["evaluations_per_image"], values["images_per_second"]) == (4, 60)


def test_the_reference_itself_and_real_images(judge: Judge, pair: tuple[Path, Path]) -> None:
    teacher = load_samples(pair[1])
    found = judge.measure(teacher, teacher)
    assert found.values["diversity"] == 1 and found.values["evaluations_per_image"] == 200
    unmeasured = {"psnr_db", "psnr_pooled_db", "frechet_reference", "latent_relative_error"}
    assert {key for key, value in found.values.items() if value is None} == unmeasured == set(found.notes)
    real = judge.measure_real()
    assert real.count == 90 and real.values["prompt_accuracy"] > 0.9 and real.values["frechet_real"] > 0


def test_what_cannot_be_measured_is_marked(judge: Judge, tmp_path: Path) -> None:
    images, _ = striped_images(20, 3)
    prompts = [f"a drawing of {index // 2 if index < 18 else index}" for index in range(20)]
    few = load_samples(write_samples(tmp_path / "few", images, prompts))
    other = load_samples(write_samples(tmp_path / "other", images, prompts, seconds=0))
    found = judge.measure(other, few)
    marked = {"frechet_reference", "frechet_real", "diversity", "diversity_pixels", "prompt_accuracy"}
    assert set(found.notes) == marked | {"images_per_second"}
    assert all(found.values[key] is None for key in found.notes)
    assert "at least 65 samples in each set, here are 20" in found.notes["frechet_real"]
    assert found.values["psnr_db"] is not None


def test_what_was_not_asked_for_is_marked(judge: Judge, pair: tuple[Path, Path]) -> None:
    samples, reference = (load_samples(path) for path in pair)
    result = as_json(judge.measure(samples, reference), judge, samples, reference, "unused")
    assert set(result["values"]) == set(result["definitions"]) == {metric.key for metric in METRICS}
    assert judge.measure(samples, None).notes["psnr_db"].startswith("no reference was given")


def test_images_of_another_size_are_an_error(judge: Judge, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "large", torch.zeros(3, 1, 32, 32, dtype=torch.uint8), ["a"] * 3)
    with pytest.raises(EvaluationError, match=r"images of \(1, 32, 32\), the data set has \(1, 16, 16\)"):
        judge.measure(load_samples(folder), None)


def test_real_images_come_from_the_data_set(tmp_path: Path) -> None:
    write_set(tmp_path / "set", train=7, test=6)
    images, prompts = read_real_images(tmp_path / "set", "train")
    assert images.dtype == torch.uint8 and images.shape == (7, 1, 8, 8)
    assert prompts[0] == "a red square"
    with pytest.raises(EvaluationError, match="has no split 'other'"):
        read_real_images(tmp_path / "set", "other")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sample=x", "dataset=y"], 2, "Keys there: samples, sources,"),
        (["dataset=y"], 2, "Nothing to evaluate. Give samples=[DIR,...]"),
        (["samples=nowhere", "dataset=y"], 2, "nowhere is not a folder"),
        (["sources=[{nfe:4}]"], 2, "{'nfe': 4} names no source"),
        (["sources=[{source:run,nfee:4}]"], 2, "nfee of {'source': 'run', 'nfee': 4} is no setting of tools/sample.py"),
        (["samples=x", "rewards=mine"], 2, "mine is not of the form module:function"),
        (["stats=out.pt", "real=x"], 2, "stats=out.pt is the .safetensors"),
    ],
)
def test_the_tool_explains_bad_requests(
    capsys: pytest.CaptureFixture, arguments: list[str], code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_tool(load_tool("evaluate").main, arguments, "")
    assert exit_.value.code == code
    assert message in capsys.readouterr().err


def test_a_folder_without_latents_is_read_and_says_so(judge: Judge, pair: tuple[Path, Path]) -> None:
    manifest = pair[0] / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "latents"}) + "\n" for line in lines))
    samples, reference = (load_samples(path) for path in pair)
    assert samples.latents_BCHW is None and (samples.images_BCHW.shape, len(samples.files)) == ((120, 1, 16, 16), 120)
    found = judge.measure(samples, reference)
    assert found.values.get("latent_relative_error") is None and "no latents" in found.notes["latent_relative_error"]


def test_images_of_several_sizes_are_not_one_tensor(pair: tuple[Path, Path]) -> None:
    Image.new("L", (24, 16)).save(pair[0] / IMAGE)
    with pytest.raises(EvaluationError, match="images of several sizes"):
        load_samples(pair[0])
