"""Train: python tools/launch.py experiment=demo_gmm [key=value ...]. The same command continues a stopped run."""

import sys
from pathlib import Path

from piflow_dist.cli import run_tool
from piflow_dist.config import Config, load_config, save_config
from piflow_dist.help import explain_keys, list_choices
from piflow_dist.launch.cluster import show_plan, submit
from piflow_dist.launch.continuation import describe_continuation, set_aside
from piflow_dist.launch.local import run_workers
from piflow_dist.launch.lock import only_user
from piflow_dist.launch.preflight import check_run
from piflow_dist.tracking.tracker import tracking_uri, ui_command


def launch(overrides: list[str]) -> None:
    config = load_config(overrides)
    if config.cluster is not None and not config.launch.dry_run:
        submit(config)
        return
    check_run(config)
    for line in describe_continuation(config):
        print(line)
    if config.launch.dry_run:
        print(f"Everything checked; {config.launch.processes} processes would train in {config.run_dir}.")
        if config.cluster is not None:
            show_plan(config)
        return
    with only_user(Path(config.run_dir) / ".lock", f"run_dir={config.run_dir}"):
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
