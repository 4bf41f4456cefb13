"""Compare samples: python tools/evaluate.py samples=[DIR,DIR] reference=DIR [inception=FILE real=IMAGES | dataset=DIR] [key=value ...]

"sources=[{source:RUN,nfe:2},{source:TEACHER,steps:50,guidance:4}]" samples first, as tools/sample.py does. stats=FILE real=IMAGES makes
statistics of real images once. Writes evaluation.html, .md and .json into out= (docs/evaluation.md).
"""

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import DataError
from piflow_dist.cli import fail, run_tool
from piflow_dist.evaluation.comparison import Paths, metrics_of, notes_of, pairs_of, shown
from piflow_dist.evaluation.run import check, describe_plan, evaluate
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.evaluation.settings import EvaluateConfig, load_evaluation
from piflow_dist.help import explain_keys


def main(arguments: list[str]) -> None:
    config = load_evaluation(arguments)
    try:
        if config.launch.dry_run:
            check(config)
            print(describe_plan(config))
            return
        result, paths, lacking = evaluate(config)
    except (EvaluationError, DataError, OSError) as error:
        fail(f"error: {error}", 2)
    show(config, result, paths)
    if lacking:
        fail("error: " + "\n".join(lacking), 1)


def show(config: EvaluateConfig, result: dict[str, Any], paths: Paths | None) -> None:
    if config.stats is not None:
        print(f"{config.stats}: statistics of {result['real']} by {result['network']}.")
    if paths is None:
        return
    metrics = metrics_of(result)
    table = Table(box=box.SIMPLE)
    table.add_column("metric", no_wrap=True)
    for row in result["rows"]:
        table.add_column(f"{row['title']}\n{row['count']} images", justify="right")
    for metric in metrics:
        if any(metric.key in row["results"] for row in result["rows"]):
            cells = [shown(metric, row["results"].get(metric.key)) for row in result["rows"]]
            table.add_row(metric.title, *("\n".join(filter(None, cell)) for cell in cells))
    console = Console()
    console.print(table)
    if (pairs := pairs_of(result)) is not None:
        console.print(pairs, markup=False, soft_wrap=True)
    for note in notes_of(result, metrics):
        console.print(f"not measured: {note}", markup=False, soft_wrap=True)  # paths stay whole
    print(f"Report: {paths.html} (also {paths.markdown.name} and {paths.numbers.name})")


if __name__ == "__main__":
    run_tool(main, sys.argv[1:], f"{__doc__}\nKeys and defaults:\n{explain_keys(EvaluateConfig)}")
