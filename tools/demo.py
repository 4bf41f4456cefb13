"""The demo: python tools/demo.py [variant=gmm|dx|datafree] [quick=true] [out=outputs/demo]. `make demo` calls it.

Digits -> MDS shards -> teacher -> student on 2 ZeRO-3 processes -> samples -> report. Finished stages are kept; a stage that
was interrupted goes on where it was; a stage whose settings changed is made again, and all that builds on it.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from omegaconf import OmegaConf

from data_pipeline.settings import list_settings, parse_settings
from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.cli import run_tool
from piflow_dist.config import ConfigError, load_config, require_choice
from piflow_dist.launch.console import console, program
from piflow_dist.launch.local import WorkerFailed
from piflow_dist.launch.lock import only_user
from piflow_dist.parallel.topology import LAUNCHER_PID
from piflow_dist.tracking.tracker import tracking_uri, ui_command

TOOLS = Path(__file__).resolve().parent
NFE = 4
VARIANTS = ("gmm", "dx", "datafree")


@dataclass(kw_only=True)
class DemoConfig:
    variant: str = "gmm"
    """gmm (GMFlow policy), dx (DX policy) or datafree (GMFlow, trained from noise alone)."""
    quick: bool = False
    """A few steps and images: does everything run? The pictures will be poor."""
    out: str = "outputs/demo"

    def __post_init__(self):
        require_choice("variant", self.variant, VARIANTS)


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


def plan(config: DemoConfig) -> list[Stage]:
    out, quick = Path(config.out), config.quick
    samples, common = out / "samples", [f"data.root={out / 'data'}"]
    teacher_steps, student_steps, images, long = [40, 20, 10, 20] if quick else [None, None, 50, 100]
    arguments = ["prepare_data.py", "source=digits", f"out={out / 'data'}"]
    data = Stage("data", "5,000 digits -> DALI -> MDS shards", arguments, out / "data")
    teacher = train_stage(
        "teacher: flow matching", "demo_teacher", out / "teacher", common + steps(teacher_steps), data
    )
    student = train_stage(
        f"student: imitation at {NFE} NFE",
        f"demo_{config.variant}",
        out / f"student_{config.variant}",
        [*common, f"distill.teacher={teacher.makes}", f"distill.nfe={NFE}", *steps(student_steps)],
        teacher,
    )
    sampled = [
        sample_stage(
            f"samples: teacher, {count} steps",
            teacher,
            samples / f"teacher_{count}",
            images,
            [f"steps={count}", "guidance=2"],
        )
        for count in (long, 8, 4)
    ]
    # Temperature 1: these students are to be as near to their teacher as they can (docs/demo.md).
    options = [f"nfe={NFE}", *([] if config.variant == "dx" else ["temperature=1"])]
    folder = samples / f"{student.name}_{NFE}"
    sampled.append(sample_stage(f"samples: student, {NFE} NFE", student, folder, images, options))
    return [data, teacher, student, *sampled, report_stage(config, student, sampled)]


def report_stage(config: DemoConfig, student: Stage, sampled: list[Stage]) -> Stage:
    out = Path(config.out)
    name = "report" if config.variant == "gmm" else f"report_{config.variant}"
    tracking = tracking_uri(load_config([f"experiment=demo_{config.variant}", f"run_dir={student.makes}"]))
    arguments = [
        f"run={out}",
        f"name={name}",
        f"student={student.makes}",
        f"sources={','.join(stage.name for stage in sampled)}",
        f"reference={sampled[0].name}",
        f"cache={out / 'feature_net'}",
        f"another={demo_command(config, 'dx' if config.variant == 'gmm' else 'gmm')}",
        f"mlflow={ui_command(tracking)}",
    ]
    return Stage(name, "evaluation and report", ["report.py", *arguments], out / f"{name}.html", tuple(sampled))


def demo_command(config: DemoConfig, variant: str) -> str:
    """What to type for another student beside this one's data and teacher."""
    if config.out == "outputs/demo" and not config.quick:
        return f"make demo DEMO={variant}"
    return f"{program('python')} tools/demo.py variant={variant} quick={str(config.quick).lower()} out={config.out}"


def steps(count: int | None) -> list[str]:
    return [] if count is None else [f"train.steps={count}", "ema.start_step=5", f"checkpoint.every={count // 2}"]


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
    """Exit code of a tool; 130 where the demo was interrupted, however the tool took it."""
    environment = os.environ | {LAUNCHER_PID: str(os.getpid())}  # it ends with the demo, also by SIGKILL
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


def write_timings(stages: list[Stage], records: Path, path: Path) -> None:
    found = {stage.title: records / f"{stage.name}.json" for stage in stages}
    timings = {title: json.loads(record.read_text())["seconds"] for title, record in found.items() if record.exists()}
    write_atomic(path, json.dumps(timings, indent=1))


def demo(arguments: list[str]) -> None:
    try:
        config = parse_settings(DemoConfig, arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    out = Path(config.out)
    records = out / ".stages"
    try:
        records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}. Choose another folder.") from error
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    stages = plan(config)
    with only_user(out / ".lock", f"out={out}"):
        for stage in stages:
            if stage is stages[-1]:
                write_timings(stages, records, out / "timings.json")
            run_stage(stage, records)
    report = stages[-1].makes
    console.print(f"\n[bold]Report:[/] {report} and {report.with_suffix('.md')}", soft_wrap=True)
    console.print(f"[bold]Runs:[/]   {stages[-1].arguments[-1].removeprefix('mlflow=')}", soft_wrap=True)
    others = [demo_command(config, variant) for variant in VARIANTS if variant != config.variant]
    console.print(f"[bold]Next:[/]   {', '.join(others)}; docs/ has one page per task.", soft_wrap=True)


if __name__ == "__main__":
    run_tool(demo, sys.argv[1:], f"{__doc__}\n{list_settings(DemoConfig)}")
