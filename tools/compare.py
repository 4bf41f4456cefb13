"""Imitation beside MeanFlow and regression of end points: python tools/compare.py [steps=400 seeds=3 out=outputs/compare] [key=value].

The demo's data and teacher -> a student of every objective, number of evaluations and seed, of equal budget -> samples from the same
noises -> compare.md, compare.png, compare.json. Finished stages are kept, an interrupted one goes on where it was.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline.settings import list_settings
from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.cli import parse_options, run_tool
from piflow_dist.config import load_config, require, require_positive
from piflow_dist.evaluation.evaluate import Judge, as_json
from piflow_dist.evaluation.objectives import Budget, Entry, budget, panels, tables
from piflow_dist.evaluation.progress import training_progress
from piflow_dist.evaluation.samples import load_samples
from piflow_dist.launch.console import console
from piflow_dist.launch.stages import Stage, run_stage, sample_stage, stages_folder, train_stage

METHODS = {
    "gmm": ("imitation, GMFlow", "demo_gmm", []),
    "dx": ("imitation, DX", "demo_dx", []),
    "datafree": ("imitation, no data", "demo_datafree", ["checkpoint.every=100"]),
    "meanflow": ("MeanFlow", "demo_meanflow", []),
    "shortcut": ("end points, 8 substeps", "demo_shortcut", []),
    "shortcut2": ("end points, 2 substeps", "demo_shortcut", ["distill.teacher_substeps=2"]),
}
"""Name -> (title, experiment, what it changes). shortcut2 asks the teacher as often as imitation does."""
REFERENCE_STEPS, GUIDANCE = 100, 2


@dataclass(kw_only=True)
class CompareConfig:
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Which of gmm, dx, datafree, meanflow, shortcut, shortcut2."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Evaluations per image: one training for each, but one for all with meanflow."""
    seeds: int = 3
    """Trainings of each kind, with train.seed=0, 1, ..."""
    steps: int = 400
    """Of every student."""
    batch_size: int = 64
    teacher_steps: int = 1300
    images: int = 50
    """Per prompt and sample folder."""
    processes: int = 2
    threads: int = 1
    """Of each process."""
    out: str = "outputs/compare"

    def __post_init__(self):
        require_positive(
            "compare", self, "seeds", "steps", "batch_size", "teacher_steps", "images", "processes", "threads"
        )
        unknown = [name for name in self.methods if name not in METHODS]
        require(not unknown, f"methods: {', '.join(unknown)} is not known. Choose from {', '.join(METHODS)}.")
        require(bool(self.methods), f"methods is empty. Choose from {', '.join(METHODS)}.")
        require(bool(self.nfe) and min(self.nfe) >= 1, f"nfe={self.nfe} must be numbers of evaluations, 1 or more.")


@dataclass(frozen=True)
class Student:
    method: str
    stage: Stage
    samples: dict[int, Stage]
    """By number of evaluations."""


