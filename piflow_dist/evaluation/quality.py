"""Metrics of sets of features by torch-fidelity, and intervals by resampling.

B generated images  N real images  D features  K classes
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.compat import repair_torchvision
from piflow_dist.evaluation.metrics import Metric, NotMeasurable
from piflow_dist.evaluation.real import ROWS, Moments

NEIGHBOURS = 3
"""k of precision and recall."""
PAIR_ROWS = 1000
"""Of precision and recall: distances from so many images to all of a set are held at a time, 0.4 GiB for 50,000."""
SUBSET, SUBSETS = 1000, 100
"""Kernel distance: images in a subset, and subsets."""
KERNELS = 3 * SUBSETS * SUBSET**2
"""Pairs of images that kernel distance compares."""
IS_SPLITS, IS_SPLIT_FROM = 10, 5000
"""The inception score is averaged over splits where there are so many images; else it is of all of them."""
WIDE, WIDE_RESAMPLES = 512, 20
"""Frechet distances of more features than this are resampled so often: each takes an eigenvalue problem of their number."""
LEVEL = 0.95

BOOTSTRAP = (
    f"Intervals ({LEVEL:.0%}): images of the source are drawn anew with replacement (fixed seed), the reference's with their "
    "partners; real images stay as they are, but for recall, which is a share of them: there they are drawn. The quantiles of the results are moved so that their mean is the value, since drawing "
    "an image twice biases distances between sets. For diversity whole prompts are drawn."
)

QUALITY = (
    Metric(
        key="fid",
        title="FID",
        better="lower",
        digits=2,
        definition="Frechet distance of Gaussians fitted to the features of these images and of the real ones (torch-fidelity). It "
        f"depends on the number of images: compare equal ones. Interval: value +- 1.96 deviations of {WIDE_RESAMPLES} resamples "
        f"where there are more than {WIDE} features.",
    ),
    Metric(
        key="patch_fid",
        title="Patch FID",
        better="lower",
        digits=2,
        definition="FID of the middle 299 x 299 pixels at full resolution, which FID itself only sees reduced.",
    ),
    Metric(
        key="kid",
        title="KID x 1000",
        better="lower",
        digits=2,
        definition=f"1000 x squared MMD with a cubic kernel, mean over {SUBSETS} subsets of up to {SUBSET} images (torch-fidelity). "
        "Interval: +- 1.96 deviations of the subsets, that is of one subset's estimate.",
    ),
    Metric(
        key="inception_score",
        title="IS",
        better="higher",
        digits=2,
        definition="exp of the mean divergence of an image's class probabilities from all images' (torch-fidelity); over "
        f"{IS_SPLITS} splits from {IS_SPLIT_FROM} images on.",
    ),
    Metric(
        key="precision",
        title="Precision",
        better="higher",
        digits=3,
        definition=f"Share of these images within the {NEIGHBOURS}rd-neighbour distance of a real one (torch-fidelity).",
    ),
    Metric(
        key="recall",
        title="Recall",
        better="higher",
        digits=3,
        definition=f"Share of the real images within the {NEIGHBOURS}rd-neighbour distance of one of these (torch-fidelity).",
    ),
    Metric(
        key="clip_score",
        title="CLIP score",
        better="higher",
        digits=2,
        definition="100 x cosine between a CLIP model's embeddings of image and prompt, at least 0 (torchmetrics), averaged.",
    ),
    Metric(
        key="prompt_accuracy",
        title="Prompt accuracy",
        better="higher",
        digits=1,
        unit="%",
        definition="Share of images that the data set's small network puts into the class their prompt names.",
    ),
    Metric(
        key="psnr_db",
        title="PSNR, dB",
        better="higher",
        digits=1,
        definition="Peak signal-to-noise ratio of each image against the reference's from the same noise and prompt, averaged; "
        "equal images count 58.92 dB, the rounding to 8 bits.",
    ),
    Metric(
        key="lpips",
        title="LPIPS",
        better="lower",
        digits=3,
        definition="Perceptual distance to the reference's image from the same noise and prompt (torchmetrics), averaged.",
    ),
    Metric(
        key="latent_relative_error",
        title="Latent error",
        better="lower",
        digits=3,
        definition="|z - z'| / |z'| over all latents z of this source and z' of the reference.",
    ),
    Metric(
        key="fid_reference",
        title="Frechet to reference",
        better="lower",
        digits=2,
        definition="Frechet distance to the reference's images; both come from the same noises, so equal models would be at 0.",
    ),
    Metric(
        key="diversity",
        title="Diversity",
        better="one",
        digits=2,
        definition="Mean distance between the features of two images of one prompt, averaged over prompts, divided by the "
        "reference's. Below 1: less varied than the reference.",
    ),
    Metric(
        key="diversity_pixels",
        title="Diversity in pixels",
        better="one",
        digits=2,
        definition="The same with the distance between pixels, images brought to 32 x 32.",
    ),
    Metric(
        key="evaluations_per_image",
        title="Evaluations / image",
        better="lower",
        digits=0,
        definition="Network evaluations per image; a guided teacher evaluates its network twice a step.",
    ),
    Metric(
        key="images_per_second",
        title="Images / s",
        better="higher",
        digits=1,
        definition="Images divided by the seconds spent in the sampler, as its folder says, on the machine that sampled.",
    ),
)


@dataclass(frozen=True)
class Result:
    value: float
    low: float | None = None
    high: float | None = None


def fid(mine: Moments, theirs: Moments) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2). Raises NotMeasurable where a set is too small for a covariance of full rank."""
    library = _library("metric_fid")
    check_rank(mine, theirs)
    first, second = (
        {"mu": each.mean_D.cpu().numpy(), "sigma": each.covariance_DD.cpu().numpy()} for each in (mine, theirs)
    )
    found = library.fid_statistics_to_metric(first, second, False)[library.KEY_METRIC_FID]
    return max(found, 0.0)  # equal sets come out at about -1e-13


