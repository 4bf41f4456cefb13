"""Trainings as SLURM jobs over two nodes: the plain script to its end, and a submitted one that is disturbed in every way.

The disturbed job must end with the numbers of the undisturbed one, bit for bit, in one MLflow run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from conftest import REPO, TINY, read_weights, write_diffusers_teacher
from local_cluster import LocalCluster, processes_of

from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.settings import parse_settings
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.launch.exits import GAVE_UP
from piflow_dist.launch.failure_record import Failure, failure_path
from piflow_dist.launch.restarts import WAIT
from piflow_dist.tracking.tracker import read_metrics

STEPS = 90


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> list[str]:
    """experiment=qwen_gmm, which the script gives, on a random teacher of the tiny model and on the CPU."""
    teacher = write_diffusers_teacher(tmp_path_factory.mktemp("teacher"))
    return [
        *TINY,
        "train.dtype=fp32",
        "policy.num_components=3",
        "policy.logstd_inner_dim=16",
        "lora.rank=4",
        "lora.alpha=4",
        "optim.lr=0.01",
        f"distill.teacher={teacher}",
        f"data.root={tiny_data}",
        f"train.steps={STEPS}",
        "train.batch_size=8",
        "train.micro_batch_size=1",
        "checkpoint.every=10",
    ]


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def checkpoint_step(run_dir: Path) -> int:
    path = newest_complete(run_dir / "checkpoints")[0]
    return int(path.name.removeprefix("step_")) if path is not None else 0


def run_script(slurm: LocalCluster, folder: Path, *words: str, code: int = 0) -> str:
    """The log of a batch script that ends with `code`. words: sbatch's options, the script, its arguments."""
    log = folder / "script.log"
    log.unlink(missing_ok=True)
    done = slurm.run(
        *("sbatch", "--wait", f"--output={log}", *words),
        check=False,
        PIFLOW_ROOT=str(REPO),
        PIFLOW_PYTHON=sys.executable,
    )
    assert done.returncode == code, (done.stdout, log.read_text() if log.exists() else "no log")
    return log.read_text()


# Plain scripts


@pytest.fixture(scope="module")
def scripted(slurm: LocalCluster, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, log) of slurm/qwen_gmm.sh, undisturbed."""
    folder = tmp_path_factory.mktemp("scripted")
    nodes = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    log = run_script(slurm, folder, *nodes, str(REPO / "slurm" / "qwen_gmm.sh"), *arguments, f"run_dir={folder}/run")
    return folder / "run", log


def test_the_plain_script_trains_on_two_nodes(scripted: tuple[Path, str]) -> None:
    run_dir, log = scripted
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert checkpoint_step(run_dir) == STEPS
    assert log.rstrip().endswith(f"Finished at step {STEPS}.")


def test_the_log_is_rank_0s_and_every_rank_has_its_own(scripted: tuple[Path, str]) -> None:
    run_dir, log = scripted
    assert "rank 0 INFO" in log and not re.search(r"rank [123] ", log)
    names = {path.name for path in (run_dir / "logs").glob("*.log")}
    assert names == {"progress.log", *(f"rank_{rank}.log" for rank in range(4))}


def test_images_are_sampled_by_all_tasks_and_only_once(
    slurm: LocalCluster, scripted: tuple[Path, str], tmp_path: Path
) -> None:
    script = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", str(REPO / "slurm" / "sample.sh")]
    request = [f"source={scripted[0]}", f"out={tmp_path / 'out'}", "images_per_prompt=2", "batch_size=3", "substeps=16"]
    log = run_script(slurm, tmp_path, *script, *request, "launch.device=cpu", "launch.threads=1")
    assert "6 images" in log and len(list((tmp_path / "out" / "images").glob("*.png"))) == 6
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["processes"] == 2
    assert "all 6 images are there" in run_script(slurm, tmp_path, *script, *request)
    check_evaluation(slurm, tmp_path / "out", tmp_path / "evaluation")


def check_evaluation(slurm: LocalCluster, samples: Path, out: Path) -> None:
    """slurm/evaluate.sh with nothing to do, over two tasks, and over a damaged image."""
    tasks = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    request = [f"samples=[{samples}]", f"reference={samples}", f"out={out}", "launch.device=cpu", "launch.threads=1"]
    words = [*tasks, str(REPO / "slurm" / "evaluate.sh"), *request]
    log = run_script(slurm, samples.parent, *words, "launch.dry_run=true")
    assert log.rstrip().endswith(f"2 processes would measure. Folder: {out}") and not out.exists()
    log = run_script(slurm, samples.parent, *words)
    assert log.rstrip().endswith(f"Report: {out / 'evaluation.html'}")
    (row,) = json.loads((out / "evaluation.json").read_text())["rows"]
    assert row["count"] == 6
    image = sorted(samples.glob("images/*.png"))[-1]
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    log = run_script(slurm, samples.parent, *words, code=1)
    assert f"{image} is damaged" in log.rstrip().splitlines()[-1]


def test_sampling_goes_on_after_the_time_limit_and_has_its_folder_alone(
    slurm: LocalCluster, scripted: tuple[Path, str], tmp_path: Path
) -> None:
    """One task is stopped, so that not all is made when the time limit's warning comes."""
    out, log = tmp_path / "out", tmp_path / "log"
    request = [f"source={scripted[0]}", f"out={out}", "images_per_prompt=60", "batch_size=1", "latents=false"]
    words = [str(REPO / "slurm" / "sample.sh"), *request, "launch.device=cpu", "launch.threads=1"]
    tasks = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    environment = {"PIFLOW_ROOT": str(REPO), "PIFLOW_PYTHON": sys.executable}
    job = slurm.run("sbatch", "--parsable", f"--output={log}", *tasks, *words, **environment).stdout.strip()

    def images() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("images/[0-9]*.png")}

    slurm.wait_until(lambda: images() or slurm.job(job)["JobState"] in ("FAILED", "COMPLETED"), f"images of job {job}")
    (task,) = [pid for pid, rank in tasks_on(slurm, "n2", b"sampling.sampler").items() if rank == 1]
    os.kill(task, signal.SIGSTOP)
    before = images()
    assert 0 < len(before) < 180, log.read_text()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for_state(job, "PENDING")
    refused = run_script(slurm, tmp_path, "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", *words, code=2)
    assert f"out={out} is in use by job {job} (pending). Wait for it" in refused
    slurm.start_now(job)
    slurm.wait_for_state(job, "COMPLETED", "FAILED")
    assert f"The time limit is near: job {job} is put back into the queue." in log.read_text()
    assert log.read_text().rstrip().endswith(f"{out}: 180 images.") and before.items() <= images().items()


