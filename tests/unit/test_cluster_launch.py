"""Sweeps, site files and batch scripts, and what +cluster refuses, without a SLURM."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO, TINY, load_tool, run_tool

from piflow_dist.config import ConfigError, load_config
from piflow_dist.launch.local import WorkerFailed
from piflow_dist.launch.site import load_site
from piflow_dist.launch.slurm import batch_script
from piflow_dist.launch.sweep import expand

TEACHER = (*TINY, "objective=flow_matching", "train.batch_size=8", "+cluster=local_slurm")


# Sweeps


def test_without_the_flag_there_is_one_training() -> None:
    assert expand(["a=1,2"]) == [["a=1,2"]]


def test_every_combination_has_a_folder_of_its_own() -> None:
    runs = expand(["-m", "experiment=demo_gmm", "policy=gmflow,dx", "optim.lr=0.1,0.2", "run_dir=/runs/a b"])
    configs = [load_config(run) for run in runs]
    assert [(config.policy.type, config.optim.lr) for config in configs] == [
        ("gmflow", 0.1),
        ("gmflow", 0.2),
        ("dx", 0.1),
        ("dx", 0.2),
    ]
    assert [config.run_dir for config in configs] == [
        f"/runs/a b/policy={policy},optim.lr={lr}" for policy in ("gmflow", "dx") for lr in (0.1, 0.2)
    ]


def test_a_key_that_was_given_before_is_swept_too() -> None:
    words = ["train.seed=7", "optim=adamw", "experiment=demo_gmm", "optim.clip=0", "train.seed=1,2", "run_dir=/runs"]
    configs = [load_config(run) for run in expand(["-m", *words])]
    assert [(config.train.seed, config.run_dir) for config in configs] == [
        (1, "/runs/train.seed=1"),
        (2, "/runs/train.seed=2"),
    ]


@pytest.mark.parametrize("words", [["experiment=demo_gmm"], ["experiment=demo_gmm", "optim.lr=[0.1,0.2]"]])
def test_a_sweep_of_nothing_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="no key has several values"):
        expand(["--multirun", *words])


def test_a_sweep_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="-m: "):
        expand(["-m", "optim.lr=[0.1,,"])


# Site files


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PIFLOW_", "SBATCH_", "SLURM")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_a_site_file_is_understood_as_bash_does(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = tmp_path / "site.sh"
    site.write_text('BASE=/big\nSBATCH_PARTITION=gpu\nPIFLOW_MOUNTS="$BASE:/data"\nsite_setup() { module load x; }\n')
    os.environ["PIFLOW_SITE"] = str(site)
    load_site()
    assert os.environ["SBATCH_PARTITION"] == "gpu" and os.environ["PIFLOW_MOUNTS"] == "/big:/data"
    assert not any("site_setup" in name for name in os.environ)


def test_a_site_that_is_not_there_or_does_not_work(clean_environment: None, tmp_path: Path) -> None:
    os.environ["PIFLOW_SITE"] = "nowhere"
    with pytest.raises(ConfigError, match="PIFLOW_SITE=nowhere.*Choose one of: example"):
        load_site()
    (tmp_path / "site.sh").write_text("echo 'no such thing' >&2\nfalse\n")
    os.environ["PIFLOW_SITE"] = str(tmp_path / "site.sh")
    with pytest.raises(ConfigError, match="no such thing"):
        load_site()


def test_the_example_site_sets_nothing(clean_environment: None) -> None:
    os.environ["PIFLOW_SITE"] = "example"
    before = set(os.environ) | {"_", "SHLVL", "COLUMNS", "LINES"}
    load_site()
    assert set(os.environ) <= before


# Scripts


def test_the_batch_script(clean_environment: None, tiny_data: Path, tmp_path: Path) -> None:
    os.environ |= {"PIFLOW_CONTAINER": "/images/piflow.sqsh", "PIFLOW_MOUNTS": "/data:/data"}
    options = [*TINY, "objective=flow_matching", "train.batch_size=64", f"data.root={tiny_data}"]
    config = load_config([*options, "+cluster=h100x32", f"run_dir={tmp_path / 'my run'}", "launch.hours=2"])
    script = batch_script([config])
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=120",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --job-name=my_run",
        f"run_dirs=('{tmp_path / 'my run'}')",
        'claim "${run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}"',
    ):
        assert line in script.splitlines()
    srun = next(line for line in script.splitlines() if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--container-image=/images/piflow.sqsh" in srun
    assert f"{REPO}:{REPO},/data:/data" in srun
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("name", ["qwen_gmm", "qwen_dx", "qwen_gmm_datafree", "sample", "prepare_data"])
def test_plain_scripts_name_no_site(name: str) -> None:
    text = (REPO / "slurm" / f"{name}.sh").read_text()
    headers = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(headers)
    assert any("--signal=" in header for header in headers)
    assert not [header for header in headers if "partition" in header or "account" in header or "qos" in header]
    assert len(text.splitlines()) <= 25 and subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_plain_script_outside_a_job_without_slurm_says_so(clean_environment: None, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("bash", "dirname", "env"):
        (tmp_path / "bin" / program).symlink_to(f"/usr/bin/{program}")
    script = str(REPO / "slurm" / "qwen_gmm.sh")
    done = subprocess.run([script], env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)
    assert done.returncode == 2 and "no sbatch here" in done.stderr


# Refusals


@pytest.fixture
def refuse(
    refused_by: Callable[..., Callable[..., str]], monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path
) -> Callable[..., str]:
    """What tools/launch.py +cluster=local_slurm says, with a SLURM that answers and must not be given a job."""
    refused = refused_by("launch")
    from piflow_dist.launch import cluster

    def submitted(*arguments: object) -> None:
        raise AssertionError("a job was submitted")

    monkeypatch.setattr(cluster, "check_slurm", lambda: None)
    monkeypatch.setattr(cluster, "check_accepted", submitted)
    monkeypatch.setattr(cluster, "submit", submitted)
    return lambda *words: refused(*TEACHER, f"data.root={tiny_data}", f"run_dir={tmp_path / 'run'}", *words)


def test_tensor_parallelism_beyond_a_node(refuse: Callable[..., str]) -> None:
    message = refuse("parallel.tp=4", "model.num_attention_heads=4", "optim=adamw")
    assert "parallel.tp=4" in message and "a node" in message


def test_missing_data_and_bad_keys(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "tools/prepare_data.py" in refuse(f"data.root={tmp_path / 'nowhere'}")
    assert "optim.learning_rate" in refuse("optim.learning_rate=1")
    assert "does not split over 4" in refuse("train.batch_size=9")


def test_a_cluster_that_nobody_has_described(refused_by: Callable[..., Callable[..., str]]) -> None:
    message = refused_by("launch")("experiment=demo_gmm", "+cluster=moon")
    assert "moon" in message and "local_slurm" in message


def test_clusters_cannot_be_swept(refuse: Callable[..., str]) -> None:
    assert "cannot be swept" in refuse("-m", "launch.hours=1,2")


def test_a_followed_job_that_fails_is_a_failure_here(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from piflow_dist.launch import cluster
    from piflow_dist.launch.slurm import Submitted

    for name in ("check_slurm", "check_accepted", "plan"):
        monkeypatch.setattr(cluster, name, lambda *arguments: None)
    monkeypatch.setattr(cluster, "submit", lambda configs: [Submitted("5", configs[0], tmp_path)])
    monkeypatch.setattr(cluster, "follow", lambda job: "FAILED")
    words = [*TEACHER, f"data.root={tiny_data}", f"run_dir={tmp_path / 'run'}", "launch.follow=true"]
    with pytest.raises(WorkerFailed, match=f"Job 5: failed. Log: {tmp_path}/5_0_log.out"):
        load_tool("launch").launch(words)
    shown = capsys.readouterr().out
    assert all(f"  {word}  " in shown for word in ("follow", "cancel", "resume", "state"))
    assert (tmp_path / "run" / ".lock").read_text() == "job 5, attempt 0"


def test_no_slurm_here_is_said_first(tiny_data: Path, tmp_path: Path) -> None:
    """As a user meets it: without a traceback, and before data and models are looked at."""
    environment = os.environ["PATH"]
    try:
        os.environ["PATH"] = str(tmp_path)
        done = run_tool("launch", *TEACHER, f"data.root={tiny_data}", f"run_dir={tmp_path / 'run'}")
    finally:
        os.environ["PATH"] = environment
    assert done.returncode == 2 and "no sbatch, srun, scontrol" in done.stdout
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_script_without_slurm(tiny_data: Path, tmp_path: Path) -> None:
    done = run_tool("launch", *TEACHER, f"data.root={tiny_data}", f"run_dir={tmp_path / 'run'}", "launch.dry_run=true")
    assert done.returncode == 0, done.stdout
    assert "#SBATCH --ntasks-per-node=2" in done.stdout and "after_training" in done.stdout
    assert "would be submitted" in done.stdout and not (tmp_path / "run" / "config.yaml").exists()


def test_the_cluster_of_one_machine_runs_here(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        *TEACHER[:-1],
        "+cluster=local",
        f"data.root={tiny_data}",
        f"run_dir={tmp_path / 'run'}",
        "launch.dry_run=true",
    ]
    load_tool("launch").launch(words)
    assert "2 processes would train" in capsys.readouterr().out
