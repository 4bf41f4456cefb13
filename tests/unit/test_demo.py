"""tools/demo.py and its stages (launch/stages.py): which run, which are kept, and how it ends. The tools are replaced."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, load_tool

from data_pipeline.settings import parse_settings
from piflow_dist.cli import run_tool as run_in_this_process
from piflow_dist.config import ConfigError
from piflow_dist.evaluation.report import ReportConfig
from piflow_dist.launch import stages
from piflow_dist.launch.local import WorkerFailed

SECONDS = 10.0
"""How long every replaced tool takes, by the replaced clock."""
STAGES = ["data", "teacher", "student_gmm", "teacher_100", "teacher_8", "teacher_4", "student_gmm_4", "report"]


class Demo:
    """The demo in a folder of its own, with tools that make their folder, take ten seconds and end as they are told."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.tool, self.out, self.now = load_tool("demo"), out, 0.0
        self.ran: list[str] = []
        self.ends: dict[str, int | Exception] = {}
        self.before_running: Callable[[str], None] = lambda name: None
        self.stages = {}
        plan = self.tool.plan

        def noted_plan(config):
            planned = plan(config)
            self.stages = {stage.name: stage for stage in planned}
            return planned

        monkeypatch.setattr(self.tool, "plan", noted_plan)
        monkeypatch.setattr(stages, "run_tool_process", self.run_tool_process)
        monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # the demo sets it: put it back afterwards

    def run_tool_process(self, arguments: list[str]) -> int:
        (stage,) = [stage for stage in self.stages.values() if stage.arguments == arguments]
        self.before_running(stage.name)
        self.ran.append(stage.name)
        self.now += SECONDS
        if stage.makes.suffix:
            stage.makes.write_text("made")
        else:
            stage.makes.mkdir(parents=True, exist_ok=True)
            (stage.makes / f"made_by_{len(list(stage.makes.iterdir()))}").touch()
        end = self.ends.pop(stage.name, 0)
        if isinstance(end, Exception):
            raise end
        return end

    def run(self, *arguments: str) -> list[str]:
        """The stages that were run."""
        self.ran.clear()
        self.tool.demo([f"out={self.out}", *arguments])
        return list(self.ran)

    def stop(self, error: type[BaseException], *arguments: str) -> list[str]:
        with pytest.raises(error):
            self.run(*arguments)
        return list(self.ran)

    def times_made(self, name: str) -> int:
        """How often the stage was run since its folder was last deleted."""
        return len(list(self.stages[name].makes.iterdir()))

    def record(self, name: str) -> dict:
        return json.loads((self.out / ".stages" / f"{name}.json").read_text())


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    return Demo(tmp_path / "demo", monkeypatch)


# The plan


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("variant", ["gmm", "dx", "datafree"])
def test_every_stage_reads_what_an_earlier_one_makes(demo: Demo, variant: str, quick: bool) -> None:
    ran = demo.run(f"variant={variant}", f"quick={quick}")
    student, long = f"student_{variant}", 20 if quick else 100
    report = "report" if variant == "gmm" else f"report_{variant}"
    samples = [f"teacher_{long}", "teacher_8", "teacher_4", f"{student}_4"]
    assert ran == ["data", "teacher", student, *samples, report]
    out, planned = demo.out, demo.stages
    folders = {name: stage.makes for name, stage in planned.items()}
    assert len(set(folders.values())) == len(folders)
    assert f"data.root={folders['data']}" in planned["teacher"].arguments
    for option in (f"data.root={folders['data']}", f"distill.teacher={folders['teacher']}", "distill.nfe=4"):
        assert option in planned[student].arguments
    for name in samples:
        source = folders[student if name.startswith("student") else "teacher"]
        assert {f"source={source}", f"out={folders[name]}", "seed=2024"} <= set(planned[name].arguments)
        assert folders[name].parent == out / "samples"
    assert f"steps={long}" in planned[f"teacher_{long}"].arguments and "nfe=4" in planned[f"{student}_4"].arguments
    wanted = {f"run={out}", f"student={folders[student]}", f"sources={','.join(samples)}", f"reference={samples[0]}"}
    assert wanted <= set(planned[report].arguments)
    assert all((stages.TOOLS / stage.arguments[0]).is_file() for stage in planned.values())


