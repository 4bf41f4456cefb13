"""Train: python tools/launch.py experiment=demo_gmm [key=value ...]. The same command continues a stopped run.

+cluster=NAME submits the run to SLURM instead (docs/cluster.md); launch.dry_run=true only checks, and shows what would be submitted.
-m key=a,b trains every combination: one after the other, or as an array of jobs.
"""

import sys
from pathlib import Path

from piflow_dist.cli import run_tool
from piflow_dist.config import Config, load_config, save_config
from piflow_dist.help import explain_keys, list_choices
from piflow_dist.launch.continuation import describe_continuation, keep_micro_batch, set_aside
from piflow_dist.launch.local import run_workers
from piflow_dist.launch.lock import LOCK, only_user
from piflow_dist.launch.preflight import check_run
from piflow_dist.launch.sweep import expand
from piflow_dist.tracking.tracker import tracking_uri, ui_command


def launch(arguments: list[str]) -> None:
    configs = [load_config(overrides) for overrides in expand(arguments)]
    if configs[0].cluster is not None and configs[0].cluster.scheduler == "slurm":
        from piflow_dist.launch.cluster import launch_on_cluster

        launch_on_cluster(configs)
        return
    for config in configs:
        launch_here(config)


def launch_here(config: Config) -> None:
    check_run(config)
    for line in (*keep_micro_batch(config), *describe_continuation(config)):
        print(line)
    if config.launch.dry_run:
        if config.cluster is not None:
            from piflow_dist.launch.cluster import plan

            plan(config)
        print(f"Everything checked; {config.launch.processes} processes would train in {config.run_dir}.")
        return
    with only_user(Path(config.run_dir) / LOCK, f"run_dir={config.run_dir}"):
        train_here(config)
    print(f"Finished: {config.run_dir}. Runs: {ui_command(tracking_uri(config))}")


def train_here(config: Config) -> None:
    run_dir = Path(config.run_dir)
    if (previous := set_aside(config)) is not None:
        if config.checkpoint.goes_back:
            print(f"checkpoint.resume={config.checkpoint.resume}: the later checkpoints are kept in {previous}.")
        else:
            print(f"checkpoint.resume=false: the earlier training is kept in {previous}.")
    path = run_dir / "config.yaml"
    save_config(config, path)
    run_workers("piflow_dist.train", [str(path)], config.launch, run_dir / "logs")


if __name__ == "__main__":
    run_tool(
        launch,
        sys.argv[1:],
        f"{__doc__}\nChoices:\n{list_choices(Config)}\n\nKeys and defaults:\n{explain_keys(Config)}",
    )
