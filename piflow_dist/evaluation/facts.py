"""What a report says beside its measurements: settings, machine, timings, and where to go next."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from piflow_dist.evaluation.samples import EvaluationError, SampleFolder
from piflow_dist.launch.console import program

SETTINGS = {
    "Objective": "objective",
    "Policy": "policy.type",
    "Components K": "policy.num_components",
    "Nodes N": "policy.num_nodes",
    "Student NFE": "distill.nfe",
    "Teacher guidance": "distill.guidance.scale",
    "Guidance interval": "distill.guidance.interval",
    "Optimizer": "optim.type",
    "Training steps": "train.steps",
    "Batch size": "train.batch_size",
    "Processes": "launch.processes",
    "Seed": "train.seed",
}
"""What is shown of the student's config.yaml; the whole file is shown folded."""


def title_of(settings: DictConfig) -> str:
    """Which demo this is, in words, from the student's settings."""
    policy = OmegaConf.select(settings, "policy.type")
    mode, nodes = OmegaConf.select(settings, "policy.mode"), OmegaConf.select(settings, "policy.num_nodes")
    kinds = {
        "gmflow": f"GMFlow policy (K = {OmegaConf.select(settings, 'policy.num_components')})",
        "dx": f"DX policy ({mode}, N = {nodes})",
        "mean": "mean velocity",
    }
    objective = OmegaConf.select(settings, "objective")
    sources = {
        "imitation": "distilled on data",
        "imitation_datafree": "distilled without data",
        "meanflow": "MeanFlow",
        "shortcut_regression": "the teacher's end points regressed",
    }
    nfe = OmegaConf.select(settings, "distill.nfe")
    policy_text, source_text = kinds.get(policy, f"policy {policy}"), sources.get(objective, f"objective {objective}")
    return f"Student: {policy_text}, {nfe} NFE, {source_text}"


def chosen_settings(settings: DictConfig) -> dict[str, str]:
    read_by = {"policy.num_components": "gmflow", "policy.num_nodes": "dx"}
    kind = OmegaConf.select(settings, "policy.type")
    found = {
        title: OmegaConf.select(settings, key) for title, key in SETTINGS.items() if read_by.get(key, kind) == kind
    }
    return {title: str(value) for title, value in found.items() if value is not None}


def sampling_settings(folders: Iterable[SampleFolder]) -> dict[str, str]:
    guidance = sorted({folder.guidance for folder in folders if folder.guidance})
    return {"Guidance of the sampled teacher": ", ".join(guidance)} if guidance else {}


def machine() -> dict[str, str]:
    """Facts of the machine that built the report; training and sampling may have run elsewhere."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "CPU cores": f"{usable} usable of {os.cpu_count()}",
        "GPU": gpu,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "System": f"{platform.system()} {platform.machine()}",
    }


def next_steps(samples: Path, reference: Path, dataset: Path, teacher: Path, another: str | None) -> dict[str, str]:
    """What to try -> command. another: that which makes another kind of student."""
    python, student = program("python"), teacher.with_name("student_nfe2")
    steps = {"Another kind of student (dx, datafree or gmm)": another} if another else {}
    return steps | {
        "Another number of steps": f"{python} tools/launch.py experiment=demo_gmm distill.nfe=2 data.root={dataset} "
        f"distill.teacher={teacher} run_dir={student}",
        "These metrics for one folder of samples": f"{python} tools/evaluate.py samples={samples} reference={reference} "
        f"dataset={dataset}",
    }


def read_timings(path: Path) -> dict[str, float]:
    """Stage -> seconds, in the order in which the stages ran."""
    try:
        timings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is not JSON: {error}.") from error
    if not isinstance(timings, dict) or not all(isinstance(value, int | float) for value in timings.values()):
        raise EvaluationError(f'{path} should hold seconds by stage, as in {{"data": 12.5}}.')
    return timings


def read_yaml(path: Path) -> DictConfig:
    try:
        settings = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise EvaluationError(f"{path} is not yaml: {error}.") from error
    if not isinstance(settings, DictConfig):
        raise EvaluationError(f"{path} holds no settings by name.")
    return settings


def duration(seconds: float) -> str:
    """95.2 -> '1 min 35 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else (f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s")