def test_a_data_set_is_prepared_by_all_tasks_and_goes_on_after_the_time_limit(
    slurm: LocalCluster, tmp_path: Path
) -> None:
    """One task is stopped, so that its parts are missing when the time limit's warning comes; the others' are not made again."""
    prompts, out, log = tmp_path / "prompts.txt", tmp_path / "set", tmp_path / "log"
    prompts.write_text("".join(f"a square of {number} by {number + 1}\n" for number in range(80)))
    settings = ["source=prompts", f"path={prompts}", "samples_per_part=5", "prompt_dim=8", "resolution=64"]
    tasks = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
    script = (str(REPO / "slurm" / "prepare_data.sh"), f"out={out}", *settings)
    job = slurm.run(
        *("sbatch", "--parsable", f"--output={log}", f"--chdir={tmp_path}", *tasks, *script),
        PIFLOW_ROOT=str(REPO),
        PIFLOW_PYTHON=sys.executable,
    ).stdout.strip()

    def last_task() -> list[int]:
        return [pid for pid, rank in tasks_on(slurm, "n2", b"prepare_data.py").items() if rank == 3]

    def done() -> dict[str, int]:
        """Shards by what they hold -> inode."""
        while True:
            try:
                files = [path for path in tmp_path.rglob("*.mds.zstd") if "work" not in path.parts]
                return {path.read_bytes().hex(): path.stat().st_ino for path in files}
            except FileNotFoundError:
                continue  # renamed by a task between being listed and being looked at

    slurm.wait_until(last_task, f"the last task of job {job}")
    os.kill(last_task()[0], signal.SIGSTOP)
    slurm.wait_until(lambda: len(done()) == 12 or slurm.job(job)["JobState"] != "RUNNING", "the parts of three tasks")
    assert len(done()) == 12, log.read_text()
    before = done()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.start_now(job)
    slurm.wait_for_state(job, "COMPLETED")
    assert slurm.job(job)["Restarts"] == "1"
    assert f"{out}: 80 train" in log.read_text()
    after = done()
    assert len(after) == 16 and before.items() <= after.items()
    alone = prepare(parse_settings(PrepareConfig, [*settings, f"out={tmp_path / 'alone'}"]), show_progress=False)
    assert {path.read_bytes().hex() for path in alone.root.rglob("*.zstd")} == set(after)


