"""tools/launch.py +cluster=NAME: everything is checked on the login node, then submitted, then said how to go on."""

from pathlib import Path

from rich.console import Console

from piflow_dist.config import Config, require
from piflow_dist.launch.continuation import describe_continuation, keep_micro_batch, set_aside
from piflow_dist.launch.local import WorkerFailed
from piflow_dist.launch.lock import LOCK, check_free, note_submitted
from piflow_dist.launch.preflight import check_request
from piflow_dist.launch.site import load_site
from piflow_dist.launch.slurm import Submitted, batch_script, check_accepted, check_slurm, follow, submit
from piflow_dist.tracking.tracker import tracking_uri, ui_command


def launch_on_cluster(configs: list[Config]) -> None:
    """One job, or an array for several runs. Raises ConfigError, with no job submitted, where anything cannot work.

    With launch.follow=true WorkerFailed where the job that was followed has not finished.
    """
    first = configs[0]
    require(
        all((each.cluster, each.launch) == (first.cluster, first.launch) for each in configs),
        "An array's jobs are alike: cluster and launch.* cannot be swept. Submit one sweep for each.",
    )
    load_site()
    if not first.launch.dry_run:
        check_slurm()
    for config in configs:
        check_request(config)
        for line in (*keep_micro_batch(config), *describe_continuation(config)):
            print(line)
        plan(config)
    if first.launch.dry_run:
        print(f"\nThe batch script:\n\n{batch_script(configs)}")
        print(f"Everything checked; {describe(configs)} would be submitted.")
        return
    for config in configs:
        check_free(Path(config.run_dir) / LOCK, f"run_dir={config.run_dir}")
    check_accepted(configs)
    for config in configs:
        if (previous := set_aside(config)) is not None:
            print(f"checkpoint.resume={config.checkpoint.resume}: what is not continued is kept in {previous}.")
        # The job is started again by SLURM, and must not go back, or start afresh, once more.
        config.checkpoint.resume = True
    jobs = submit(configs)
    for job in jobs:
        note_submitted(Path(job.config.run_dir) / LOCK, job.job)
    tell(jobs)
    if first.launch.follow:
        state = follow(jobs[0])
        if state not in ("COMPLETED", "GONE"):
            raise WorkerFailed(f"Job {jobs[0].job}: {state.lower()}. Log: {jobs[0].log}.")
        print(f"Job {jobs[0].job}: {state.lower()}.")


def plan(config: Config) -> None:
    """Show the plan where nothing is submitted. Raises ConfigError where the run does not fit and is to be submitted."""
    # Imported here: it follows the model, which runs on this machine need not wait for.
    from piflow_dist.launch.plan_report import print_plan
    from piflow_dist.parallel.memory import Planner, data_shape

    planner = Planner(data_shape(config, None, None))
    found = planner.plan(config)
    if config.launch.dry_run or not found.fits:
        print_plan(planner, found, Console())
    require(
        found.fits or config.launch.dry_run or not config.launch.must_fit,
        f"{config.run_dir} does not fit on {config.cluster.gpu} by the plan above, and no job was submitted. Change the settings "
        "as proposed there, or set launch.must_fit=false to try it all the same.",
    )


def describe(configs: list[Config]) -> str:
    cluster = configs[0].cluster
    jobs = "a job" if len(configs) == 1 else f"an array of {len(configs)} jobs"
    return f"{jobs} on {cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu}"


def tell(jobs: list[Submitted]) -> None:
    configs = [job.config for job in jobs]
    whole = jobs[0].job if len(jobs) == 1 else jobs[0].job.partition("_")[0]
    print(f"Submitted job {whole}: {describe(configs)}.")
    for job in jobs:
        print(f"  {job.job}  folder  {Path(job.config.run_dir)}")
        print(f"  {job.job}  log     {job.log}")
    print(f"  runs    {ui_command(tracking_uri(configs[0]))}")
    print(f"  follow  tail -F {jobs[0].log}        (launch.follow=true does)")
    print(f"  state   squeue --jobs={whole}")
    print(f"  cancel  scancel {whole}")
    print("  resume  by itself after a preemption, a time limit or a failure; after scancel by the same command")