@pytest.mark.parametrize("quick", [False, True])
def test_variants_share_data_teacher_and_its_samples(demo: Demo, quick: bool) -> None:
    demo.run(f"quick={quick}")
    for variant in ("dx", "datafree"):
        student = f"student_{variant}"
        assert demo.run(f"variant={variant}", f"quick={quick}") == [student, f"{student}_4", f"report_{variant}"]
    assert demo.run(f"quick={quick}") == []  # and neither takes the other's place


# What is kept


def test_finished_stages_are_not_run_again(demo: Demo) -> None:
    assert demo.run() == STAGES
    assert demo.run() == []
    assert all(demo.record(name)["seconds"] == SECONDS for name in STAGES)


@pytest.mark.parametrize("name", ["data", "student_gmm", "student_gmm_4", "report"])
def test_an_interrupted_stage_goes_on_where_it_was(demo: Demo, name: str) -> None:
    demo.ends[name] = 130
    here = STAGES.index(name)
    assert demo.stop(KeyboardInterrupt) == STAGES[: here + 1]
    assert not demo.record(name)["done"]
    assert demo.run() == STAGES[here:]
    assert demo.record(name) | {"digest": ""} == {"digest": "", "done": True, "seconds": 2 * SECONDS}
    if name != "report":
        assert demo.times_made(name) == 2  # its folder was not deleted
    assert demo.run() == []


@pytest.mark.parametrize("code", [1, -9])
def test_a_failing_stage_is_named_and_not_taken_for_done(demo: Demo, code: int) -> None:
    demo.ends["student_gmm"] = code
    with pytest.raises(WorkerFailed, match=rf"Stage student_gmm failed \(exit code {code}\)"):
        demo.run()
    assert demo.ran == STAGES[:3]
    assert demo.run() == STAGES[2:]


def test_a_demo_that_is_killed_does_not_take_its_stage_for_done(demo: Demo) -> None:
    """No code runs after a SIGKILL: while a stage runs, its record says that it is not done, also when made again."""
    running = []
    demo.before_running = lambda name: running.append(demo.record(name)["done"])
    assert len(demo.run() + demo.run("quick=true")) == len(running)
    assert not any(running)


def test_an_error_inside_a_stage_is_not_taken_for_done(demo: Demo) -> None:
    demo.ends["teacher"] = OSError("no memory")
    assert demo.stop(OSError) == STAGES[:2]
    assert demo.run() == STAGES[1:]


@pytest.mark.parametrize(
    "experiment, made_again",
    [("demo_teacher", STAGES[1:]), ("demo_gmm", ["student_gmm", "student_gmm_4", "report"])],
)
def test_changed_settings_make_that_stage_again_and_all_that_builds_on_it(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, experiment: str, made_again: list[str]
) -> None:
    demo.run()
    load = stages.load_config

    def changed(overrides: list[str]):
        return load([*overrides, "optim.lr=0.5"] if f"experiment={experiment}" in overrides else overrides)

    monkeypatch.setattr(stages, "load_config", changed)  # as if configs/ had been edited
    assert demo.run() == made_again
    for name in STAGES:  # nothing of the old folders is left
        assert demo.record(name)["seconds"] == SECONDS
        assert name == "report" or demo.times_made(name) == 1
    assert demo.run() == []


def test_a_trial_is_replaced_by_the_demo_but_for_its_data(demo: Demo) -> None:
    demo.run("quick=true")
    assert demo.run() == STAGES[1:]
    assert demo.times_made("teacher") == 1


def test_what_was_deleted_is_made_again(demo: Demo) -> None:
    demo.run()
    report = demo.stages["report"].makes
    report.unlink()
    assert demo.run() == ["report"] and report.exists()
    shutil.rmtree(demo.stages["teacher_8"].makes)
    assert demo.run() == ["teacher_8"]
    assert demo.record("teacher_8")["seconds"] == demo.record("report")["seconds"] == SECONDS


def test_the_report_finds_the_seconds_of_all_stages_before_it(demo: Demo) -> None:
    demo.ends["teacher"] = 130
    demo.stop(KeyboardInterrupt)
    found = {}

    def look(name: str) -> None:
        if name == "report":
            found.update(json.loads((demo.out / "timings.json").read_text()))

    demo.before_running = look
    demo.run()
    want = {demo.stages[name].title: SECONDS * (1 + (name == "teacher")) for name in STAGES[:-1]}
    assert found == want


