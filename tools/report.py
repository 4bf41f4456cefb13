"""Build the report of a run folder: python tools/report.py run=outputs/demo

Writes report.html, report.md (pictures in figures/) and report.json into it.
"""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import DataError
from data_pipeline.settings import list_settings, parse_settings
from piflow_dist.cli import fail, run_tool
from piflow_dist.evaluation.metrics import METRICS
from piflow_dist.evaluation.progress import training_progress
from piflow_dist.evaluation.report import ReportConfig, build_report
from piflow_dist.evaluation.samples import EvaluationError


def main(arguments: list[str]) -> None:
    try:
        options = parse_settings(ReportConfig, arguments)
    except ValueError as error:
        fail(f"error: {error}", 2)
    try:
        with training_progress() as progress:
            paths, rows = build_report(options, progress)
    except (EvaluationError, DataError, OSError) as error:
        fail(f"error: {error}", 2)
    table = Table(title=f"Measured against {options.reference}", title_justify="left", box=box.SIMPLE)
    table.add_column("metric", no_wrap=True)
    for row in rows:
        table.add_column(row.title, justify="right")
    for metric in METRICS:
        table.add_row(metric.title, *(metric.text(row.values[metric.key]) for row in rows))
    console = Console()
    console.print(table)
    console.print(f"Report: {paths.html} (also {paths.markdown.name} and {paths.metrics.name})", markup=False)


if __name__ == "__main__":
    defaults = (
        f"Options and their defaults (piflow_dist/evaluation/report.py explains them):\n{list_settings(ReportConfig)}"
    )
    run_tool(main, sys.argv[1:], f"{__doc__}\n{defaults}")
