"""Jobs of tools/launch.py on a SLURM cluster, submitted through submitit: one job, or an array for a sweep.

The job does what slurm/common.sh says, as the plain batch scripts do; submitit writes the script, the arguments and the logs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from piflow_dist.config import CONFIG_DIR, Config, ConfigError, require
from piflow_dist.launch.batch import prepare_run_dir
from piflow_dist.launch.job_state import ENDED, Unknown, job_state
from piflow_dist.launch.site import SITE
from piflow_dist.launch.task import train

ROOT = CONFIG_DIR.parent
POLL = 1.0
RUN_DIR = '"${run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}"'
"""This job's, in its script."""


@dataclass(frozen=True)
class Training:
    """What every task of a job runs. It answers signals itself, so submitit's own checkpointing has nothing to do."""

    config_file: str

    def __call__(self) -> None:
        train(self.config_file)


class Executor(SlurmExecutor):
    """submitit's, with tasks that hold signals from their start (launch/task.py)."""

    @property
    def _submitit_command_str(self) -> str:
        return task_command(self.folder)


def task_command(folder: Path) -> str:
    return f"{interpreter()} -u -m piflow_dist.launch.task --submitit {shlex.quote(str(folder))}"


@dataclass(frozen=True)
class Submitted:
    job: str
    config: Config

    folder: Path

    @property
    def log(self) -> Path:
        """Of rank 0 and of the batch script."""
        return self.folder / f"{self.job}_0_log.out"


def jobs_folder(configs: list[Config]) -> Path:
    """Of submitit's scripts, arguments and logs: beside the runs of a sweep."""
    run_dir = Path(configs[0].run_dir).resolve()
    return (run_dir if len(configs) == 1 else run_dir.parent) / "slurm"


def check_slurm() -> None:
    """Raise ConfigError where no job can be submitted from this machine."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    require(
        not missing,
        f"+cluster needs SLURM, and this machine has no {', '.join(missing)}. Log in to a machine of the cluster, or leave "
        "+cluster out to train here, or add launch.dry_run=true to see the plan and the script.",
    )
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True, timeout=5)
        answer = done.stderr.strip().splitlines()[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        answer = "no answer within 5 seconds"
    require(not answer, f"SLURM cannot be asked for its partitions: {answer}. Is its controller up (scontrol ping)?")


def parameters(configs: list[Config]) -> dict[str, Any]:
    """submitit's parameters for the job, or the array of jobs, of these runs."""
    config = configs[0]
    cluster, launch = config.cluster, config.launch
    run_dirs = " ".join(shlex.quote(str(Path(each.run_dir).resolve())) for each in configs)
    found = {
        "job_name": re.sub(r"[^\w.-]", "_", Path(config.run_dir).name),
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.gpus_per_node,
        "time": max(1, round(launch.hours * 60)),
        "signal_delay_s": launch.warning_seconds,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own would be refused where these keys are checked
        "setup": [*exports(), 'source "$PIFLOW_ROOT/slurm/common.sh" || exit 2']
        + [f"run_dirs=({run_dirs})", f"claim {RUN_DIR}"],
        "srun_args": ["--kill-on-bad-exit=1", *container_arguments()],
        "teardown": [f"after_training {RUN_DIR} $?"],
        "additional_parameters": {"requeue": True},
    }
    if cluster.device == "cuda":
        found |= {"gpus_per_node": cluster.gpus_per_node, "exclusive": True}
        found["additional_parameters"]["mem"] = 0
    return found


def exports() -> list[str]:
    """What the job is to know also where sbatch exports nothing (SBATCH_EXPORT=NONE)."""
    known = {"PIFLOW_ROOT": str(ROOT)} | {
        name: os.environ[name] for name in (SITE, "PIFLOW_PYTHON") if os.environ.get(name)
    }
    return [f"export {name}={shlex.quote(value)}" for name, value in known.items()]


def container_arguments() -> list[str]:
    """As slurm/common.sh has them; the job's folder is where the command was typed."""
    image, mounts = os.environ.get("PIFLOW_CONTAINER"), os.environ.get("PIFLOW_MOUNTS")
    if not image:
        return []
    all_mounts = f"{ROOT}:{ROOT}" + (f",{mounts}" if mounts else "")
    return [f"--container-image={image}", f"--container-mounts={all_mounts}", f"--container-workdir={Path.cwd()}"]


def interpreter() -> str:
    return shlex.quote(os.environ.get("PIFLOW_PYTHON") or ("python" if container_arguments() else sys.executable))


def batch_script(configs: list[Config]) -> str:
    """The script that submit() hands to sbatch."""
    folder, count = jobs_folder(configs), len(configs)
    array = {"map_count": count} if count > 1 else {}
    return _make_sbatch_string(command=task_command(folder), folder=folder, **parameters(configs), **array)


def check_accepted(configs: list[Config]) -> None:
    """Raise ConfigError with sbatch's words where it would refuse the job, or could never start it."""
    done = subprocess.run(["sbatch", "--test-only"], input=batch_script(configs), capture_output=True, text=True)
    words = " ".join(done.stderr.removeprefix("sbatch: ").split())
    require(
        done.returncode == 0,
        f"sbatch refuses the job: {words}. Change +cluster, cluster.nodes, launch.hours or the site file.",
    )


def submit(configs: list[Config]) -> list[Submitted]:
    """Submit one job for the run, or an array of jobs for several. Raises ConfigError with sbatch's words where it refuses."""
    for config in configs:
        prepare_run_dir(config)
    executor = Executor(jobs_folder(configs))
    executor.update_parameters(**parameters(configs))
    trainings = [Training(str(Path(config.run_dir).resolve() / "config.yaml")) for config in configs]
    try:
        if len(trainings) == 1:
            jobs = [executor.submit(trainings[0])]
        else:
            with executor.batch():
                jobs = [executor.submit(training) for training in trainings]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refused the job: {error}.") from error
    return [Submitted(job.job_id, config, jobs_folder(configs)) for job, config in zip(jobs, configs, strict=True)]


def follow(job: Submitted) -> str:
    """Copy the job's log to this terminal until it ends, across requeues. Returns its last state."""
    position, state = 0, "PENDING"
    print(f"Following {job.log}; Ctrl-C leaves the job alone.", flush=True)
    while True:
        try:
            found = job_state(job.job)
        except Unknown as error:  # a controller that is being restarted
            found = "UNKNOWN"
            if found != state:
                print(f"[{error}]", flush=True)
        if found != state and found in ("PENDING", "RUNNING"):
            print(f"[job {job.job} is {found.lower()}]", flush=True)
        state = found
        if job.log.exists():
            with open(job.log, errors="replace") as log:
                log.seek(position)
                print(log.read(), end="", flush=True)
                position = log.tell()
        if state in ENDED:
            return state
        time.sleep(POLL)
