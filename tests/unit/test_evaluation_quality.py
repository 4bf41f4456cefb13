"""evaluation/quality.py against torchmetrics, which shares no code with torch-fidelity's metrics, and its intervals."""

import math

import pytest
import torch

from data_pipeline.compat import repair_torchvision
from piflow_dist.evaluation import quality
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.quality import Result
from piflow_dist.evaluation.real import Moments

D = 6
CPU = torch.device("cpu")


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, D, generator=generator) @ mixing + shift


class Given(torch.nn.Module):
    """A feature network whose input is the features."""

    num_features = D

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def torchmetrics_image():
    repair_torchvision()
    import torchmetrics.image.fid
    import torchmetrics.image.inception
    import torchmetrics.image.kid

    return torchmetrics.image


def test_fid_is_torchmetrics(torchmetrics_image) -> None:
    real, mine = features(150, 0), features(120, 1, shift=0.3)
    want = torchmetrics_image.fid.FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    want.update(real.double(), real=True)
    want.update(mine.double(), real=False)
    found = quality.fid_with_interval(mine, Moments.of(real, CPU), 100, 0, CPU)
    assert found.value == pytest.approx(want.compute().item(), rel=1e-9)
    assert found.low < found.value < found.high


def test_kid_is_torchmetrics(torchmetrics_image) -> None:
    """With subsets as large as the sets there is one subset, whatever the order."""
    real, mine = features(90, 0), features(90, 1, shift=0.3)
    want = torchmetrics_image.kid.KernelInceptionDistance(feature=Given(), subsets=1, subset_size=90)
    want.update(real.double(), real=True)
    want.update(mine.double(), real=False)
    assert quality.kid(mine, real).value / 1000 == pytest.approx(want.compute()[0].item(), rel=1e-5)


def test_inception_score_is_torchmetrics(torchmetrics_image) -> None:
    logits = features(200, 2)
    want = torchmetrics_image.inception.InceptionScore(feature=Given(), splits=1)
    want.update(logits.double())
    found = quality.inception_score(logits, 100, 0, CPU)
    assert found.value == pytest.approx(want.compute()[0].item(), rel=1e-6)
    assert 1 < found.low < found.value < found.high < D


def test_precision_and_recall_of_the_definition() -> None:
    real, mine = features(40, 0), features(30, 1, shift=0.5)

    def inside(points: torch.Tensor, others: torch.Tensor) -> float:
        radius = torch.cdist(others, others).sort(dim=1).values[:, 3]  # itself first
        return (torch.cdist(points, others) <= radius).any(dim=1).double().mean().item()

    precision, recall = quality.precision_recall(mine, real, 200, 0, CPU)
    assert (precision.value, recall.value) == (
        pytest.approx(inside(mine.double(), real.double())),
        pytest.approx(inside(real.double(), mine.double())),
    )
    assert 0 <= precision.low < precision.value < precision.high <= 1
    assert 0 < precision.value < 1 and 0 < recall.value < 1


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of moments and of distances; a block is smaller than the sets."""
    real, mine = features(40, 0), features(30, 1, shift=0.5)
    whole = quality.precision_recall(mine, real, 0, 0, CPU)
    widths, cdist = [], torch.cdist
    monkeypatch.setattr(quality, "PAIR_ROWS", 7)
    monkeypatch.setattr(torch, "cdist", lambda a, b: widths.append((len(a), len(b))) or cdist(a, b))
    assert quality.precision_recall(mine, real, 0, 0, CPU) == whole and max(max(widths)) == 7
    monkeypatch.setattr("piflow_dist.evaluation.real.ROWS", 7)
    chosen = torch.randint(40, (40,), generator=torch.Generator().manual_seed(1))
    moments = Moments.of(real + 1e4, CPU, chosen)
    drawn = (real + 1e4)[chosen].double()
    assert moments.count == 40
    torch.testing.assert_close(moments.mean_D, drawn.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance_DD, torch.cov(drawn.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_scores_of_resamples_are_the_library_s(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ROWS", 8)
    library, logits = quality._library("metric_isc"), features(48, 2)
    want = [
        library.isc_features_to_metric(logits[chosen], splits, shuffle=False)[library.KEY_METRIC_ISC_MEAN]
        for chosen in quality.draws(48, 4, 0)
    ]
    found = quality.resampled_scores(logits, splits, 4, 0, CPU)
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_intervals_of_a_mean_are_those_of_its_standard_error() -> None:
    scores = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 2 + 5
    found = quality.mean_score(scores, 2000, 0)
    error = 1.96 * scores.std().item() / math.sqrt(400)
    assert found.value == pytest.approx(scores.mean().item(), rel=1e-6)
    assert found.high - found.value == pytest.approx(error, rel=0.1)
    assert found.value - found.low == pytest.approx(error, rel=0.1)
    assert found == quality.mean_score(scores, 2000, 0) != quality.mean_score(scores, 2000, 1)
    assert quality.mean_score(scores, 0, 0) == Result(found.value)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = sum(
        found.low <= 1.0 <= found.high
        for seed in range(200)
        for found in [quality.mean_score(1 + torch.randn(60, generator=torch.Generator().manual_seed(seed)), 200, seed)]
    )
    assert 180 <= covered <= 198  # 95 % of 200, less what 60 images and 200 draws cost


def test_partners_are_drawn_together() -> None:
    """Two nearly equal sets from the same noises: drawn apart they would look ten times as far from each other."""
    reference = features(150, 4)
    mine = reference + 0.02 * features(150, 5)
    apart = quality.fid_with_interval(mine, Moments.of(reference, CPU), 50, 0, CPU)
    together = quality.fid_with_interval(mine, Moments.of(reference, CPU), 50, 0, CPU, reference)
    assert apart.value == together.value
    assert together.high - together.low < (apart.high - apart.low) / 5


def test_the_interval_of_many_features_is_made_of_few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    real, mine = features(150, 0), features(120, 1, shift=2.0)
    monkeypatch.setattr(quality, "WIDE", D - 1)
    found = quality.fid_with_interval(mine, Moments.of(real, CPU), 1000, 0, CPU)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert found == quality.fid_with_interval(mine, Moments.of(real, CPU), 20, 0, CPU)


def test_diversity_relative_to_the_reference() -> None:
    reference = torch.tensor([[0.0], [2.0], [0.0], [4.0]])
    prompts = ["a", "a", "b", "b"]
    assert quality.relative_diversity(reference / 2, reference, prompts, 10, 0).value == pytest.approx(0.5)
    found = quality.relative_diversity(torch.tensor([[0.0], [2.0], [0.0], [0.0]]), reference, prompts, 200, 0)
    assert found.value == pytest.approx(1 / 3) and found.low < found.value < found.high
    with pytest.raises(NotMeasurable, match="1 of 2 prompts have one"):
        quality.relative_diversity(reference[:3], reference[:3], ["a", "a", "b"], 10, 0)


def test_too_few_images_are_said() -> None:
    with pytest.raises(NotMeasurable, match="6 features needs at least 7 images in each set, here are 6"):
        quality.fid_with_interval(features(6, 0), Moments.of(features(50, 1), CPU), 10, 0, CPU)
    with pytest.raises(NotMeasurable, match="1 of 3 images have no finite score"):
        quality.mean_score(torch.tensor([1.0, math.nan, 2.0]), 10, 0)
    with pytest.raises(NotMeasurable, match="more than 3 images"):
        quality.precision_recall(features(3, 0), features(9, 0), 10, 0, CPU)