def check_rank(*sets: Moments) -> None:
    dimension, smallest = len(sets[0].mean_D), min(each.count for each in sets)
    if smallest <= dimension:
        raise NotMeasurable(
            f"a Frechet distance of {dimension} features needs at least {dimension + 1} images in each set, here are {smallest}: "
            "the covariance would not have full rank. Sample more images."
        )


def fid_with_interval(
    features_BD: Tensor,
    theirs: Moments,
    resamples: int,
    seed: int,
    device: torch.device,
    partners_BD: Tensor | None = None,
) -> Result:
    """FID by the library; the interval from resampled images, by a symmetric form of the same formula, which is faster.

    tr (S S')^1/2 is the sum of the roots of the eigenvalues of S'^1/2 S S'^1/2.
    partners_BD: what `theirs` is of, where each image has a partner from the same noise: both are drawn together then, as one
    set drawn anew beside the other as it is would look far from it.
    """
    value, D = fid(Moments.of(features_BD, device), theirs), features_BD.shape[1]
    repeats = repeats_of(D, resamples)
    if repeats == 0:
        return Result(value)
    other, root = theirs.to(device), None
    found = []
    for chosen_B in draws(len(features_BD), repeats, seed):
        if partners_BD is not None:
            other, root = Moments.of(partners_BD, device, chosen_B), None
        root = square_root(other.covariance_DD) if root is None else root
        mine = Moments.of(features_BD, device, chosen_B)
        roots = torch.linalg.eigvalsh(root @ mine.covariance_DD @ root).clamp(min=0).sqrt().sum()
        traces = mine.covariance_DD.trace() + other.covariance_DD.trace()
        found.append((mine.mean_D - other.mean_D).square().sum() + traces - 2 * roots)
    spread = torch.stack(found).cpu()
    if D > WIDE:
        deviation = 1.96 * spread.std().item() if repeats > 1 else 0.0
        return Result(value, max(value - deviation, 0.0), value + deviation)
    return interval(value, spread, least=0.0)


