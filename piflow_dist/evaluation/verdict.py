"""Sentences computed from the measurements. They state what the table holds and nothing else."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from piflow_dist.evaluation.evaluate import Evaluation
from piflow_dist.evaluation.metrics import METRICS, NBSP

TITLES = {metric.key: metric for metric in METRICS}
LEVEL = {
    "psnr_db": 0.5,
    "psnr_pooled_db": 0.5,
    "frechet_reference": 0.10,
    "frechet_real": 0.10,
    "diversity": 0.02,
    "prompt_accuracy": 0.01,
}
"""Differences up to these count as level: dB, share of the larger distance, ratio to the reference, share of images."""
TRUSTED_SHARE = 0.9
"""A reference whose prompt accuracy is below this share of real images' is called unreliable."""
LEVEL_TEXT = (
    f"Level: PSNR within {LEVEL['psnr_db']} dB, Frechet distance within {100 * LEVEL['frechet_reference']:.0f} % "
    f"of the larger, diversity as near to 1 within {LEVEL['diversity']}, prompt accuracy within "
    f"{100 * LEVEL['prompt_accuracy']:.0f} point. A convention of this report, not a test of significance: there is "
    "one training and one set of noises."
)


@dataclass(frozen=True, kw_only=True)
class Target:
    what: str
    measured: str
    met: bool | None
    """None: not measured."""


def verdict(rows: Sequence[Evaluation], reference: str) -> list[str]:
    """What the reference is worth, then a sentence for each student and other teacher, on prompts and on speed."""
    whole = next(row for row in rows if row.name == reference)
    sentences = [_reference_itself(whole, next((row for row in rows if row.kind == "real"), None))]
    for student in (row for row in rows if row.kind == "student"):
        teachers = [row for row in rows if row.kind == "teacher" and row.name != reference]
        # The fairest opponent first: the teacher at the student's own number of steps.
        for teacher in sorted(teachers, key=lambda row: (row.steps != student.steps, row.steps)):
            sentences.append(_comparison(student, teacher))
        sentences += _against_reference(student, whole)
    return sentences


def targets(rows: Sequence[Evaluation], reference: str) -> list[Target]:
    """What the full-length demo should reach, beside what was reached. Empty without a student."""
    whole = next(row for row in rows if row.name == reference)
    student = next((row for row in rows if row.kind == "student"), None)
    if student is None:
        return []
    few = next(
        (row for row in rows if row.kind == "teacher" and row.steps == student.steps and row.name != reference), None
    )
    wanted: list[tuple[str, str, list[Evaluation], Callable[..., bool]]] = [
        ("Prompt accuracy of the reference at least 90 %", "prompt_accuracy", [whole], lambda best: best >= 0.9),
        ("PSNR at least 29.5 dB", "psnr_db", [student], lambda mine: mine >= 29.5),
        ("Frechet distance at most 1.0", "frechet_reference", [student], lambda mine: mine <= 1.0),
        ("Diversity between 0.95 and 1.02", "diversity", [student], lambda mine: 0.95 <= mine <= 1.02),
        (
            "Prompt accuracy at most 2 points below the reference's",
            "prompt_accuracy",
            [student, whole],
            lambda mine, best: mine >= best - 0.02 - 1e-9,
        ),
    ]
    if few is not None:
        pair = [student, few]
        wanted += [
            (
                f"PSNR at least 2.5 dB above the {few.phrase}'s",
                "psnr_db",
                pair,
                lambda mine, other: mine >= other + 2.5,
            ),
            (
                f"Frechet distance at most a third of the {few.phrase}'s",
                "frechet_reference",
                pair,
                lambda mine, other: mine <= other / 3,
            ),
        ]
    return [_target(what, key, [row.values[key] for row in of], test) for what, key, of, test in wanted]


