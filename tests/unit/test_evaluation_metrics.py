"""evaluation/metrics.py against closed forms and against an independent formula in scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from piflow_dist.evaluation import metrics
from piflow_dist.evaluation.metrics import METRICS, NBSP, PSNR_CAP_DB, NotMeasurable


def gaussian(count: int, dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing


def test_frechet_distance_matches_the_matrix_square_root() -> None:
    a, b = gaussian(200, 12, seed=0), gaussian(300, 12, seed=1) + 0.5
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    want = np.sum((a.mean(0) - b.mean(0)).numpy() ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 3.0), (2.0, 0.0), (0.5, -1.0)])
def test_frechet_distance_of_a_scaled_and_shifted_set(scale: float, shift: float) -> None:
    a = gaussian(100, 5, seed=2)
    a = a - a.mean(0)
    want = 5 * shift**2 + (scale - 1) ** 2 * torch.cov(a.T).trace().item()
    assert metrics.frechet_distance(a, scale * a + shift) == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_frechet_distance_is_never_negative_and_keeps_small_differences_in_float32() -> None:
    a = gaussian(500, 64, seed=3).float()
    assert 0 <= metrics.frechet_distance(a, a) < 1e-6
    assert metrics.frechet_distance(a, a + 1e-3) == pytest.approx(64e-6, rel=0.02)


def test_frechet_distance_needs_more_samples_than_features() -> None:
    with pytest.raises(NotMeasurable, match="64 features needs at least 65 samples in each set, here are 64"):
        metrics.frechet_distance(torch.randn(64, 64), torch.randn(500, 64))


def test_psnr_of_known_errors() -> None:
    reference = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    images = reference.clone()
    images[0] += 51  # a fifth of the range: 20 log10(5) dB
    images[1] -= 5
    one, other = 20 * math.log10(5), 20 * math.log10(51)
    assert metrics.psnr_per_image(images, reference).tolist() == pytest.approx([one, other])
    assert metrics.psnr_pooled(images, reference) == pytest.approx(10 * math.log10(2 / (51**2 + 5**2) * 255**2))


def test_psnr_of_equal_images_is_capped_at_the_rounding_error() -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert metrics.psnr_per_image(images, images).tolist() == [PSNR_CAP_DB] * 3
    assert metrics.psnr_pooled(images, images) == PSNR_CAP_DB
    assert pytest.approx(10 * math.log10(12 * 255**2), abs=0.01) == PSNR_CAP_DB


def test_psnr_refuses_other_shapes_and_types() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr_per_image(images, images[:1])
    with pytest.raises(ValueError, match="uint8"):
        metrics.psnr_pooled(images.float(), images)


def test_mean_pairwise_distance_weighs_prompts_equally() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    prompts = ["a", "a", "b", "b", "b"]
    assert metrics.mean_pairwise_distance(points, prompts) == pytest.approx((5 + 4 / 3) / 2)


def test_relative_diversity() -> None:
    points, prompts = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"] * 4
    assert metrics.relative_diversity(0.9 * points + 7, points, prompts) == pytest.approx(0.9)
    with pytest.raises(NotMeasurable, match="all the same"):
        metrics.relative_diversity(points, torch.zeros(12, 3), prompts)
    with pytest.raises(NotMeasurable, match="1 of 2 prompts have one .'b'"):
        metrics.relative_diversity(points[:3], points[:3], ["a", "a", "b"])


def test_prompt_accuracy() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 1.0]])
    assert metrics.prompt_accuracy(logits, ["cat", "dog", "dog", "dog"], ["cat", "dog"]) == 0.75
    with pytest.raises(NotMeasurable, match="1 prompts are no class of the classifier .'emu'"):
        metrics.prompt_accuracy(logits, ["cat", "dog", "emu", "dog"], ["cat", "dog"])


def test_latent_relative_error() -> None:
    reference = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert metrics.latent_relative_error(1.25 * reference, reference) == pytest.approx(0.25)
    with pytest.raises(NotMeasurable, match="all zero"):
        metrics.latent_relative_error(reference, torch.zeros_like(reference))


def test_every_metric_is_defined_once_and_prints() -> None:
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    accuracy = next(metric for metric in METRICS if metric.key == "prompt_accuracy")
    assert (accuracy.text(0.966), accuracy.text(None)) == (f"96.6{NBSP}%", "—")