def plan(config: CompareConfig) -> tuple[list[Stage], dict[int, Stage], list[Student]]:
    """(data and teacher, the teacher's samples by steps, students with their samples)."""
    out = Path(config.out)
    arguments = ["prepare_data.py", "source=digits", f"out={out / 'data'}"]
    data = Stage("data", "5,000 digits -> DALI -> MDS shards", arguments, out / "data")
    common = [
        f"data.root={data.makes}",
        f"launch.processes={config.processes}",
        f"launch.threads={config.threads}",
        "tracking.enabled=false",
    ]
    count = [f"train.steps={config.teacher_steps}", f"ema.start_step={min(100, config.teacher_steps // 4)}"]
    teacher = train_stage("teacher: flow matching", "demo_teacher", out / "teacher", common + count, data)
    workers = [f"launch.processes={config.processes}", f"launch.threads={config.threads}"]

    def sampled(title: str, source: Stage, name: str, overrides: list[str]) -> Stage:
        return sample_stage(title, source, out / "samples" / name, config.images, [*overrides, *workers])

    references = {
        steps: sampled(
            f"samples: teacher, {steps} steps", teacher, f"teacher_{steps}", [f"steps={steps}", f"guidance={GUIDANCE}"]
        )
        for steps in (REFERENCE_STEPS, *sorted(config.nfe, reverse=True))
    }
    students = []
    for seed in range(config.seeds):
        for method in config.methods:
            title, experiment, changes = METHODS[method]
            for trained in config.nfe if method != "meanflow" else [max(config.nfe)]:
                name = f"{method}_{seed}" if method == "meanflow" else f"{method}_nfe{trained}_{seed}"
                settings = [
                    f"distill.teacher={teacher.makes}",
                    f"distill.guidance.scale={GUIDANCE}",
                    f"distill.nfe={trained}",
                    f"train.steps={config.steps}",
                    f"train.batch_size={config.batch_size}",
                    f"train.seed={seed}",
                    f"ema.start_step={min(100, config.steps // 4)}",
                    *changes,
                ]
                stage = train_stage(f"{title}: {name}", experiment, out / name, [*common, *settings], teacher)
                options = ["temperature=1"] if method == "gmm" else []
                samples = {
                    nfe: sampled(f"samples: {name}, {nfe} NFE", stage, f"{name}_at{nfe}", [f"nfe={nfe}", *options])
                    for nfe in (config.nfe if method == "meanflow" else [trained])
                }
                students.append(Student(method, stage, samples))
    return [data, teacher], references, students


def measure(
    config: CompareConfig, references: dict[int, Stage], students: list[Student]
) -> tuple[list[Entry], list[Budget]]:
    """Every sample folder against the teacher's at 100 steps; metrics.json is left in each."""
    out = Path(config.out)
    with training_progress() as progress:
        judge = Judge.from_dataset(out / "data", cache_dir=out / "feature_net", progress=progress)
    reference = load_samples(references[REFERENCE_STEPS].makes)

    def values(stage: Stage) -> dict[str, float | None]:
        samples = load_samples(stage.makes)
        found = judge.measure(samples, reference)
        result = as_json(found, judge, samples, reference, out / "data")
        write_atomic(stage.makes / "metrics.json", json.dumps(result, indent=2) + "\n")
        return found.values

    entries = [Entry("teacher, Euler", steps, [values(stage)]) for steps, stage in references.items()]
    budgets = []
    for method in config.methods:
        title, mine = METHODS[method][0], [student for student in students if student.method == method]
        for nfe in sorted(config.nfe):
            folders = [student.samples[nfe] for student in mine if nfe in student.samples]
            entries.append(Entry(title, nfe, [values(stage) for stage in folders]))
        kinds: dict[int, list[Student]] = {}
        for student in mine:
            kinds.setdefault(max(student.samples), []).append(student)
        for nfe in sorted(kinds):
            arguments = kinds[nfe][0].stage.arguments[1:]
            budgets.append(budget(title, load_config(arguments), [student.stage.makes for student in kinds[nfe]]))
    return entries, budgets


def compare(arguments: list[str]) -> None:
    config = parse_options(CompareConfig, arguments)
    out = Path(config.out)
    with stages_folder(out) as records:
        first, references, students = plan(config)
        stages = [*first, *references.values()]
        for student in students:
            stages += [student.stage, *student.samples.values()]
        for place, stage in enumerate(stages):
            console.print(f"[dim]{place + 1} of {len(stages)}[/]", end=" ")
            run_stage(stage, records)
        entries, budgets = measure(config, references, students)
        content = {"entries": [asdict(entry) for entry in entries], "budgets": [asdict(b) for b in budgets]}
        write_atomic(out / "compare.json", json.dumps({"settings": asdict(config), **content}, indent=1))
        write_atomic(out / "compare.md", tables(entries, budgets))
        (out / "compare.png").write_bytes(panels(entries))
    console.print(tables(entries, budgets), markup=False, soft_wrap=True)
    console.print(f"Written: {out}/compare.md, compare.png, compare.json", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_tool(compare, sys.argv[1:], f"{__doc__}\n{list_settings(CompareConfig)}")
