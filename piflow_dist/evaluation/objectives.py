"""The comparison of objectives (tools/compare.py): measurements of several trainings each, as a table and a figure."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

from piflow_dist.config import Config
from piflow_dist.distill.objectives import needs_uncond
from piflow_dist.evaluation.figures import COLOURS, INK, _figure, _finish
from piflow_dist.evaluation.metrics import METRICS

SHOWN = ("psnr_db", "frechet_reference", "diversity", "prompt_accuracy", "frechet_real")
MARKERS = "osD^v*P"
METHOD_COLOURS = (COLOURS["student"], *COLOURS["teacher"][:3], "#a0522d", "#d0507a")


@dataclass(frozen=True)
class Entry:
    """One source at one number of evaluations: its measurements, one for each training."""

    method: str
    nfe: int
    values: list[dict[str, float | None]]

    def interval(self, key: str) -> tuple[float, float] | None:
        """(mean, half the 95 % interval of the mean over trainings); NaN for a half where there is one training."""
        found = [values[key] for values in self.values if values[key] is not None]
        if not found:
            return None
        if len(found) == 1:
            return found[0], math.nan
        quantile = student_t.ppf(0.975, len(found) - 1)
        return mean(found), float(quantile) * stdev(found) / math.sqrt(len(found))


@dataclass(frozen=True)
class Budget:
    """What a training of one method costs. seconds: of a step, one of the fastest tenth (other work on the machine slows the rest)."""

    method: str
    nfe: str
    steps: int
    teacher_evaluations: int
    student_passes: str
    seconds: float


def budget(method: str, config: Config, runs: Sequence[Path]) -> Budget:
    """From a training's settings and the metrics.jsonl of all of that kind."""
    distill = config.distill
    guided = 2 if needs_uncond(distill.guidance.scale) and not config.model.guidance_embeds else 1
    segments = distill.nfe if config.objective == "imitation_datafree" else 1
    asked = {
        "meanflow": int(distill.meanflow.velocity == "teacher"),
        "shortcut_regression": distill.teacher_substeps,
    }.get(config.objective, distill.num_intermediate_states * segments)
    rows = [json.loads(line)["seconds"] for run in runs for line in (run / "metrics.jsonl").read_text().splitlines()]
    passes = f"{segments} forward and backward" + (", 1 derivative" if config.objective == "meanflow" else "")
    nfe = "any" if config.objective == "meanflow" else str(distill.nfe)
    return Budget(method, nfe, config.train.steps, asked * guided, passes, sorted(rows)[len(rows) // 10])


def text(key: str, interval: tuple[float, float] | None) -> str:
    metric = next(metric for metric in METRICS if metric.key == key)
    if interval is None:
        return "—"
    middle, half = interval
    shown = metric.text(middle)
    if math.isnan(half):
        return shown
    return f"{shown} ± {100 * half:.1f}" if metric.unit == "%" else f"{shown} ± {half:.{metric.digits}f}"


def tables(entries: Sequence[Entry], budgets: Sequence[Budget]) -> str:
    """Markdown: quality by method and number of evaluations, and what the trainings cost."""
    titles = [next(metric.title for metric in METRICS if metric.key == key) for key in SHOWN]
    lines = [
        f"| | NFE | {' | '.join(titles)} |",
        f"|---|---:|{'---:|' * len(SHOWN)}",
        *(
            f"| {entry.method} | {entry.nfe} | {' | '.join(text(key, entry.interval(key)) for key in SHOWN)} |"
            for entry in entries
        ),
        "",
        "| | trained for NFE | steps | teacher evaluations / image and step | student passes | seconds / step (fastest tenth) |",
        "|---|---:|---:|---:|---|---:|",
        *(
            f"| {b.method} | {b.nfe} | {b.steps:,} | {b.teacher_evaluations} | {b.student_passes} | {b.seconds:.3f} |"
            for b in budgets
        ),
    ]
    return "\n".join(lines) + "\n"


def panels(entries: Sequence[Entry]) -> bytes:
    """PNG: one panel a metric over the number of evaluations, with intervals."""
    figure, axes = _figure(1, 4, height=3.5)
    methods = list(dict.fromkeys(entry.method for entry in entries))
    students = [method for method in methods if not method.startswith("teacher")]
    if len(students) > len(METHOD_COLOURS):
        raise ValueError(f"{len(students)} methods, {len(METHOD_COLOURS)} colours: extend METHOD_COLOURS.")
    colours = dict(zip(students, METHOD_COLOURS, strict=False))
    for axis, key in zip(axes, SHOWN, strict=False):
        for place, method in enumerate(methods):
            found = [(e.nfe, *e.interval(key)) for e in entries if e.method == method and e.interval(key)]
            if not found or found[0][0] > 8:  # the reference itself
                continue
            nfes, middles, halves = zip(*found, strict=True)
            shifted = [nfe * 1.04 ** (place - len(methods) / 2) for nfe in nfes]  # so that intervals stay apart
            teacher = method not in colours
            axis.errorbar(
                shifted,
                middles,
                [0 if math.isnan(half) else half for half in halves],
                color=INK if teacher else colours[method],
                linestyle=":" if teacher else "-",
                marker=MARKERS[place % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=method,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({entry.nfe for entry in entries if entry.nfe <= 8}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("NFE")
        axis.set_title(
            next(metric.title for metric in METRICS if metric.key == key), color=INK, loc="left", fontsize=10
        )
        if key == "frechet_reference":
            axis.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=math.ceil(len(labels) / 2),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    return _finish(figure)
