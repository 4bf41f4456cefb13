"""evaluation/measures.py: which images are compared where some could not be made."""

from pathlib import Path

import pytest
import torch

from piflow_dist.evaluation.instruments import Tools
from piflow_dist.evaluation.measures import measures_of
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.quality import Result, relative_diversity
from piflow_dist.evaluation.samples import EvaluationError, SampleFolder, distinct_titles, pair_up

CPU = torch.device("cpu")
LINES = [{"prompt": prompt, "seed": seed} for prompt in ("a", "b", "c") for seed in (0, 1, 2)]


def made(name: str, *missing: int) -> SampleFolder:
    return SampleFolder(Path(name), {}, [line for place, line in enumerate(LINES) if place not in missing])


def test_a_prompt_that_lost_its_other_images_has_no_diversity() -> None:
    samples, reference = made("samples", 3, 4), made("reference", 8)
    pairs = pair_up(samples, reference)
    assert pairs == {0: 0, 1: 1, 2: 2, 3: 5, 4: 6, 5: 7}  # b is left with one image
    generator = torch.Generator().manual_seed(0)
    seen = {
        folder.path: {"pixels": torch.randn(len(folder), 4, generator=generator)} for folder in (samples, reference)
    }
    seen[samples.path] |= {"psnr": torch.tensor([1.0, 2, 3, 4, 5, 6, torch.nan]), "latent": torch.empty(7, 0)}
    found = {
        measure.keys: measure
        for measure in measures_of(samples, seen, reference, pairs, Tools(), resamples=0, device=CPU)
    }
    assert found[("psnr_db",)]()["psnr_db"] == Result(3.5)
    mine, theirs = (seen[folder.path]["pixels"] for folder in (samples, reference))
    want = relative_diversity(mine[[0, 1, 2, 4, 5]], theirs[[0, 1, 2, 6, 7]], list("aaacc"), 0, 0)
    assert found[("diversity_pixels",)]()["diversity_pixels"] == want


def test_one_image_a_prompt_has_no_diversity() -> None:
    lines = [LINES[0], LINES[3]]
    samples = SampleFolder(Path("samples"), {}, lines)
    seen = {samples.path: {"pixels": torch.zeros(2, 4)}}
    (measure,) = measures_of(samples, seen, samples, pair_up(samples, samples), Tools(), resamples=0, device=CPU)
    with pytest.raises(NotMeasurable, match="two images of every prompt, 2 of 2 prompts have one"):
        measure()


def test_a_prompt_that_is_listed_twice_has_partners_of_its_own() -> None:
    twice = SampleFolder(Path("twice"), {}, [LINES[0], LINES[1], LINES[0]])
    assert pair_up(twice, twice) == {0: 0, 1: 1, 2: 2}
    assert pair_up(twice, made("once")) == {0: 0, 1: 1}
    with pytest.raises(EvaluationError, match="twice and other have no prompt and seed in common"):
        pair_up(twice, SampleFolder(Path("other"), {}, LINES[3:]))


def test_rows_of_one_title_are_told_apart() -> None:
    folders = [
        SampleFolder(Path(name), {"kind": "student", "nfe": nfe}, []) for name, nfe in (("a", 4), ("b", 4), ("c", 2))
    ]
    assert distinct_titles(folders) == ["student, 4 NFE (a)", "student, 4 NFE (b)", "student, 2 NFE"]
