"""A tiny data set, a tiny teacher and a tiny student, made once per test session."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).parents[1]
PROMPTS = ("a red square", "a blue disc", "a very large green ring")
TINY = (
    "model=qwen_image_tiny",
    "schedule.shift=1.0",
    "optim.warmup_steps=2",
    "ema.start_step=3",
    "train.seed=7",
    "launch.device=cpu",
    "launch.threads=1",
    "parallel.persistence_threshold=500",  # small enough that most weights of the tiny model are sharded
    "parallel.memory_efficient_linear=false",
    "tracking.log_every=4",
)
TEACHER_STEPS, STUDENT_STEPS = 40, 4
TEACHER = (
    *TINY,
    "optim=muon",
    "objective=flow_matching",
    "data.caption_dropout=0.1",
    f"train.steps={TEACHER_STEPS}",
    "train.batch_size=8",
    "optim.muon_lr=0.05",
    "optim.lr=0.005",
    "checkpoint.every=8",
    "checkpoint.keep=3",
    "launch.processes=2",
)
STUDENT = (
    *TINY,
    "policy.num_components=3",
    "policy.logstd_inner_dim=16",
    "objective=imitation",
    "distill.guidance.scale=2.0",
    f"train.steps={STUDENT_STEPS}",
    "train.batch_size=4",
    "checkpoint.every=2",
    "optim.lr=0.01",
)


def write_tiny_set(root: Path) -> None:
    """Random 16-channel latents of 4 x 4: 40 samples to train on, 8 others."""
    from data_pipeline.synthetic import write_random_set

    write_random_set(root, prompts=PROMPTS)


def write_diffusers_teacher(pipeline: Path, **changes: object) -> Path:
    """A random transformer of the tiny model's shape, as diffusers writes it: several files and their index."""
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import QwenImageTransformer2DModel

    shape = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": (4, 6, 6),
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        QwenImageTransformer2DModel(**shape | changes).save_pretrained(pipeline / "transformer", max_shard_size="200KB")
    return pipeline


def pytest_configure() -> None:
    """Ctrl-C is tested. A shell that runs this in the background has it ignored, and all that is started here would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Two rows side by side (make test) would each have a thread for every core, and wait for one another's.
    torch.set_num_threads(1)


def run_tool(name: str, *arguments: str, time_limit: float = 300.0) -> subprocess.CompletedProcess:
    """Run tools/NAME.py to its end, as a user does; stdout holds stderr too."""
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / f"{name}.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=time_limit,
    )


@pytest.fixture(scope="session", autouse=True)
def nothing_is_tracked_into_the_checkout() -> Iterator[None]:
    """MLflow's default is a database in the working folder, and its calls set a variable that every later test inherits."""

    def state() -> tuple[str | None, bool, bool]:
        store = os.environ.get("MLFLOW_TRACKING_URI")
        return store, (REPO / "mlflow.db").exists(), (REPO / "mlruns").exists()

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "data"
    write_tiny_set(root)
    return root


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A finished run of tools/launch.py: flow matching with Muon on 2 processes, 40 steps without interruption."""
    run = tmp_path_factory.mktemp("teacher") / "uninterrupted"
    done = run_tool("launch", *TEACHER, f"data.root={tiny_data}", f"run_dir={run}")
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture(scope="session")
def student_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, teacher_run: Path) -> Path:
    """A GMFlow student of 4 NFE, four steps old."""
    run = tmp_path_factory.mktemp("student") / "student"
    done = run_tool("launch", *STUDENT, f"data.root={tiny_data}", f"distill.teacher={teacher_run}", f"run_dir={run}")
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture(scope="session")
def students(tiny_data: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of three small students (tests/dist/students.py)."""
    from students import write_students

    out = tmp_path_factory.mktemp("students")
    write_students(tiny_data, teacher_run, out)
    return out


@pytest.fixture(scope="session")
def exports(students: Path, student_run: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was exported of them: NAME-adapter, NAME-merged."""
    from students import write_exports

    out = tmp_path_factory.mktemp("exports")
    write_exports(students, student_run, teacher_run, out)
    return out


@pytest.fixture(scope="session")
def slurm() -> Iterator[object]:
    """A running SLURM (tests/slurm/local_cluster.py). Skips where it cannot be had; CI=true must have it."""
    from local_cluster import LocalCluster, Unavailable, install

    try:
        install()
    except Unavailable as reason:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no SLURM here: {reason}")
    cluster = LocalCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def read_weights(checkpoint: Path, ema: bool = True) -> dict[str, torch.Tensor]:
    """All trained parameters of a checkpoint, whole."""
    from piflow_dist.checkpoint.reader import CheckpointWeights

    weights = CheckpointWeights(checkpoint, ema)
    return {name: weights.view(name) for name in weights.shapes()}


def rewrite_state(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change a checkpoint's state.json in place, as if it had been written so."""
    from piflow_dist.checkpoint.files import MANIFEST, STATE, file_digest, read_json

    state, manifest = read_json(checkpoint / STATE), read_json(checkpoint / MANIFEST)
    change(state)
    (checkpoint / STATE).write_text(json.dumps(state))
    manifest["files"][STATE] = file_digest(checkpoint / STATE)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", REPO / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def refused_by(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., str]]:
    """refused_by("launch")(*arguments): with what words the tool refuses them, exit code 2, before a process starts."""
    from piflow_dist.cli import run_tool as run_in_this_process

    def started(*arguments: object) -> None:
        raise AssertionError("workers were started")

    def refused_by(name: str) -> Callable[..., str]:
        tool = load_tool(name)
        monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", started)

        def refused(*arguments: str) -> str:
            with pytest.raises(SystemExit) as stop:
                run_in_this_process(getattr(tool, name), list(arguments), "")
            assert stop.value.code == 2
            return capsys.readouterr().err

        return refused

    return refused_by
