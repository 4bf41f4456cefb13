"""The report: what it says follows from the numbers, and it is one small file that needs nothing else."""

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from evaluation_samples import striped_images, write_samples, write_training
from omegaconf import OmegaConf
from PIL import Image

from piflow_dist.evaluation import evaluate as evaluate_module
from piflow_dist.evaluation import facts, figures
from piflow_dist.evaluation.evaluate import Evaluation
from piflow_dist.evaluation.metrics import METRICS
from piflow_dist.evaluation.report import ReportConfig, ReportPaths, build_report
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.evaluation.verdict import compare, targets, verdict

Built = tuple[ReportPaths, list[Evaluation]]
NOISE = {"teacher_100": 0, "teacher_8": 3, "teacher_4": 30, "student_gmm_4": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of 99 samples in three prompts, with a stage name that would upset a careless page."""
    run = tmp_path_factory.mktemp("run")
    images, prompts = striped_images(99, 2)
    generator = torch.Generator().manual_seed(0)
    for name, noise in NOISE.items():
        noisy = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        kind, steps = name.split("_")[0], name.split("_")[-1]
        write_samples(
            run / "samples" / name,
            noisy,
            prompts,
            kind=kind,
            steps=int(steps),
            seconds=float(steps),
            evaluations_per_step=2 if kind == "teacher" else 1,
        )
    write_training(run / "teacher")
    write_training(run / "student_gmm", seed=1)
    (run / "timings.json").write_text('{"data": 12.5, "teacher <b>": 95.2, "student": 130}')
    (run / "data").mkdir()
    (run / "data" / "dataset.json").write_text("{}")
    return run


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    splits = {"train": striped_images(900, 0), "test": striped_images(90, 1)}
    config = ReportConfig(run=str(run), cache=str(tmp_path_factory.mktemp("cache")), mlflow="mlflow ui --port 5000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "read_real_images", lambda root, split: splits[split])
        return build_report(config)


def test_the_html_is_small_and_needs_nothing_else(built: Built) -> None:
    html = built[0].html.read_text()
    assert built[0].html.stat().st_size < 1_000_000
    sources = re.findall(r'(?:src|href)="(.*?)"', html)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert "http" not in html and "<script" not in html and "prefers-color-scheme: dark" in html


def test_the_html_says_what_was_measured(built: Built) -> None:
    html = built[0].html.read_text()
    assert "Student: GMFlow policy (K = 8), 4 NFE, distilled on data" in html
    assert "mlflow ui --port 5000" in html and "1 min 35 s" in html and "teacher &lt;b&gt;" in html
    for row in built[1]:
        assert f">{row.title}</td>" in html
    student = built[1][-1]
    assert f">{student.values['psnr_db']:.1f}</td>" in html
    assert "nan" not in re.sub(r'base64,[^"]*', "", html).lower()


def test_the_markdown_has_its_pictures_beside_it(built: Built, run: Path) -> None:
    text = built[0].markdown.read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) == 4 and all((run / link).is_file() for link in links)
    table = [line for line in text.splitlines() if line.startswith("| ") and "Frechet" in line or "teacher, 8" in line]
    assert len({line.count("|") for line in table[:2]}) == 1


def test_the_numbers_are_kept_for_machines(built: Built, run: Path) -> None:
    numbers = json.loads(built[0].metrics.read_text())
    assert [row["name"] for row in numbers["rows"]] == ["real", *NOISE]
    assert numbers["rows"][-1]["values"] == built[1][-1].values
    assert json.loads((run / "samples" / "student_gmm_4" / "metrics.json").read_text())["values"] == built[1][-1].values
    assert not [path for path in run.rglob(".*")]


def test_missing_pieces_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as error:
        build_report(ReportConfig(run=str(tmp_path / "run")))
    for piece in (
        "timings.json",
        "teacher/metrics.jsonl",
        "student_gmm/config.yaml",
        "data/dataset.json",
        "samples/teacher_100/meta.json",
        "samples/student_gmm_4/meta.json",
    ):
        assert f"{tmp_path}/run/{piece}" in str(error.value)
    with pytest.raises(EvaluationError, match="reference=teacher_50 is not among sources=a,b"):
        build_report(ReportConfig(run=str(tmp_path), sources="a,b", reference="teacher_50"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("timings.json", "[1]", "should hold seconds by stage"),
        ("timings.json", "{", "is not JSON"),
        ("student_gmm/config.yaml", "a: [", "is not yaml"),
        ("student_gmm/config.yaml", "[1, 2]", "holds no settings by name"),
        ("student_gmm/metrics.jsonl", '{"step": 1, "loss": NaN}\n', "Student: imitation hold no finite"),
    ],
)
def test_damaged_pieces_are_named(
    built: Built, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    splits = {"train": striped_images(900, 0), "test": striped_images(90, 1)}
    monkeypatch.setattr(evaluate_module, "read_real_images", lambda root, split: splits[split])
    path = run / name
    before = path.read_text()
    path.write_text(content)
    try:
        with pytest.raises(EvaluationError, match=message):
            build_report(ReportConfig(run=str(run), out=str(tmp_path), cache=str(tmp_path / "cache")))
    finally:
        path.write_text(before)
    assert not (tmp_path / "report.html").exists()


def row(name: str, **values: float | None) -> Evaluation:
    kind, steps = name.split("_")
    phrase = f"student at {steps} NFE" if kind == "student" else f"{steps}-step teacher"
    found = dict.fromkeys(metric.key for metric in METRICS) | values
    return Evaluation(name=name, title=name, phrase=phrase, kind=kind, steps=int(steps), count=500, values=found)


PROTOTYPE = [
    row("teacher_100", prompt_accuracy=0.974, images_per_second=3.0, evaluations_per_image=200, diversity=1.0),
    row("teacher_8", psnr_db=32.1, frechet_reference=0.61, diversity=0.93, prompt_accuracy=0.97),
    row("teacher_4", psnr_db=26.9, frechet_reference=2.75, diversity=0.85, prompt_accuracy=0.974),
    row("student_4", psnr_db=30.3, frechet_reference=0.62, diversity=0.98, prompt_accuracy=0.966,
        images_per_second=120.0, evaluations_per_image=4),
]  # fmt: skip


def test_the_verdict_follows_the_numbers() -> None:
    about_4, about_8, prompts, speed = verdict(PROTOTYPE, "teacher_100")[1:]
    assert "ahead in PSNR (30.3 against 26.9\N{NO-BREAK SPACE}dB), Frechet distance (0.62 against 2.75)" in about_4
    assert "level in prompt accuracy" in about_4 and "behind" not in about_4 and "4-step teacher" in about_4
    assert "ahead in diversity (0.98 against 0.93); level in Frechet distance (0.62 against 0.61)" in about_8
    assert "behind in PSNR (30.3 against 32.1" in about_8
    assert "96.6" in prompts and "97.4" in prompts
    assert "40.0 times as many (4 against 200 network evaluations an image)" in speed


def test_the_verdict_admits_a_bad_student() -> None:
    worse = dataclasses.replace(
        PROTOTYPE[-1], values=PROTOTYPE[-1].values | {"psnr_db": 20.0, "frechet_reference": 9.0, "diversity": 1.4}
    )
    about_4 = verdict([*PROTOTYPE[:-1], worse], "teacher_100")[1]
    assert "ahead" not in about_4 and "behind in PSNR" in about_4 and "diversity (1.40 against 0.85)" in about_4
    met = {target.what: target.met for target in targets([*PROTOTYPE[:-1], worse], "teacher_100")}
    assert list(met.values()) == [True, False, False, False, True, False, False]


def test_the_verdict_leaves_out_what_was_not_measured() -> None:
    empty = [row("teacher_100"), row("teacher_4"), row("student_4")]
    assert verdict(empty, "teacher_100")[1].endswith("nothing could be compared.")
    assert {target.met for target in targets(empty, "teacher_100")} == {None}
    assert targets(PROTOTYPE[:-1], "teacher_100") == []


def test_targets_of_the_prototype_are_met() -> None:
    found = targets(PROTOTYPE, "teacher_100")
    assert len(found) == 7 and all(target.met for target in found)
    assert found[5].measured == "30.30 against 26.90\N{NO-BREAK SPACE}dB"


def test_the_verdict_warns_of_a_reference_that_does_not_draw_its_prompts() -> None:
    real = dataclasses.replace(
        PROTOTYPE[0], name="real", kind="real", values=PROTOTYPE[0].values | {"prompt_accuracy": 0.99}
    )
    bad = dataclasses.replace(PROTOTYPE[0], values=PROTOTYPE[0].values | {"prompt_accuracy": 0.1})
    assert "nearness to it is not quality" in verdict([real, bad, *PROTOTYPE[1:]], "teacher_100")[0]
    assert not targets([real, bad, *PROTOTYPE[1:]], "teacher_100")[0].met
    good = verdict([real, *PROTOTYPE], "teacher_100")[0]
    assert "97.4\N{NO-BREAK SPACE}% are classified as their prompt (99.0\N{NO-BREAK SPACE}% of real images)." in good


@pytest.mark.parametrize(
    ("key", "mine", "theirs", "word"),
    [
        ("psnr_db", 30.0, 30.4, "level"), ("psnr_db", 31.0, 30.4, "ahead"),
        ("frechet_reference", 0.62, 0.61, "level"), ("frechet_reference", 0.7, 0.6, "behind"),
        ("diversity", 1.05, 0.95, "level"), ("diversity", 1.1, 0.95, "behind"), ("diversity", 0.99, 0.9, "ahead"),
        ("prompt_accuracy", 0.95, 0.96, "level"), ("prompt_accuracy", 0.94, 0.96, "behind"),
    ],
)  # fmt: skip
def test_level_has_a_stated_width(key: str, mine: float, theirs: float, word: str) -> None:
    assert compare(key, mine, theirs) == word


def test_columns_are_not_picked() -> None:
    prompts = ["b", "b", "a", "a", "c"]
    assert figures.choose_columns(prompts, ["a", "b"], 4) == [2, 0, 4, 3]
    assert figures.choose_columns(prompts, [], 10) == [0, 2, 4, 1, 3]


def test_headings_leave_out_what_all_prompts_share() -> None:
    assert figures.short_names(["a written one", "a written two"]) == {"a written one": "one", "a written two": "two"}
    assert figures.short_names(["a cat"]) == {"a cat": "a cat"}
    assert figures.short_names(["a cat", "a cat with hat"])["a cat"] == "a cat"


def test_the_grid_shows_grey_and_colour_images_of_any_size() -> None:
    rows = [
        figures.GridRow(label="grey", images=torch.full((3, 1, 32, 32), 255, dtype=torch.uint8)),
        figures.GridRow(label="colour", images=torch.zeros(3, 3, 200, 200, dtype=torch.uint8)),
    ]
    picture = Image.open(io.BytesIO(figures.grid(rows, ["x", "y", "z"])))
    assert picture.mode == "RGBA" and picture.height == 28 + 2 * (figures.TILE + 4)
    assert picture.getpixel((picture.width - 50, 60)) == (255, 255, 255, 255)
    with pytest.raises(ValueError, match="'grey' has 3 images for 1 columns"):
        figures.grid(rows, ["x"])


def test_a_loss_curve_keeps_the_last_entry_of_a_step_and_leaves_out_skipped_ones() -> None:
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": None},
            {"step": 4, "loss": float("nan")}, {"step": 5, "loss": 2.0}]  # fmt: skip
    steps, losses = figures.clean_curve("run", rows)
    assert (steps.tolist(), losses.tolist()) == ([1, 2, 5], [5.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({"objective": "imitation", "policy": {"type": "dx", "mode": "grid", "num_nodes": 10}, "distill": {"nfe": 2}},
         "Student: DX policy (grid, N = 10), 2 NFE, distilled on data"),
        ({"objective": "imitation_datafree", "policy": {"type": "gmflow", "num_components": 8}, "distill": {"nfe": 4}},
         "Student: GMFlow policy (K = 8), 4 NFE, distilled without data"),
        ({"objective": "new", "policy": {"type": "other"}}, "Student: policy other, None NFE, objective new"),
    ],
)  # fmt: skip
def test_the_title_names_the_demo(settings: dict, title: str) -> None:
    assert facts.title_of(OmegaConf.create(settings)) == title


def test_durations() -> None:
    assert [facts.duration(seconds) for seconds in (0.26, 9.96, 12.5, 95.2, 600)] == [
        "0.3 s", "10.0 s", "12 s", "1 min 35 s", "10 min 0 s",
    ]  # fmt: skip
