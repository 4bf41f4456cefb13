"""The report of an evaluation: one HTML file, one markdown table with its pictures, and the numbers as JSON."""

import base64
import json
import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from piflow_dist.evaluation import figures
from piflow_dist.evaluation.evaluate import write_atomically
from piflow_dist.evaluation.metrics import Metric
from piflow_dist.evaluation.quality import QUALITY
from piflow_dist.evaluation.report import render
from piflow_dist.evaluation.samples import EvaluationError, SampleFolder, distinct_titles, open_samples

log = logging.getLogger(__name__)

COLUMNS = 8
GRIDS = 3
EN_DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Paths:
    html: Path
    markdown: Path
    numbers: Path
    pictures: list[Path]


def metrics_of(result: dict[str, Any]) -> list[Metric]:
    """The table's metrics, the user's own scores after the others that judge a prompt."""
    own = [
        Metric(
            key=name,
            title=name,
            better="higher",
            digits=3,
            definition=result["definitions"].get(name, "Score of your own."),
        )
        for name in result["rewards"]
    ]
    at = next(number for number, metric in enumerate(QUALITY) if metric.key == "prompt_accuracy")
    return [*QUALITY[:at], *own, *QUALITY[at:]]


def shown(metric: Metric, found: dict[str, float | None] | None) -> tuple[str, str]:
    """(value, interval) as text; the interval is empty where there is none."""
    if found is None:
        return metric.text(None), ""
    if found["low"] is None:
        return metric.text(found["value"]), ""
    low, high = (metric.text(found[end]).replace(f"{metric.unit}", "").strip() for end in ("low", "high"))
    return metric.text(found["value"]), f"{low} {EN_DASH} {high}"


def notes_of(result: dict[str, Any], metrics: list[Metric]) -> list[str]:
    """Reasons for missing values, each once, with the sources it is true of."""
    titles = {metric.key: metric.title for metric in metrics}
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in result["rows"]:
        for key, note in row["notes"].items():
            if note != "this is the reference.":
                reasons.setdefault(note, {}).setdefault(row["title"], []).append(titles.get(key, key))
    lines = []
    for note, by_row in reasons.items():
        every = len(by_row) == len(result["rows"]) and len({tuple(keys) for keys in by_row.values()}) == 1
        where = "" if every else f" ({'; '.join(by_row)})"
        keys = list(dict.fromkeys(key for keys in by_row.values() for key in keys))
        lines.append(f"{', '.join(keys)}{where}: {note}")
    return lines


def pairs_of(result: dict[str, Any]) -> str | None:
    """How many images were compared with the reference's; None where there is nothing to compare."""
    theirs, told = result["reference_count"], []
    for row in result["rows"]:
        if row["pairs"] is not None:
            whole = row["pairs"] == row["count"] == theirs
            told.append(f"{row['name']} " + (f"all {theirs}" if whole else f"{row['pairs']} of {row['count']}"))
    if not told:
        return None
    return f"Images compared with {result['reference']}, which has {theirs}, from the same prompts and seeds: {'; '.join(told)}."


def draw(titled: list[tuple[str, SampleFolder]]) -> dict[str, bytes]:
    """Grids: a column is one prompt and seed, a row one source, by its title. The first columns, not picked."""
    prompts, noises = titled[0][1].prompts, titled[0][1].noises
    places = [{noise: place for place, noise in enumerate(samples.noises)} for _, samples in titled]
    order = figures.choose_columns(prompts, prompts, COLUMNS * GRIDS)
    names = figures.short_names(prompts)
    pictures = {}
    for number in range(GRIDS):
        columns = order[number * COLUMNS : (number + 1) * COLUMNS]
        if not columns:
            break
        rows = [
            figures.GridRow(
                label=title, images=[samples.image(at[noises[i]]) if noises[i] in at else None for i in columns]
            )
            for (title, samples), at in zip(titled, places, strict=True)
        ]
        pictures[f"grid_{number + 1}"] = figures.grid(
            rows, [names[prompts[index]] for index in columns], figures.tile_for(rows[0].images)
        )
    return pictures


def write_comparison(result: dict[str, Any], out: Path, name: str) -> Paths:
    """<name>.html (pictures inside), <name>.md (pictures in figures/) and <name>.json; of these the HTML last. Raises EvaluationError."""
    folders = [open_samples(row["folder"]) for row in result["rows"]]
    if result["reference"] is not None and result["reference_folder"] not in {row["folder"] for row in result["rows"]}:
        folders.append(open_samples(result["reference_folder"]))
    titled = list(zip(distinct_titles(folders), folders, strict=True))
    aligned = [(title, samples) for title, samples in titled if set(samples.noises) & set(folders[0].noises)]
    metrics = metrics_of(result)
    present = [metric for metric in metrics if any(metric.key in row["results"] for row in result["rows"])]
    pictures = draw(aligned)
    context = {
        "title": "Evaluation: " + "; ".join(row["title"] for row in result["rows"]),
        "rows": result["rows"],
        "metrics": present,
        "shown": shown,
        "notes": notes_of(result, metrics),
        "pairs": pairs_of(result),
        "intervals": result["intervals"] if result["resamples"] else "No intervals were computed (resamples=0).",
        "network": result["network"],
        "real": result["real"],
        "reference": next((title for title, s in titled if str(s.path) == result["reference_folder"]), None),
        "left_out": [samples.name for title, samples in titled if (title, samples) not in aligned],
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    figure_dir = out / "figures"
    try:
        figure_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"The report cannot be written to {out} ({error}). Set out=DIR.") from error
    files = {key: figure_dir / f"{name}_{key}.png" for key in pictures}
    for key, data in pictures.items():
        write_atomically(files[key], data)
    inline = {key: "data:image/png;base64," + base64.b64encode(data).decode() for key, data in pictures.items()}
    linked = {key: f"figures/{path.name}" for key, path in files.items()}
    paths = Paths(out / f"{name}.html", out / f"{name}.md", out / f"{name}.json", list(files.values()))
    write_atomically(paths.numbers, json.dumps(result, indent=1) + "\n")
    plain = [replace(metric, title=metric.title.replace("|", "/")) for metric in present]
    write_atomically(
        paths.markdown, render("evaluation.md.j2", context | {"pictures": linked, "metrics": plain}, escape=False)
    )
    write_atomically(paths.html, render("evaluation.html.j2", context | {"pictures": inline}, escape=True))
    for row in result["rows"]:
        write_beside(row, result)
    return paths


def write_beside(row: dict[str, Any], result: dict[str, Any]) -> None:
    """A source's numbers beside its images too, as the demo's report does, where that folder may be written."""
    numbers = {key: value for key, value in result.items() if key != "rows"} | row
    try:
        write_atomically(Path(row["folder"]) / "metrics.json", json.dumps(numbers, indent=1) + "\n")
    except EvaluationError as error:
        log.warning("%s The report has these numbers too.", error)


def tracked_values(result: dict[str, Any]) -> dict[str, float]:
    """ "source/metric" -> value, for MLflow."""
    return {f"{row['name']}/{key}": found["value"] for row in result["rows"] for key, found in row["results"].items()}
