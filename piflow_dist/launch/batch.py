"""What batch scripts (slurm/common.sh) ask on a job's first node: `python -m piflow_dist.launch.batch COMMAND ...`.

prepare key=value ...   check a training and write its configuration; prints the run folder
claim RUN_DIR           make this job the one that trains there, where nobody else does
after RUN_DIR CODE      what comes after the processes ended with CODE: exit code, and on stdout the seconds to wait before a retry
sample key=value ...    check a request for images and write its settings; prints the folder, or nothing where all is there
gather DIR              join the images that the tasks made
failed DIR              say what a task of sampling or evaluation failed of
evaluate key=value ...  check a request for metrics; prints the settings' file, or nothing with launch.dry_run
report SETTINGS         write the report of what the tasks measured
"""

import os
import sys
from pathlib import Path

from piflow_dist.config import Config, ConfigError, load_config, read_config, require, save_config
from piflow_dist.launch.exits import FAILED, REFUSED, STOPPED
from piflow_dist.launch.failure_record import failure_path, read_failure
from piflow_dist.launch.lock import LOCK, claim, release
from piflow_dist.launch.restarts import decide


def tell(text: str) -> None:
    """To people: stdout is read by the script."""
    print(text, file=sys.stderr, flush=True)


def with_tasks(overrides: list[str]) -> list[str]:
    """The job's tasks are the processes, whatever the experiment says (a cluster says so itself)."""
    return [*overrides, f"launch.processes={os.environ['SLURM_NTASKS']}"]


def check_tasks(config: Config) -> None:
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    require(
        config.launch.processes == tasks,
        f"cluster.nodes={config.cluster and config.cluster.nodes} and cluster.gpus_per_node are for {config.launch.processes} "
        f"processes, but this job has {tasks} tasks. Give sbatch --nodes and --ntasks-per-node to match, or no +cluster.",
    )
    require(
        tasks % nodes == 0 and (tasks // nodes) % config.parallel.tp == 0,
        f"parallel.tp={config.parallel.tp} does not divide the tasks of a node ({tasks} on {nodes} nodes): a group would span "
        "two nodes. Choose a divisor of --ntasks-per-node.",
    )


def prepare(overrides: list[str]) -> None:
    from piflow_dist.launch.continuation import describe_continuation, keep_micro_batch, set_aside
    from piflow_dist.launch.preflight import check_request

    # A job that is requeued runs this again: only its first attempt may set an earlier training aside.
    again = ["checkpoint.resume=true"] if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else []
    config = load_config([*with_tasks(overrides), *again])
    check_tasks(config)
    check_request(config)
    claim_run([config.run_dir])
    for line in (*keep_micro_batch(config), *describe_continuation(config)):
        tell(line)
    if (previous := set_aside(config)) is not None:
        tell(f"checkpoint.resume={config.checkpoint.resume}: what is not continued is kept in {previous}.")
    prepare_run_dir(config)
    print(config.run_dir)


def prepare_run_dir(config: Config) -> None:
    run_dir = Path(config.run_dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    failure_path(run_dir).unlink(missing_ok=True)
    save_config(config, run_dir / "config.yaml")


def claim_run(arguments: list[str]) -> None:
    run_dir = Path(arguments[0])
    claim(run_dir / LOCK, f"run_dir={run_dir}")
    failure_path(run_dir).unlink(missing_ok=True)  # of an earlier attempt


def after(arguments: list[str]) -> int:
    run_dir, code = Path(arguments[0]), int(arguments[1])
    decision = decide(run_dir, os.environ.get("SLURM_JOB_ID", "none"), code)
    if decision.code != STOPPED:
        release(run_dir / LOCK)
    tell(decision.message)
    failure = read_failure(run_dir)
    if code and failure is not None:
        tell(failure.describe())  # the last lines of the log
    print(decision.wait)
    return decision.code


def sample(overrides: list[str]) -> None:
    from piflow_dist.sampling.gather import prepare_folder
    from piflow_dist.sampling.run import describe_plan, lock_of, open_request, write_settings
    from piflow_dist.sampling.settings import SampleConfig

    config = load_config(with_tasks(overrides), SampleConfig, "sample")
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    require(
        tasks % nodes == 0 and (tasks // nodes) % config.parallel.tp == 0,
        f"parallel.tp={config.parallel.tp} does not divide the tasks of a node ({tasks} on {nodes} nodes): a group would span "
        "two nodes. Choose a divisor of --ntasks-per-node.",
    )
    request = open_request(config)
    if config.launch.dry_run:
        tell(describe_plan(request))
        return
    claim(lock_of(request.out), f"out={request.out}")
    if prepare_folder(request):
        release(lock_of(request.out))
        tell(f"{config.out}: all {len(request.images)} images are there.")
        return
    (Path(config.out) / "logs").mkdir(exist_ok=True)
    failure_path(request.out).unlink(missing_ok=True)
    write_settings(request)
    print(config.out)


def failed(arguments: list[str]) -> None:
    failure = read_failure(Path(arguments[0]))
    if failure is not None:
        tell(f"error: rank {failure.rank} failed, and the others were ended.\n{failure.reason}")


def gather_images(arguments: list[str]) -> int:
    from piflow_dist.launch.local import WorkerFailed
    from piflow_dist.sampling.gather import check_unchanged
    from piflow_dist.sampling.run import SETTINGS, finish, lock_of
    from piflow_dist.sampling.settings import SampleConfig, build_request

    request = build_request(read_config(Path(arguments[0]) / SETTINGS, SampleConfig))
    check_unchanged(request)
    try:
        finish(request)
    except WorkerFailed as error:
        tell(f"error: {error}")
        return FAILED
    finally:
        release(lock_of(request.out))
    tell(f"{arguments[0]}: {len(request.images)} images.")
    return 0


def evaluate(overrides: list[str]) -> None:
    from piflow_dist.evaluation.run import check_inputs, describe_plan, prepare
    from piflow_dist.evaluation.settings import load_evaluation

    config = load_evaluation(with_tasks(overrides))
    require(
        not config.sources,
        "sources= are sampled by slurm/sample.sh here. Give the folders that it makes, samples=[DIR,...].",
    )
    check_inputs(config)
    if config.launch.dry_run:
        tell(describe_plan(config))
        return
    claim(config.out_dir / LOCK, f"out={config.out_dir}")
    failure_path(config.out_dir).unlink(missing_ok=True)
    print(prepare(config))


def report(arguments: list[str]) -> None:
    from piflow_dist.evaluation.run import finish
    from piflow_dist.evaluation.settings import EvaluateConfig

    config = read_config(Path(arguments[0]), EvaluateConfig)
    try:
        _, paths = finish(config)
    finally:
        release(config.out_dir / LOCK)
    tell("Only statistics were asked for." if paths is None else f"Report: {paths.html}")


def main(command: str, *arguments: str) -> int:
    from piflow_dist.checkpoint.files import CheckpointError
    from piflow_dist.evaluation.samples import EvaluationError

    tools = {"prepare": prepare, "claim": claim_run, "after": after, "sample": sample, "gather": gather_images}
    tools |= {"evaluate": evaluate, "report": report, "failed": failed}
    try:
        return tools[command](list(arguments)) or 0
    except (ConfigError, EvaluationError) as error:
        tell(f"error: {error}")
        return REFUSED
    except CheckpointError as error:
        tell(f"error: {error}")
        return FAILED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
