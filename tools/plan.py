"""Plan: python tools/plan.py +cluster=a100x64 experiment=qwen_gmm [key=value ...]. Needs no GPU, no data, no teacher.

Prints memory per GPU, messages, time per step, disk and host memory; and where it does not fit, settings that would.
plan.latent=[64,64] and plan.text_length=128 set the sizes; plan.rank=17 shows what one rank holds, plan.json=true prints JSON,
plan.table=true compares clusters and modes.
"""

import json
import sys

from rich.console import Console

from piflow_dist.cli import run_tool
from piflow_dist.config import load_config
from piflow_dist.launch.plan_report import PlannedRun, as_json, planned_shape, print_plan, print_rank, print_table
from piflow_dist.parallel.memory import Planner


def plan(overrides: list[str]) -> None:
    config, console = load_config(overrides, PlannedRun), Console()
    if config.plan.table:
        print_table(overrides, config.plan)
        return
    if config.plan.rank is not None:
        print_rank(config, console)
        return
    planner = Planner(planned_shape(config, config.plan))
    found = planner.plan(config)
    if config.plan.json:
        print(json.dumps(as_json(planner, found), indent=1))
    else:
        print_plan(planner, found, console)


if __name__ == "__main__":
    run_tool(plan, sys.argv[1:], __doc__)
