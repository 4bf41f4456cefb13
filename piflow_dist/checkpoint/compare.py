"""How two checkpoints differ: settings, and every parameter, read one by one."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piflow_dist.checkpoint.files import STATE, read_json
from piflow_dist.checkpoint.reader import EMA, CheckpointWeights
from piflow_dist.checkpoint.runs import read_run_config
from piflow_dist.config import changed_keys


@dataclass(frozen=True)
class ParameterDifference:
    """|b - a| / |a| (2-norms) of the weights and of their averages; None where the shapes differ."""

    name: str
    weights: float | None
    ema: float | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Comparison:
    settings: dict[str, tuple[Any, Any]]
    state: dict[str, tuple[Any, Any]]
    parameters: list[ParameterDifference]
    """Of the parameters that both have, the largest difference first; those of other shapes before all."""
    missing: list[str]
    """In a, not in b."""
    extra: list[str]


STATE_KEYS = ("step", "dp_size", "tp", "teacher", "torch")


def compare(a: Path, b: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Comparison:
    """Raises CheckpointError where one of them is damaged."""
    states = read_json(a / STATE), read_json(b / STATE)
    weights = CheckpointWeights(a, ema=False), CheckpointWeights(b, ema=False)
    averages = tuple(copy.copy(source) for source in weights)  # the same open files: hashed once
    for source in averages:
        source.kind = EMA
    pairs, shapes = (weights, averages), tuple(source.shapes() for source in weights)
    common = [name for name in shapes[0] if name in shapes[1]]
    differences = []
    for done, name in enumerate(common, 1):
        both = (shapes[0][name], shapes[1][name])
        values = [relative(x.view(name), y.view(name)) if both[0] == both[1] else None for x, y in pairs]
        differences.append(ParameterDifference(name, *values, shapes=both))
        progress(done, len(common))
    return Comparison(
        settings=changed_keys(read_run_config(a), read_run_config(b)),
        state={key: pair for key in STATE_KEYS if (pair := (states[0].get(key), states[1].get(key)))[0] != pair[1]},
        parameters=sorted(differences, key=lambda d: -largest(d)),
        missing=[name for name in shapes[0] if name not in shapes[1]],
        extra=[name for name in shapes[1] if name not in shapes[0]],
    )


def relative(a: Tensor, b: Tensor) -> float:
    """|b - a| / |a|; of zeros (fresh adapters) that have changed, and where one is not finite: infinity."""
    change, size = (b - a).double().norm().item(), a.double().norm().item()
    if change == 0 or torch.equal(a, b):
        return 0.0
    return change / size if size > 0 and math.isfinite(change) else math.inf


def largest(difference: ParameterDifference) -> float:
    values = (difference.weights, difference.ema)
    return math.inf if None in values else max(values)
