"""The report of a run: pictures, quality, loss, time and settings; one HTML file, and markdown with PNG files."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf

from piflow_dist.evaluation import figures, metrics
from piflow_dist.evaluation.evaluate import Evaluation, Judge, as_json, write_atomically
from piflow_dist.evaluation.facts import (
    chosen_settings,
    duration,
    machine,
    next_steps,
    read_timings,
    read_yaml,
    sampling_settings,
    title_of,
)
from piflow_dist.evaluation.metrics import METRICS
from piflow_dist.evaluation.samples import EvaluationError, SampleFolder, check_same_noises, load_samples, read_jsonl
from piflow_dist.evaluation.verdict import LEVEL_TEXT, targets, verdict

COLUMNS = 10
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(kw_only=True)
class ReportConfig:
    """Builds report.html and report.md from a run folder."""

    run: str = "outputs/demo"
    """Run folder; holds timings.json, and the folders below unless they are given."""
    out: str | None = None
    """Where the report goes; default: the run folder."""
    name: str = "report"
    """File name without ending."""
    samples: str | None = None
    """Folder of sample folders; default: RUN/samples."""
    sources: str = "teacher_100,teacher_8,teacher_4,student_gmm_4"
    """Sample folders to compare, in the order of rows, separated by commas."""
    reference: str = "teacher_100"
    """The source that the others are compared with, image by image."""
    teacher: str | None = None
    """Training folder of the teacher (metrics.jsonl); default: RUN/teacher."""
    student: str | None = None
    """Training folder of the student (metrics.jsonl, config.yaml); default: RUN/student_gmm."""
    dataset: str | None = None
    """Folder that tools/prepare_data.py wrote; default: RUN/data."""
    cache: str = "outputs/feature_net"
    """Folder that keeps the trained feature network."""
    device: str = "cpu"
    """Where the feature network runs: cpu or cuda."""
    mlflow: str | None = None
    """Command that opens the MLflow runs, printed in the report."""
    another: str | None = None
    """Command that makes another kind of student, printed in the report."""

    @property
    def source_names(self) -> list[str]:
        return [name.strip() for name in self.sources.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    html: Path
    markdown: Path
    metrics: Path


def build_report(
    config: ReportConfig, progress: Callable[[int, int], None] | None = None
) -> tuple[ReportPaths, list[Evaluation]]:
    """Evaluate every source of a run folder and write the report. Raises EvaluationError naming all that is missing."""
    run = Path(config.run)
    teacher, student = Path(config.teacher or run / "teacher"), Path(config.student or run / "student_gmm")
    samples_root, dataset = Path(config.samples or run / "samples"), Path(config.dataset or run / "data")
    check_complete(config, run, samples_root, teacher, student, dataset)

    folders = {name: load_samples(samples_root / name) for name in config.source_names}
    reference = folders[config.reference]
    for folder in folders.values():
        check_same_noises(folder, reference)
    curves = [
        (title, read_jsonl(path / "metrics.jsonl", ("step", "loss")))
        for title, path in (("Teacher: flow matching", teacher), ("Student: imitation", student))
    ]
    settings = read_yaml(student / "config.yaml")
    timings = read_timings(run / "timings.json")

    judge = Judge.from_dataset(dataset, cache_dir=config.cache, device=config.device, progress=progress)
    rows = [judge.measure_real()]
    for folder in folders.values():
        rows.append(judge.measure(folder, reference))
        result = as_json(rows[-1], judge, folder, reference, dataset)
        write_atomically(folder.path / "metrics.json", json.dumps(result, indent=2) + "\n")
    pictures = draw(folders, reference, judge, curves)
    facts = {
        "title": title_of(settings),
        "count": len(reference),
        "reference": reference.phrase,
        "settings": chosen_settings(settings) | sampling_settings(folders.values()),
        "config": OmegaConf.to_yaml(settings),
        "timings": timings,
        "machine": machine(),
        "mlflow": config.mlflow,
        "next": next_steps(samples_root / config.source_names[-1], reference.path, dataset, teacher, config.another),
        "net": judge.feature_net,
        "test_images": len(judge.test_prompts),
        "real_images": len(judge.real_features_BD),
    }
    paths = write_report(Path(config.out or run), config.name, rows, config.reference, pictures, facts)
    return paths, rows


def write_report(
    out_dir: Path,
    name: str,
    rows: Sequence[Evaluation],
    reference: str,
    pictures: dict[str, bytes],
    facts: dict[str, Any],
) -> ReportPaths:
    """Write <name>.html (one file, pictures inside), <name>.md (pictures in figures/) and <name>.json (the numbers).

    Each file is replaced at once; the HTML comes last, so that its presence means that the report is whole.
    """
    figure_dir = out_dir / "figures"
    try:
        figure_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"The report cannot be written to {out_dir} ({error}). Set out=DIR.") from error
    for key, data in pictures.items():
        write_atomically(figure_dir / f"{name}_{key}.png", data)
    context = facts | {
        "rows": rows,
        "metrics": METRICS,
        "verdict": verdict(rows, reference),
        "level": LEVEL_TEXT,
        "targets": targets(rows, reference),
        "notes": gather_notes(rows),
        "total": sum(facts["timings"].values()),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "duration": duration,
    }
    inline = {key: "data:image/png;base64," + base64.b64encode(data).decode() for key, data in pictures.items()}
    linked = {key: f"figures/{name}_{key}.png" for key in pictures}
    paths = ReportPaths(
        html=out_dir / f"{name}.html", markdown=out_dir / f"{name}.md", metrics=out_dir / f"{name}.json"
    )
    numbers = {
        "reference": reference,
        "rows": [asdict(row) for row in rows],
        "verdict": context["verdict"],
        "targets": [asdict(target) for target in context["targets"]],
    }
    write_atomically(paths.metrics, json.dumps(numbers, indent=2) + "\n")
    write_atomically(paths.markdown, render("report.md.j2", context | {"pictures": linked}, escape=False))
    write_atomically(paths.html, render("report.html.j2", context | {"pictures": inline}, escape=True))
    return paths


def check_complete(
    config: ReportConfig, run: Path, samples_root: Path, teacher: Path, student: Path, dataset: Path
) -> None:
    """Raise EvaluationError listing every missing piece at once."""
    if config.reference not in config.source_names:
        raise EvaluationError(f"reference={config.reference} is not among sources={config.sources}. Add it there.")
    needed = {
        run / "timings.json": "seconds of each stage",
        teacher / "metrics.jsonl": "the teacher's training; set teacher=DIR if it is elsewhere",
        student / "metrics.jsonl": "the student's training; set student=DIR if it is elsewhere",
        student / "config.yaml": "the student's resolved settings",
        dataset / "dataset.json": "the data set; set dataset=DIR if it is elsewhere",
    } | {
        samples_root / name / "meta.json": "finished samples; make them with tools/sample.py"
        for name in config.source_names
    }
    missing = [f"  {path}: {what}" for path, what in needed.items() if not path.is_file()]
    if missing:
        raise EvaluationError(f"{run} is not complete. Missing:\n" + "\n".join(missing))


def draw(
    folders: dict[str, SampleFolder],
    reference: SampleFolder,
    judge: Judge,
    curves: list[tuple[str, list[dict[str, Any]]]],
) -> dict[str, bytes]:
    """The report's pictures by name, as PNG."""
    others = {name: folder for name, folder in folders.items() if folder is not reference}
    psnr = {name: metrics.psnr_per_image(folder.images_BCHW, reference.images_BCHW) for name, folder in others.items()}
    names = figures.short_names(reference.prompts)
    chosen = figures.choose_columns(reference.prompts, judge.test_prompts, COLUMNS)
    rows = [figures.GridRow(label=folder.title, images=folder.images_BCHW[chosen]) for folder in folders.values()]
    wanted = [reference.prompts[index] for index in chosen]
    real = [judge.test_images_BCHW[index] for index in real_for(wanted, judge.test_prompts)]
    pictures = {
        "grid": figures.grid([figures.GridRow(label="real", images=real), *rows], [names[prompt] for prompt in wanted]),
        "loss": figures.loss_curves(curves),
    }
    if psnr:
        sources = [(folder.title, folder.kind, psnr[name]) for name, folder in others.items()]
        pictures["psnr"] = figures.psnr_histogram(sources, reference.phrase)
    student = next((name for name, folder in others.items() if folder.kind == "student"), None)
    if student is not None:
        worst = psnr[student].argsort()[:COLUMNS].tolist()
        rows = [figures.GridRow(label=folder.title, images=folder.images_BCHW[worst]) for folder in folders.values()]
        pictures["worst"] = figures.grid(rows, [f"{psnr[student][index]:.1f} dB" for index in worst])
    return pictures


def real_for(prompts: Sequence[str], real_prompts: Sequence[str]) -> list[int]:
    """For each prompt the index of a real image of it: the first not used yet."""
    left: dict[str, list[int]] = {}
    for index, prompt in enumerate(real_prompts):
        left.setdefault(prompt, []).append(index)
    chosen = []
    for prompt in prompts:
        if not left.get(prompt):
            raise EvaluationError(
                f"The test split has no real image left to show for {prompt!r}. Prepare a larger test split."
            )
        chosen.append(left[prompt].pop(0))
    return chosen


def gather_notes(rows: Sequence[Evaluation]) -> list[str]:
    """Why values are missing, without the two plain cases (the reference itself, real images)."""
    plain = ("this is the reference.", "real images come from no noise.")
    titles = {metric.key: metric.title for metric in METRICS}
    return [
        f"{row.title}, {titles[key]}: {note}" for row in rows for key, note in row.notes.items() if note not in plain
    ]


def render(template: str, context: dict[str, Any], escape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(context)
