"""Which checkpoints of a run are kept: the newest, every n-th step, the best by a metric. The rest is deleted."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from piflow_dist.checkpoint.files import STATE, CheckpointError, read_json, step_name, steps_on_disk, verify


@dataclass(frozen=True)
class Retention:
    """Fields as in CheckpointConfig."""

    keep: int
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "loss_smooth"
    best_mode: str = "min"

    def kept(self, metrics: dict[int, dict[str, float]]) -> set[int]:
        """The steps to keep of those given with the metrics that were saved with them. Ties go to the later step."""
        steps = sorted(metrics, reverse=True)
        kept = set(steps[: self.keep])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        sign = 1 if self.best_mode == "min" else -1
        rated = [step for step in steps if self.best_metric in metrics[step]]
        return kept | set(sorted(rated, key=lambda step: sign * metrics[step][self.best_metric])[: self.keep_best])


def remove_old(
    folder: Path, rule: Retention, newest: int | None = None, pause: Callable[[str], None] = lambda phase: None
) -> list[int]:
    """Delete the checkpoints that the rule does not keep, and what killed saves left behind. Returns the deleted steps.

    newest: the step just saved. Later folders are left alone and do not count, and so are damaged ones (those of which
    a file is missing or cut): neither can push out a good one.
    pause(phase): called when folders have lost their good names but are still there.
    Raises OSError for what cannot be deleted, after all else was.
    """
    metrics = {}
    for step in steps_on_disk(folder):
        if newest is None or step <= newest:
            try:
                verify(folder / step_name(step), contents=False)
                metrics[step] = read_json(folder / step_name(step) / STATE).get("metrics", {})
            except CheckpointError:
                continue  # resuming names it; people decide
    doomed = sorted(metrics.keys() - rule.kept(metrics))
    for step in doomed:
        # Renamed first: a kill inside the deletion must not leave a half-empty folder under a good name.
        aside = folder / f".{step_name(step)}.removed"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder / step_name(step), aside)
    pause("retention")
    stuck: OSError | None = None
    for leftover in (*folder.glob(".step_*.removed"), *folder.glob(".step_*.tmp")):
        try:
            shutil.rmtree(leftover)
        except FileNotFoundError:
            continue  # somebody else has just removed it
        except OSError as error:
            stuck = error
    if stuck is not None:
        raise stuck
    return doomed
