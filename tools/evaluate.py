"""Measure a folder of samples: python tools/evaluate.py samples=DIR reference=DIR dataset=DIR

Writes metrics.json into the samples' folder.
"""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import DataError
from data_pipeline.settings import list_settings, parse_settings
from piflow_dist.cli import fail, run_tool
from piflow_dist.evaluation.evaluate import EvaluateConfig, evaluate
from piflow_dist.evaluation.metrics import METRICS
from piflow_dist.evaluation.progress import training_progress
from piflow_dist.evaluation.samples import EvaluationError


def main(arguments: list[str]) -> None:
    try:
        options = parse_settings(EvaluateConfig, arguments)
    except ValueError as error:
        fail(f"error: {error}", 2)
    try:
        with training_progress() as progress:
            result = evaluate(
                options.samples,
                options.reference,
                options.dataset,
                cache_dir=options.cache,
                device=options.device,
                progress=progress,
            )
    except (EvaluationError, DataError, OSError) as error:
        fail(f"error: {error}", 2)
    table = Table(title=f"{result['title']}: {result['count']} images", title_justify="left", box=box.SIMPLE)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("")
    for metric in METRICS:
        table.add_row(metric.title, metric.text(result["values"][metric.key]), metric.sense)
    console = Console()
    console.print(table)
    for key, note in result["notes"].items():
        console.print(f"{key}: {note}", markup=False)
    console.print(f"Written to {options.samples}/metrics.json, with the definition of each metric.", markup=False)


if __name__ == "__main__":
    defaults = f"Options and their defaults (piflow_dist/evaluation/evaluate.py explains them):\n{list_settings(EvaluateConfig)}"
    run_tool(main, sys.argv[1:], f"{__doc__}\n{defaults}")