def repeats_of(features: int, resamples: int) -> int:
    return min(resamples, WIDE_RESAMPLES) if features > WIDE else resamples


def frechet_cost(count: int, features: int, resamples: int) -> float:
    """Multiplications, about: a covariance and eigenvalues for each resample."""
    return (repeats_of(features, resamples) + 1) * features**2 * (count + 10 * features)


def square_root(covariance_DD: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance_DD)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kid(features_BD: Tensor, real_ND: Tensor) -> Result:
    library = _library("metric_kid")
    size = min(SUBSET, len(features_BD), len(real_ND))
    if size < 2:
        raise NotMeasurable(f"KID needs two images in each set, here are {len(features_BD)} and {len(real_ND)}.")
    found = library.kid_features_to_metric(
        features_BD.double(), real_ND.double(), kid_subsets=SUBSETS, kid_subset_size=size, verbose=False
    )
    value, deviation = 1000 * found[library.KEY_METRIC_KID_MEAN], 1000 * found[library.KEY_METRIC_KID_STD]
    return Result(value, value - 1.96 * deviation, value + 1.96 * deviation)


def inception_score(logits_BK: Tensor, resamples: int, seed: int, device: torch.device) -> Result:
    library = _library("metric_isc")
    splits = IS_SPLITS if len(logits_BK) >= IS_SPLIT_FROM else 1
    value = library.isc_features_to_metric(logits_BK.to(device), splits)[library.KEY_METRIC_ISC_MEAN]
    return interval(value, resampled_scores(logits_BK, splits, resamples, seed, device)) if resamples else Result(value)


def resampled_scores(logits_BK: Tensor, splits: int, resamples: int, seed: int, device: torch.device) -> Tensor:
    """The inception scores of resamples R, float64, on the CPU. All at once, block by block: each takes the softmax of every image.

    log of a score = mean over images of sum p log p, less sum q log q, where q is the mean of p.
    """
    B, K = logits_BK.shape
    drawn_RB = torch.stack(draws(B, resamples, seed))
    scores_R = torch.zeros(resamples, dtype=torch.float64, device=device)
    for part_RB in drawn_RB.tensor_split(splits, dim=1):
        ones_RB = torch.ones_like(part_RB, dtype=torch.float64)
        times_RB = torch.zeros(resamples, B, dtype=torch.float64).scatter_add_(1, part_RB, ones_RB)
        q_RK, own_R = torch.zeros(resamples, K, dtype=torch.float64, device=device), torch.zeros_like(scores_R)
        for block_bK, times_Rb in zip(logits_BK.split(ROWS), times_RB.split(ROWS, dim=1), strict=True):
            log_p_bK = block_bK.to(device).double().log_softmax(dim=1)
            share_Rb = times_Rb.to(device) / part_RB.shape[1]
            q_RK += share_Rb @ log_p_bK.exp()
            own_R += share_Rb @ (log_p_bK.exp() * log_p_bK).sum(dim=1)
        scores_R += (own_R - torch.xlogy(q_RK, q_RK).sum(dim=1)).exp() / splits
    return scores_R.cpu()


