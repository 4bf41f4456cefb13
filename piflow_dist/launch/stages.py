"""Commands that build on one another (tools/demo.py, tools/compare.py): finished ones are kept, an interrupted one goes on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from omegaconf import OmegaConf

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import ConfigError, load_config
from piflow_dist.launch.console import console
from piflow_dist.launch.local import WorkerFailed
from piflow_dist.launch.lock import only_user
from piflow_dist.parallel.topology import LAUNCHER_PID

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@dataclass(frozen=True)
class Stage:
    """One command. What it makes is fresh while the command, its settings and the stages it builds on are the same."""

    name: str
    title: str
    arguments: list[str]
    makes: Path
    after: tuple["Stage", ...] = ()
    settings: str = ""

    @property
    def digest(self) -> str:
        text = json.dumps([[stage.digest for stage in self.after], self.arguments, self.settings])
        return hashlib.sha256(text.encode()).hexdigest()


def train_stage(title: str, experiment: str, folder: Path, overrides: list[str], *after: Stage) -> Stage:
    arguments = [f"experiment={experiment}", f"run_dir={folder}", *overrides]
    settings = OmegaConf.to_yaml(OmegaConf.structured(load_config(arguments)))
    return Stage(folder.name, title, ["launch.py", *arguments], folder, after, settings)


def sample_stage(title: str, source: Stage, folder: Path, count: int, overrides: list[str]) -> Stage:
    images = [f"images_per_prompt={count}", "seed=2024", "launch.processes=2", "overwrite=true"]
    arguments = ["sample.py", f"source={source.makes}", f"out={folder}", *images, *overrides]
    return Stage(folder.name, title, arguments, folder, (source,))


@contextmanager
def stages_folder(out: Path) -> Iterator[Path]:
    """`out` for this process alone; the folder of its stages' records. Raises ConfigError where it cannot be written or is in use."""
    records = out / ".stages"
    try:
        records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}. Choose another folder.") from error
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with only_user(out / ".lock", f"out={out}"):
        yield records


def run_stage(stage: Stage, records: Path) -> None:
    """Run a stage's command unless its record says that it is finished."""
    record, digest = records / f"{stage.name}.json", stage.digest
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.get("digest") == digest and found.get("done") and stage.makes.exists():
        console.print(f"[green]✓[/] {stage.title} (done before, {found['seconds']:.0f} s)")
        return
    if found and found.get("digest") != digest and stage.makes.is_dir():
        console.print(f"[yellow]settings changed:[/] {stage.makes} is made again")
        shutil.rmtree(stage.makes)
    console.print(f"[bold]▶ {stage.title}[/]")
    interrupted = found.get("digest") == digest and not found["done"] and stage.makes.exists()
    before, began = found["seconds"] if interrupted else 0.0, time.monotonic()
    write_atomic(record, json.dumps({"digest": digest, "done": False, "seconds": before}))
    code = 1
    try:
        code = run_tool_process(stage.arguments)
    finally:
        seconds = before + time.monotonic() - began
        write_atomic(record, json.dumps({"digest": digest, "done": code == 0, "seconds": seconds}))
    if code in (130, -2):
        raise KeyboardInterrupt
    if code != 0:
        raise WorkerFailed(f"Stage {stage.name} failed (exit code {code}). The same command continues from here.")
    console.print(f"[green]✓[/] {stage.title} ({seconds:.0f} s)")


def run_tool_process(arguments: list[str]) -> int:
    """Exit code of a tool; 130 where this process was interrupted, however the tool took it."""
    environment = os.environ | {LAUNCHER_PID: str(os.getpid())}  # it ends with this process, also by SIGKILL
    process = subprocess.Popen([sys.executable, str(TOOLS / arguments[0]), *arguments[1:]], env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.terminate()
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    interrupted = False
    try:
        while True:
            try:
                code = process.wait()
                return 130 if interrupted else code
            except KeyboardInterrupt:
                interrupted = True  # Ctrl-C reached the tool too: let it end its processes before we go
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)