def compare(key: str, mine: float, theirs: float) -> str:
    """ahead, level or behind, by the metric's sense of better and the margin in LEVEL."""
    metric = TITLES[key]
    if metric.better == "one":
        gain = abs(theirs - 1) - abs(mine - 1)
    else:
        gain = (mine - theirs) * (1 if metric.better == "higher" else -1)
    margin = LEVEL[key] * (max(mine, theirs) if key.startswith("frechet") else 1)
    if abs(gain) <= margin + 1e-12:
        return "level"
    return "ahead" if gain > 0 else "behind"


def _reference_itself(reference: Evaluation, real: Evaluation | None) -> str:
    said = (
        f"PSNR, Frechet distance and diversity are measured against the {reference.phrase}'s images from the same "
        f"{reference.count} noises."
    )
    mine = reference.values["prompt_accuracy"]
    theirs = real.values["prompt_accuracy"] if real else None
    if mine is None or theirs is None:
        return said
    accuracy = TITLES["prompt_accuracy"]
    said += f" Of these, {accuracy.text(mine)} are classified as their prompt ({accuracy.text(theirs)} of real images)"
    if mine < TRUSTED_SHARE * theirs:
        return f"{said}: the reference itself does not draw its prompts reliably, and nearness to it is not quality."
    return f"{said}."


def _comparison(student: Evaluation, teacher: Evaluation) -> str:
    names = {
        "psnr_db": "PSNR",
        "psnr_pooled_db": "pooled PSNR",
        "frechet_reference": "Frechet distance",
        "frechet_real": "Frechet distance to real images",
        "diversity": "diversity",
        "prompt_accuracy": "prompt accuracy",
    }
    parts: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for key, name in names.items():
        mine, theirs = student.values[key], teacher.values[key]
        if mine is not None and theirs is not None:
            parts[compare(key, mine, theirs)].append(f"{name} ({_against(key, mine, theirs)})")
    said = (
        "; ".join(f"{word} in {_listed(items)}" for word, items in parts.items() if items)
        or "nothing could be compared"
    )
    return f"The {student.phrase} beside the {teacher.phrase}{_cost(student, teacher)}: {said}."


def _against_reference(student: Evaluation, reference: Evaluation) -> list[str]:
    sentences = []
    mine, theirs = (row.values["prompt_accuracy"] for row in (student, reference))
    if mine is not None and theirs is not None:
        sentences.append(
            f"Of the student's images, {TITLES['prompt_accuracy'].text(mine)} are classified as their prompt; of the "
            f"{reference.phrase}'s, {TITLES['prompt_accuracy'].text(theirs)}."
        )
    mine, theirs = (row.values["images_per_second"] for row in (student, reference))
    if mine and theirs:
        sentences.append(
            f"The student made {mine:.1f} images a second, the {reference.phrase} {theirs:.1f}: {mine / theirs:.1f} "
            f"times as many{_cost(student, reference)}."
        )
    return sentences


def _cost(student: Evaluation, teacher: Evaluation) -> str:
    mine, theirs = (row.values["evaluations_per_image"] for row in (student, teacher))
    if mine is None or theirs is None:
        return ""
    return f" ({_against('evaluations_per_image', mine, theirs)} network evaluations an image)"


def _target(what: str, key: str, values: list[float | None], test: Callable[..., bool]) -> Target:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Target(what=what, measured="not measured", met=None)
    # One digit more than in the table, so that a near miss does not look like the limit.
    return Target(what=what, measured=_against(key, *known, more_digits=1), met=bool(test(*known)))


def _against(key: str, *values: float, more_digits: int = 0) -> str:
    """'32.1 against 26.9 dB'; the unit is said once."""
    unit = {"psnr_db": f"{NBSP}dB", "prompt_accuracy": f"{NBSP}%"}.get(key, "")
    metric = dataclasses.replace(TITLES[key], digits=TITLES[key].digits + more_digits)
    return " against ".join(metric.text(value).removesuffix(unit) for value in values) + unit


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