def precision_recall(
    features_BD: Tensor, real_ND: Tensor, resamples: int, seed: int, device: torch.device
) -> tuple[Result, Result]:
    library = _library("metric_prc")
    if min(len(features_BD), len(real_ND)) <= NEIGHBOURS:
        raise NotMeasurable(f"precision and recall need more than {NEIGHBOURS} images in each set.")
    found = library.prc_features_to_metric(
        features_BD.to(device).double(),
        real_ND.to(device).double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=PAIR_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    generator = np.random.default_rng(seed)
    results = []
    for key, count in ((library.KEY_METRIC_PRECISION, len(features_BD)), (library.KEY_METRIC_RECALL, len(real_ND))):
        # A share of images, each in or out: as many draws of an image are a binomial number.
        drawn = generator.binomial(count, found[key], size=resamples) / count
        results.append(interval(found[key], torch.from_numpy(drawn), least=0.0, most=1.0))
    return results[0], results[1]


def mean_score(scores_B: Tensor, resamples: int, seed: int) -> Result:
    """The mean of one number an image. Raises NotMeasurable where some are not finite."""
    scores_B = scores_B.double().reshape(-1)
    if len(scores_B) == 0:
        raise NotMeasurable("no image has a score.")
    if not scores_B.isfinite().all():
        raise NotMeasurable(f"{int((~scores_B.isfinite()).sum())} of {len(scores_B)} images have no finite score.")
    return resampled(lambda drawn: drawn.mean().item(), scores_B, scores_B.mean().item(), resamples, seed)


def root_ratio(parts_B2: Tensor, resamples: int, seed: int) -> Result:
    """sqrt(sum of the first column / sum of the second)."""
    parts_B2 = parts_B2.double()
    if not parts_B2.isfinite().all() or parts_B2[:, 1].sum() <= 0:
        raise NotMeasurable("latents are missing, not finite, or the reference's are all zero.")

    def ratio(drawn: Tensor) -> float:
        above, below = drawn.sum(dim=0).tolist()
        return math.sqrt(above / below) if below > 0 else math.nan

    return resampled(ratio, parts_B2, ratio(parts_B2), resamples, seed)


def relative_diversity(
    vectors_BD: Tensor, reference_BD: Tensor, prompts: list[str], resamples: int, seed: int
) -> Result:
    """Mean distance within a prompt, averaged over prompts, divided by the reference's; whole prompts are drawn for the interval.

    Raises NotMeasurable where a prompt has one image, or the reference's are all the same.
    """
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    if not members:
        raise NotMeasurable(
            "diversity needs two images of a prompt that the reference has too. Sample more images a prompt."
        )
    single = [prompt for prompt, indices in members.items() if len(indices) < 2]
    if single:
        raise NotMeasurable(
            f"diversity needs two images of every prompt, {len(single)} of {len(members)} prompts have one ({single[0]!r} ...). "
            "Sample more images a prompt."
        )
    mine_P, theirs_P = (
        torch.stack([torch.pdist(vectors[indices].double()).mean() for indices in members.values()])
        for vectors in (vectors_BD, reference_BD)
    )
    if theirs_P.sum() == 0:
        raise NotMeasurable("the reference's images of a prompt are all the same: nothing to relate diversity to.")
    pairs_P2 = torch.stack([mine_P, theirs_P], dim=1)

    def ratio(drawn_P2: Tensor) -> float:
        above, below = drawn_P2.mean(dim=0).tolist()
        return above / below if below > 0 else math.nan

    return resampled(ratio, pairs_P2, ratio(pairs_P2), resamples, seed)


def draws(count: int, resamples: int, seed: int) -> list[Tensor]:
    """Indices of `count` out of as many, with replacement; the same for every metric of as many things."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]


def resampled(measure: Callable[[Tensor], float], rows: Tensor, value: float, resamples: int, seed: int) -> Result:
    found = [measure(rows[index_B]) for index_B in draws(len(rows), resamples, seed)]
    return interval(value, torch.tensor(found, dtype=torch.float64))


def interval(value: float, found: Tensor, least: float = -math.inf, most: float = math.inf) -> Result:
    """The quantiles of what resamples gave, moved by the difference of its mean to the value; within what a value can be."""
    found = found[found.isfinite()]
    if len(found) < 2:
        return Result(value)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=found.dtype)).tolist()
    shift = value - found.mean().item()
    return Result(value, *(min(max(end + shift, least), most) for end in (low, high)))


def _library(name: str) -> object:
    repair_torchvision()
    import importlib

    return importlib.import_module(f"torch_fidelity.{name}")