# How it ends


@pytest.mark.parametrize(
    "argument, words",
    [
        ("varaint=dx", ["varaint", "variant"]),
        ("variant=gm", ["variant=gm", "gmm, dx, datafree"]),
        ("quick=maybe", ["quick=maybe"]),
        ("dx", ["dx", "key=value"]),
        ("out=/dev/null/demo", ["out=/dev/null/demo", "another folder"]),
    ],
)
def test_a_request_that_cannot_work(demo: Demo, capsys: pytest.CaptureFixture, argument: str, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_in_this_process(demo.tool.demo, [f"out={demo.out}", argument], "")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not demo.ran
    assert message.startswith("\nerror: ") and all(word in message for word in words)


@pytest.mark.parametrize("stage_code, code", [(1, 1), (2, 1), (130, 130)])
def test_exit_codes(demo: Demo, stage_code: int, code: int) -> None:
    demo.ends["data"] = stage_code
    with pytest.raises(SystemExit) as stop:
        run_in_this_process(demo.tool.demo, [f"out={demo.out}"], "")
    assert stop.value.code == code


@pytest.mark.parametrize("tool_ends", [130, 0, -15])
def test_a_tool_is_waited_for_after_ctrl_c_and_the_demo_ends(monkeypatch: pytest.MonkeyPatch, tool_ends: int) -> None:
    """Also where the tool had just finished, or did not hear the signal."""
    ends, started = [KeyboardInterrupt, KeyboardInterrupt, tool_ends], []

    def wait() -> int:
        end = ends.pop(0)
        if end is KeyboardInterrupt:
            raise end
        return end

    def popen(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(Popen=popen))
    assert stages.run_tool_process(["sample.py", "nfe=4"]) == 130
    assert started == [[sys.executable, str(REPO / "tools" / "sample.py"), "nfe=4"]] and not ends


TOOL = """
import sys, time
from piflow_dist.cli import run_tool

def sleep(arguments):
    print("ready", flush=True)
    time.sleep(600)

run_tool(sleep, sys.argv[1:], "")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_killed_takes_its_tool_along(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sleep.py").write_text(TOOL)
    code = (
        "import sys; from pathlib import Path; from piflow_dist.launch import stages\n"
        "stages.TOOLS = Path(sys.argv[1]); sys.exit(stages.run_tool_process(['sleep.py']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout.readline() == "ready\n"
        demo.send_signal(number)
        # The tool holds the other end: this returns when it is gone, and its 600 seconds are longer than any patience.
        demo.stdout.read()
        assert demo.wait() == (-number if number == signal.SIGKILL else 130)


def test_two_demos_do_not_work_in_one_folder(demo: Demo, capsys: pytest.CaptureFixture) -> None:
    refused = []

    def start_another(name: str) -> None:
        if name == "teacher":
            with pytest.raises(ConfigError, match=rf"out={demo.out} is in use by process {os.getpid()}"):
                demo.tool.demo([f"out={demo.out}"])
            refused.append(name)

    demo.before_running = start_another
    assert demo.run() == STAGES and refused == ["teacher"]
    assert demo.run() == []  # and it is free again


def test_the_report_command_of_the_docs_is_that_of_the_demo(demo: Demo) -> None:
    demo.run()
    given = parse_settings(ReportConfig, demo.stages["report"].arguments[1:])
    plain = parse_settings(ReportConfig, [f"run={demo.out}"])
    assert (given.source_names, given.reference, given.name) == (plain.source_names, plain.reference, plain.name)
    assert Path(given.student) == demo.out / "student_gmm" and plain.student is None


@pytest.mark.parametrize(
    "arguments, want",
    [
        ([], "make demo DEMO=datafree"),
        (["quick=true"], "tools/demo.py variant=datafree quick=true out="),
    ],
)
def test_it_names_commands_for_the_same_folder(
    demo: Demo, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], want: str
) -> None:
    if not arguments:
        monkeypatch.chdir(demo.out.parent)
        demo.out = Path("outputs/demo")
    demo.run(*arguments)
    assert want in capsys.readouterr().out
