"""tools/evaluate.py: the same numbers on any number of processes, reports that are whole, and weights that are missing."""

import functools
import html as html_lib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import REPO, load_tool, run_tool
from PIL import Image
from ranks import run_ranks

from piflow_dist.config import read_config
from piflow_dist.evaluation import run
from piflow_dist.evaluation.compare import RESULT, compare
from piflow_dist.evaluation.instruments import open_tools
from piflow_dist.evaluation.real import RealStatistics
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.evaluation.settings import EvaluateConfig
from piflow_dist.evaluation.shares import Share
from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling.control import PATIENCE

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from data_sets import PROMPTS, write_set  # noqa: E402
from evaluation_samples import write_samples  # noqa: E402

IMAGES = 70
"""More than the 64 features of the small network."""
REWARD = "def bright(images, prompts):\n    return [sum(image.convert('L').tobytes()) for image in images]\n"


def write_inputs(root: Path) -> None:
    """A prepared set of random 8 x 8 images, a teacher's samples, and a student's and another's from the same noises."""
    write_set(root / "data", train=120, test=12)
    generator = torch.Generator().manual_seed(5)
    prompts = [PROMPTS[index // 2 % 3] for index in range(IMAGES)]
    teacher = torch.randint(0, 256, (IMAGES, 1, 8, 8), generator=generator)
    for name, kind, noise in (("teacher", "teacher", 0), ("student", "student", 9), ("few", "teacher", 60)):
        drawn = torch.randint(-noise, noise + 1, teacher.shape, generator=generator)
        pixels = (teacher + drawn).clamp(0, 255).to(torch.uint8)
        write_samples(root / name, pixels, prompts, kind=kind, steps=50 if name == "teacher" else 4)
    (root / "bright_reward.py").write_text(REWARD)


def settings(root: Path, **others: object) -> EvaluateConfig:
    values = {
        "samples": [str(root / name) for name in ("student", "few", "teacher")],
        "reference": str(root / "teacher"),
        "dataset": str(root / "data"),
        "cache": str(root / "cache"),
        "out": str(root / "out"),
        "clip": str(root / "nowhere"),
        "rewards": ["bright_reward:bright", "absent_reward:score"],
        "batch_size": 8,
        "resamples": 20,
    }
    return EvaluateConfig(**values | others)


def compare_rank(rank: int, world_size: int, root: Path) -> dict | None:
    """As the tool's processes do; every word between ranks goes over the group that has no time limit to speak of."""
    os.chdir(root)
    share = Share.of(Topology(rank, world_size, rank, torch.device("cpu"), 1))
    assert share.group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    for name in ("all_reduce", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
        patient = functools.partial(over, getattr(dist, name), share.group)
        setattr(dist, name, patient)
    return compare(settings(root), share)


def look_for_statistics(rank: int, root: Path, broken: Path) -> None:
    """A shared disk that shows one of two ranks the statistics and not the other: both do what rank 0 sees.

    An image that one of them cannot read costs both the real images.
    """
    notes = open_tools(settings(root, real=str(broken)), Share(rank, 2), None).notes
    assert "9.png is damaged, or no image" in notes["real"]
    config = settings(root)
    tools = open_tools(config, Share(rank, 2), None)
    is_file = Path.is_file
    for seen_by in (0, 1):
        Path.is_file = lambda path, sees=rank == seen_by: is_file(path) and (sees or not path.name.startswith("real_"))
        again = open_tools(config, Share(rank, 2), None)
        assert torch.equal(again.real.moments.covariance_DD, tools.real.moments.covariance_DD)


def over(collective: Callable[..., None], wanted: dist.ProcessGroup, *args: Any, **options: Any) -> None:
    assert options["group"] is wanted, f"{collective.__name__} is not over the patient group"
    collective(*args, **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def found(inputs: Path) -> dict:
    """By the tool, on 2 processes; also trains the network that the others find in the cache."""
    config = settings(inputs)
    arguments = [
        f"{key}={getattr(config, key)}"
        for key in ("reference", "dataset", "cache", "out", "clip", "batch_size", "resamples")
    ]
    arguments += [f"samples=[{','.join(config.samples)}]", f"rewards=[{','.join(config.rewards)}]"]
    command = [
        sys.executable,
        str(REPO / "tools" / "evaluate.py"),
        *arguments,
        "launch.processes=2",
        "launch.device=cpu",
    ]
    done = subprocess.run(command, cwd=inputs, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return {"result": json.loads((inputs / "out" / "evaluation.json").read_text()), "printed": done.stdout}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "COLUMNS": "200"}


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_number_of_processes_changes_no_digit(found: dict, inputs: Path, world_size: int) -> None:
    here = run_ranks(compare_rank, world_size, world_size, inputs, time_limit=300)
    assert all(other is None for other in here[1:])
    assert json.loads(json.dumps(here[0]))["rows"] == found["result"]["rows"]


def test_what_one_rank_alone_sees_of_a_disk(found: dict, inputs: Path, tmp_path: Path) -> None:
    run_ranks(
        look_for_statistics, 2, inputs, write_real(tmp_path / "broken", 8, broken=True), time_limit=300, warm=True
    )


def write_real(folder: Path, edge: int, broken: bool = False) -> Path:
    """12 images, the last batch of which rank 1 of 2 reads; `broken` is one of those."""
    folder.mkdir()
    for number in range(12):
        Image.new("L", (edge, edge), 20 * number).save(folder / f"{number}.png")
    if broken:
        (folder / "9.png").write_bytes(b"no image")
    return folder


REAL = {"fid", "kid", "precision", "recall", "patch_fid"}
FEATURES = REAL | {"inception_score"}


@pytest.mark.parametrize(
    ("case", "lost", "said"),
    [
        ("inception", FEATURES, "inception=.*/gone.safetensors does not exist. docs/evaluation.md says"),
        ("dataset", FEATURES, "No data set in .*/gone: .*dataset.json is missing"),
        ("size", FEATURES, "images are .1, 16, 16. .*, those of dataset=.*data .1, 8, 8."),
        ("one_size", FEATURES, "images of .1, 16, 16., and the small network was trained on .1, 8, 8."),
        ("no_real", REAL, "real=.*/gone does not exist"),
        ("real_size", REAL, "real=.*real_size: images of .1, 16, 16., and the small network was trained on"),
        ("broken", REAL, "9.png is damaged, or no image"),
    ],
)
def test_features_that_cannot_be_had_cost_no_other_metric(
    case: str, lost: set[str], said: str, found: dict, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The reason is in console, HTML and markdown."""
    samples = write_sized(tmp_path / "samples", 16 if case == "size" else 8, 16 if case in ("size", "one_size") else 8)
    options: dict[str, object] = {
        "samples": [str(samples)],
        "rewards": [],
        "resamples": 0,
        "out": str(tmp_path / "out"),
    }
    options |= {
        "inception": {"inception": str(tmp_path / "gone.safetensors")},
        "dataset": {"dataset": str(tmp_path / "gone")},
        "no_real": {"real": str(tmp_path / "gone")},
        "real_size": {"real": str(write_real(tmp_path / "real_size", 16))},
        "broken": {"real": str(write_real(tmp_path / "broken", 8, broken=True))},
    }.get(case, {})
    in_process(settings(inputs, reference=None, **options))
    reports = [
        capsys.readouterr().out,
        *((tmp_path / "out" / f"evaluation.{kind}").read_text() for kind in ("html", "md")),
    ]
    for text in reports:
        assert re.search(said, " ".join(html_lib.unescape(text).split())), text
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"][0]
    assert lost <= row["notes"].keys() and row["results"]["images_per_second"]["value"] > 0
    assert {"inception_score", "prompt_accuracy"} <= (row["notes"] if lost == FEATURES else row["results"]).keys()


def write_sized(folder: Path, edge: int, last_edge: int) -> Path:
    """Three samples, of which the last one may have another size."""
    write_samples(folder, torch.full((3, 1, edge, edge), 90, dtype=torch.uint8), list(PROMPTS[:3]))
    Image.new("L", (last_edge, last_edge)).save(folder / "images" / "00002_1002.png")
    return folder


def test_what_was_measured(found: dict) -> None:
    rows = {row["name"]: row for row in found["result"]["rows"]}
    values = {name: {key: each["value"] for key, each in row["results"].items()} for name, row in rows.items()}
    assert values["student"]["psnr_db"] > values["few"]["psnr_db"] > 10
    assert 0 < values["student"]["latent_relative_error"] < values["few"]["latent_relative_error"]
    assert 0 <= values["student"]["fid_reference"] < values["few"]["fid_reference"]
    assert values["teacher"]["diversity"] == values["teacher"]["diversity_pixels"] == 1
    assert {"fid", "kid", "inception_score", "precision", "recall", "prompt_accuracy", "bright"} <= values[
        "student"
    ].keys()
    assert values["student"]["images_per_second"] == IMAGES / 2.0
    assert {"psnr_db", "fid_reference", "latent_relative_error"}.isdisjoint(values["teacher"])
    for row in rows.values():
        for key, each in row["results"].items():
            assert each["low"] is None or each["low"] <= each["value"] <= each["high"], (row["name"], key)


def test_what_is_missing_is_said_and_the_rest_goes_on(found: dict) -> None:
    notes = found["result"]["rows"][0]["notes"]
    assert "nowhere has no config.json" in notes["clip_score"] and notes["lpips"] == "no weights. Set lpips=FILE."
    assert "absent_reward:score cannot be loaded: No module named 'absent_reward'" in notes["score"]
    assert "patch FID needs InceptionV3" in notes["patch_fid"]
    printed = " ".join(found["printed"].split())
    assert "not measured: CLIP score: clip=" in printed and "PSNR, dB" in printed


def test_the_report_is_one_file(found: dict, inputs: Path) -> None:
    html = (inputs / "out" / "evaluation.html").read_text()
    assert html.count("data:image/png;base64,") == 3 and not re.search(r"(src|href)=.(?!data:)", html)
    markdown = (inputs / "out" / "evaluation.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    pictures = re.findall(r"\]\((figures/.*?)\)", markdown)
    assert len(pictures) == 3 and all((inputs / "out" / picture).is_file() for picture in pictures)
    for text in (html, markdown):
        assert "student, 4 NFE" in text and "drawn anew with replacement" in text and "absent_reward" in text
    beside = json.loads((inputs / "student" / "metrics.json").read_text())
    assert beside["results"] == found["result"]["rows"][0]["results"]


def test_statistics_made_once_give_the_same(found: dict, inputs: Path, tmp_path: Path) -> None:
    """From the set itself, and from the file that stats= wrote."""
    file = tmp_path / "real.safetensors"
    assert (
        compare(
            settings(inputs, samples=[], reference=None, rewards=[], stats=str(file), real=str(inputs / "data")),
            Share(),
        )["rows"]
        == []
    )
    statistics = RealStatistics.load(file)
    assert statistics.moments.count == 120
    again = compare(settings(inputs, real=str(file), rewards=["bright_reward:bright"]), Share())
    (want,) = (row["results"]["fid"] for row in found["result"]["rows"] if row["name"] == "student")
    (have,) = (row["results"]["fid"] for row in json.loads(json.dumps(again["rows"])) if row["name"] == "student")
    assert have == want
    replace(statistics, network="other").save(file)
    notes = compare(settings(inputs, real=str(file), rewards=[]), Share())["rows"][0]["notes"]
    assert "made with other weights of a feature network" in notes["fid"] == notes["recall"]
    with pytest.raises(EvaluationError, match="stats=.* cannot be made: real=.* was made with other weights"):
        compare(
            settings(
                inputs, samples=[], reference=None, rewards=[], stats=str(tmp_path / "x.safetensors"), real=str(file)
            ),
            Share(),
        )


def test_images_that_one_source_could_not_make(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What both have is compared, as if neither had been asked for the rest."""
    kept = {"student": [*range(3), *range(4, 70)], "teacher": range(68), "few": range(70)}
    both = [*range(3), *range(4, 68)]
    measured = {}
    for name, places in {**kept, "fewer": both, "others": both}.items():
        source = {"fewer": "student", "others": "teacher"}.get(name, name)
        shutil.copytree(inputs / source, tmp_path / name, ignore=shutil.ignore_patterns("metrics.json"))
        lines = (inputs / source / "manifest.jsonl").read_text().splitlines()
        (tmp_path / name / "manifest.jsonl").write_text("".join(lines[place] + "\n" for place in places))
        meta = json.loads((inputs / source / "meta.json").read_text())
        (tmp_path / name / "meta.json").write_text(json.dumps(meta | {"images": len(places)}))
    for first, other in (("student", "teacher"), ("fewer", "others")):
        names = [first, "few", other] if first == "student" else [first, other]
        config = settings(
            inputs,
            samples=[str(tmp_path / name) for name in names],
            reference=other,
            rewards=[],
            out=str(tmp_path / f"out_{first}"),
        )
        in_process(config)
        measured[first] = json.loads((config.out_dir / "evaluation.json").read_text())["rows"]
    printed = " ".join(capsys.readouterr().out.split())
    said = (
        "Images compared with teacher, which has 68, from the same prompts and seeds: student 67 of 69; few 68 of 70."
    )
    for text in (
        printed,
        (tmp_path / "out_student/evaluation.md").read_text(),
        (tmp_path / "out_student/evaluation.html").read_text(),
    ):
        assert said in text
    assert "which has 67, from the same prompts and seeds: fewer all 67." in printed
    found, want = measured["student"][0]["results"], measured["fewer"][0]["results"]
    for key in ("psnr_db", "latent_relative_error", "fid_reference", "diversity", "diversity_pixels"):
        assert found[key] == {end: pytest.approx(value, rel=1e-4) for end, value in want[key].items()}, key


def in_process(config: EvaluateConfig) -> None:
    """tools/evaluate.py without processes of its own."""

    def measure(module: str, arguments: list[str], *_: object) -> None:
        (path,) = arguments
        Path(path).with_name(RESULT).write_text(json.dumps(compare(read_config(Path(path), EvaluateConfig), Share())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_workers", measure)
        result, paths, _ = run.evaluate(config)
        load_tool("evaluate").show(config, result, paths)


def test_samples_of_other_noises_are_refused(inputs: Path, tmp_path: Path) -> None:
    other = write_samples(tmp_path / "other", torch.zeros(IMAGES, 1, 8, 8, dtype=torch.uint8), ["another"] * IMAGES)
    with pytest.raises(
        EvaluationError, match="other and .*teacher have no prompt and seed in common .the first: 'another' with 1000"
    ):
        compare(settings(inputs, samples=[str(other)]), Share())
    (inputs / "few" / "images" / "00003_1003.png").rename(tmp_path / "kept.png")
    try:
        done = run_tool("evaluate", f"samples={inputs / 'few'}", f"out={tmp_path / 'out'}")
    finally:
        (tmp_path / "kept.png").rename(inputs / "few" / "images" / "00003_1003.png")
    assert done.returncode == 2 and "00003_1003.png is missing, and the manifest lists it" in done.stdout


def test_a_damaged_image_is_the_last_that_is_said(inputs: Path, tmp_path: Path) -> None:
    """Of whichever process looks at it; the other one only loses its partner."""
    shutil.copytree(inputs / "few", tmp_path / "few")
    image = sorted(tmp_path.glob("few/images/*.png"))[-1]
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    request = (f"samples={tmp_path / 'few'}", f"out={tmp_path / 'out'}", "launch.device=cpu", "launch.processes=2")
    done = run_tool("evaluate", *request)
    assert done.returncode == 1
    said = done.stdout.rstrip().splitlines()[-2:]
    assert said[0].startswith("error: Process ") and " failed; the other processes were ended too" in said[0]
    assert said[1].startswith(f"{image} is damaged") and said[1].endswith("Delete it, and run tools/sample.py again.")
