"""The demo: python tools/demo.py [variant=gmm|dx|datafree] [quick=true] [out=outputs/demo]. `make demo` calls it.

Digits -> MDS shards -> teacher -> student on 2 ZeRO-3 processes -> samples -> report. Finished stages are kept; a stage that
was interrupted goes on where it was; a stage whose settings changed is made again, and all that builds on it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.settings import list_settings
from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.cli import parse_options, run_tool
from piflow_dist.config import load_config, require_choice
from piflow_dist.launch.console import console, program
from piflow_dist.launch.stages import Stage, run_stage, sample_stage, stages_folder, train_stage
from piflow_dist.tracking.tracker import tracking_uri, ui_command

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


def write_timings(stages: list[Stage], records: Path, path: Path) -> None:
    found = {stage.title: records / f"{stage.name}.json" for stage in stages}
    timings = {title: json.loads(record.read_text())["seconds"] for title, record in found.items() if record.exists()}
    write_atomic(path, json.dumps(timings, indent=1))


def demo(arguments: list[str]) -> None:
    config = parse_options(DemoConfig, arguments)
    out = Path(config.out)
    with stages_folder(out) as records:
        stages = plan(config)
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