def test_a_script_with_a_bad_key_ends_at_once(slurm: LocalCluster, tmp_path: Path) -> None:
    nodes = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    log = run_script(slurm, tmp_path, *nodes, str(REPO / "slurm" / "qwen_dx.sh"), "data.rot=x", code=2)
    assert "error: Key 'rot' is not in struct" in log or "error: data.rot" in log
    assert "Traceback" not in log


# The disturbed job


@dataclass
class Disturbed:
    run_dir: Path
    output: str
    """What tools/launch.py printed."""
    job: str
    saved: dict[str, int] = field(default_factory=dict)
    """Kind of disturbance -> step of the newest checkpoint when it was over."""
    reached: dict[str, int] = field(default_factory=dict)
    """Kind of disturbance -> last step done."""
    log: str = ""


def tasks_on(cluster: LocalCluster, node: str, program: bytes = b"piflow_dist.launch.task") -> dict[int, int]:
    """Process id -> rank of a step's processes on a node."""
    found = {}
    for pid in processes_of(cluster.folder):
        try:
            words = (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (Path("/proc") / str(pid) / "cmdline").read_bytes()
        except OSError:
            continue
        variables = dict(word.partition("=")[::2] for word in words if "=" in word)
        if program in command and variables.get("SLURMD_NODENAME") == node:
            rank = variables.get("SLURM_PROCID")
            if rank is not None and b"srun" not in command:
                found[pid] = int(rank)
    return found


@pytest.fixture(scope="module")
def disturbed(
    slurm: LocalCluster, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Disturbed]:
    """One job of tools/launch.py that meets a time limit, TERM, a requeue, a killed rank and a lost node, one after the other."""
    run_dir = tmp_path_factory.mktemp("disturbed") / "run"
    submitted = slurm.run(
        *(sys.executable, str(REPO / "tools" / "launch.py"), "+cluster=local_slurm", "experiment=qwen_gmm"),
        *(*arguments, f"run_dir={run_dir}", "launch.hours=0.1", "launch.warning_seconds=355"),
        PIFLOW_PYTHON=sys.executable,
    )
    job = re.search(r"Submitted job (\d+)", submitted.stdout).group(1)
    course = Disturbed(run_dir, submitted.stdout, job)
    try:
        disturb(slurm, course)
        yield course
    finally:
        slurm.run("scancel", job, check=False)
        for node in ("n1", "n2"):
            if slurm.daemons[node].poll() is not None:
                slurm.start_node(node)


def disturb(slurm: LocalCluster, course: Disturbed) -> None:
    def pending(kind: str, restarts: int) -> None:
        """Wait until the job has been requeued, and note what it had reached."""
        slurm.wait_until(lambda: requeued(restarts), f"requeue after {kind}: {read_log(course)}")
        course.saved[kind], course.reached[kind] = checkpoint_step(course.run_dir), steps_done(course.run_dir)

    def alive() -> dict[str, str]:
        found = slurm.job(course.job)
        assert found["JobState"] not in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"), (found, read_log(course))
        return found

    def requeued(restarts: int) -> bool:
        found = alive()
        return found["JobState"] == "PENDING" and found["Restarts"] == str(restarts)

    def running_until(step: int) -> None:
        slurm.start_now(course.job)
        slurm.wait_until(lambda: steps_done(course.run_dir) >= step or not alive(), f"step {step}")

    # The time limit's warning; it may come while the processes are still starting.
    pending("time limit", 1)
    slurm.run("scontrol", "update", f"JobId={course.job}", "TimeLimit=60")

    running_until(course.reached["time limit"] + 3)
    slurm.run("scancel", "--signal=TERM", course.job)
    pending("TERM", 2)

    running_until(course.reached["TERM"] + 3)
    slurm.run("scontrol", "requeue", course.job)
    pending("requeue", 3)

    running_until(course.saved["requeue"] + 3)
    # Not where a step is saved and the next one has not begun.
    slurm.wait_until(lambda: 3 <= steps_done(course.run_dir) % 10 <= 7 or not alive(), "a step between two saves")
    victim = next(pid for pid, rank in tasks_on(slurm, "n2").items() if rank == 3)
    os.kill(victim, signal.SIGKILL)
    pending("killed rank", 4)

    running_until(course.saved["killed rank"] + 3)
    lost = tasks_on(slurm, "n2")
    slurm.kill_node("n2")
    for pid in lost:
        os.kill(pid, signal.SIGSTOP)  # a lost node computes nothing
    pending("lost node", 5)
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    slurm.start_node("n2")
    slurm.wait_until(lambda: slurm.node_states() == ["idle", "idle"], "both nodes")

    slurm.start_now(course.job)
    slurm.wait_for_state(course.job, "COMPLETED", "FAILED")
    course.log = read_log(course)


def read_log(course: Disturbed) -> str:
    path = course.run_dir / "slurm" / f"{course.job}_0_log.out"
    return path.read_text(errors="replace") if path.exists() else ""


def test_the_launcher_says_where_everything_is(disturbed: Disturbed) -> None:
    output, run_dir = disturbed.output, disturbed.run_dir
    for words in (str(run_dir), f"{disturbed.job}_0_log.out", "mlflow ui", f"scancel {disturbed.job}", "tail -F"):
        assert words in output


@pytest.mark.parametrize("kind", ["time limit", "TERM"])
def test_a_stop_is_saved_at_the_step_where_it_came(disturbed: Disturbed, kind: str) -> None:
    assert disturbed.saved[kind] == disturbed.reached[kind] > 0
    assert f"Stopped at step {disturbed.saved[kind]}.\nJob {disturbed.job} goes back to the queue." in disturbed.log


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(disturbed: Disturbed) -> None:
    assert disturbed.saved["killed rank"] < disturbed.reached["killed rank"]
    assert f"Failed after step {disturbed.reached['killed rank']} (failure 1 of 3 there)." in disturbed.log


def test_the_disturbed_job_equals_the_undisturbed_one(disturbed: Disturbed, scripted: tuple[Path, str]) -> None:
    found, want = (read_metrics(folder / "metrics.jsonl") for folder in (disturbed.run_dir, scripted[0]))
    assert f"Finished at step {STEPS}" in disturbed.log
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr", "ema_decay"):
        assert [row[key] for row in found] == [row[key] for row in want], key
    weights, wanted = (read_weights(newest_complete(f / "checkpoints")[0]) for f in (disturbed.run_dir, scripted[0]))
    assert all(weights[name].equal(wanted[name]) for name in wanted)


def test_all_attempts_are_one_mlflow_run(disturbed: Disturbed) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{disturbed.run_dir.parent / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "qwen_image"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("attempt, restarts", [("0", "1"), ("3", "0")])
def test_only_the_present_attempt_puts_a_job_back(
    slurm: LocalCluster, tmp_path: Path, attempt: str, restarts: str
) -> None:
    """A script that is still being ended when the next attempt has begun must leave that one alone."""
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\nexport SLURM_RESTART_COUNT={attempt} PIFLOW_ROOT={REPO}\n"
        f'source "$PIFLOW_ROOT/slurm/common.sh"\nafter_training {tmp_path} 75\n'
    )
    words = ("sbatch", "--parsable", f"--output={tmp_path}/log", "--ntasks-per-node=1", str(script))
    job = slurm.run(*words, PIFLOW_PYTHON=sys.executable).stdout.strip()
    slurm.wait_until(lambda: ended_or_requeued(slurm.job(job)), f"the end of job {job}")
    assert slurm.job(job)["Restarts"] == restarts
    assert ("goes back to the queue" in (tmp_path / "log").read_text()) == (restarts == "1")
    slurm.run("scancel", job, check=False)


def test_a_job_that_dies_three_times_at_a_step_waits_longer_each_time_and_is_given_up(
    slurm: LocalCluster, tmp_path: Path
) -> None:
    """The batch script's part, with a failure that a rank has left in the run folder instead of a training."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    failure = Failure(3, 5, "data", "DataError: a shard is damaged", "Traceback\nDataError: a shard is damaged")
    (tmp_path / "logs").mkdir()
    failure_path(tmp_path).write_text(json.dumps(vars(failure)))
    # A slow scontrol is still at work when SLURM has begun to end the script that it puts back.
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/bash\n[ "$1" != update ] || sleep 1\nexec {shutil.which("scontrol")} "$@"\n')
    scontrol.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\nexport PIFLOW_ROOT={REPO} PATH={tmp_path}/bin:$PATH\n"
        f'source "$PIFLOW_ROOT/slurm/common.sh"\nafter_training {tmp_path} 1\n'
    )
    words = (
        "sbatch",
        "--parsable",
        "--open-mode=append",
        f"--output={tmp_path}/log",
        "--ntasks-per-node=1",
        str(script),
    )
    job = slurm.run(*words, PIFLOW_PYTHON=sys.executable).stdout.strip()
    for restarts, wait in ((1, WAIT), (2, 2 * WAIT)):
        assert abs(wait_of(slurm, job, restarts) - wait) < 15, slurm.job(job)
        slurm.start_now(job)
    found = slurm.wait_for_state(job, "FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("2", f"{GAVE_UP}:0")
    log = (tmp_path / "log").read_text()
    assert (
        "Failed 3 times without getting past step 4: the job is given up. Last reason: DataError: a shard is damaged"
        in log
    )
    assert log.endswith("DataError: a shard is damaged\nRank 3 failed in step 5, data.\n")


def wait_of(slurm: LocalCluster, job: str, restarts: int) -> float:
    """Seconds from a job's requeue until it may start again, when after_training has said so; SLURM's own wait is two minutes."""
    found: list[float] = []

    def is_told() -> bool:
        fields = slurm.job(job)
        if (fields["JobState"], fields["Restarts"]) == ("PENDING", str(restarts)):
            put_back, start = (datetime.fromisoformat(fields[key]) for key in ("SubmitTime", "EligibleTime"))
            found.append((start - put_back).total_seconds())
        return bool(found) and found[-1] < 110

    slurm.wait_until(is_told, f"attempt {restarts} of job {job}, put back")
    return found[-1]


def ended_or_requeued(job: dict[str, str]) -> bool:
    return job["JobState"] == "FAILED" or (job["JobState"], job["Restarts"]) == ("PENDING", "1")


# What else the launcher does with a real SLURM


def launch(slurm: LocalCluster, *words: str, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, str(REPO / "tools" / "launch.py"), "+cluster=local_slurm", "experiment=qwen_gmm")
    return slurm.run(*command, *words, check=False, PIFLOW_PYTHON=sys.executable, **environment)


def test_following_a_job_shows_its_log_to_the_end(
    slurm: LocalCluster, disturbed: Disturbed, arguments: list[str]
) -> None:
    """The disturbed run, finished, is submitted again: there is nothing left to do."""
    done = launch(slurm, *arguments, f"run_dir={disturbed.run_dir}", "launch.follow=true")
    assert done.returncode == 0, done.stdout
    job = re.search(r"Submitted job (\d+)", done.stdout).group(1)
    assert f"continuing from {disturbed.run_dir}/checkpoints/step_{STEPS:08d}" in done.stdout
    assert done.stdout.rstrip().endswith(f"Finished at step {STEPS}.\nJob {job}: completed.")


def test_what_sbatch_refuses_is_said_in_its_words_and_leaves_no_job(
    slurm: LocalCluster, arguments: list[str], tmp_path: Path
) -> None:
    before = slurm.jobs()
    done = launch(slurm, *arguments, f"run_dir={tmp_path / 'run'}", SBATCH_PARTITION="moon")
    assert done.returncode == 2 and "invalid partition" in done.stdout and "Traceback" not in done.stdout, done.stdout
    done = launch(slurm, *arguments, f"run_dir={tmp_path / 'run'}", "cluster.nodes=3", "train.batch_size=12")
    assert (
        done.returncode == 2 and "node configuration is not available" in done.stdout and "Traceback" not in done.stdout
    ), done.stdout
    assert slurm.jobs() == before


def test_a_sweep_is_an_array_and_cancelled_jobs_stay_cancelled(
    slurm: LocalCluster, arguments: list[str], tmp_path: Path
) -> None:
    done = launch(slurm, "-m", *arguments, "train.seed=1,2", f"run_dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stdout
    job = re.search(r"Submitted job (\d+): an array of 2 jobs", done.stdout).group(1)
    shown = slurm.run("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i").stdout.split()
    assert sorted(shown) == [f"{job}_0", f"{job}_1"]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"train.seed=1", "train.seed=2", "slurm"}
    slurm.wait_until(lambda: slurm.job(f"{job}_0")["JobState"] == "RUNNING", "the array's first job")
    another = launch(slurm, *arguments, "train.seed=1", f"run_dir='{tmp_path}/sweep/train.seed=1'")
    assert another.returncode == 2 and f"is in use by job {job}_0 (running)" in another.stdout, another.stdout
    slurm.run("scancel", job)
    slurm.wait_for_state(f"{job}_0", "CANCELLED")
