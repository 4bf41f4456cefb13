"""A run on a cluster: for now it is checked and planned. Submission takes the place of `submit`."""

from pathlib import Path

from rich.console import Console

from piflow_dist.config import Config, ConfigError


def submit(config: Config) -> None:
    raise ConfigError(
        f"Runs are not submitted to a cluster yet (+cluster, {config.cluster.nodes} x {config.cluster.gpus_per_node} "
        f"{config.cluster.gpu}). Use launch.dry_run=true to check and plan the run, or leave +cluster away to train on this "
        f"machine in run_dir={Path(config.run_dir)}."
    )


def show_plan(config: Config) -> None:
    # Imported here: it follows the model, which other runs need not wait for.
    from piflow_dist.launch.plan_report import print_plan
    from piflow_dist.parallel.memory import Planner, data_shape

    planner = Planner(data_shape(config, None, None))
    print_plan(planner, planner.plan(config), Console())
