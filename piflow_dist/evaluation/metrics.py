"""The metrics: plain functions of tensors, and one table that says what each number means.

Frechet distance and PSNR are torchmetrics'; ours are the checks in front of them and the small rest.
B samples, D features, K classes.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.compat import repair_torchvision

NBSP = "\N{NO-BREAK SPACE}"
PSNR_CAP_DB = 58.92
"""10 log10(12 * 255^2): PSNR of the rounding to 8 bits. Equal images count as this, not as infinite."""


class NotMeasurable(ValueError):
    """This metric has no value for these samples; the message says why and what would give it one."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    key: str
    title: str
    better: str
    """higher, lower or one (nearest to 1)."""
    digits: int
    definition: str
    unit: str = ""

    @property
    def sense(self) -> str:
        return {"higher": "higher is better", "lower": "lower is better", "one": "1 is the reference's"}[self.better]

    def text(self, value: float | None) -> str:
        """The number as shown in tables; an em dash where there is none."""
        if value is None:
            return "—"
        return f"{100 * value:.1f}{NBSP}%" if self.unit == "%" else f"{value:.{self.digits}f}"


METRICS = (
    Metric(
        key="psnr_db",
        title="PSNR, dB",
        better="higher",
        digits=1,
        definition="Peak signal-to-noise ratio between each image and the reference's from the same noise and prompt: "
        "10 log10(1 / mean squared error) over pixels in [0, 1], averaged over the images. An image equal to the "
        f"reference's counts {PSNR_CAP_DB} dB, the rounding to 8 bits.",
    ),
    Metric(
        key="psnr_pooled_db",
        title="PSNR pooled, dB",
        better="higher",
        digits=1,
        definition="The same with one mean squared error over the pixels of all images: dominated by the images that "
        "went elsewhere than the reference's.",
    ),
    Metric(
        key="frechet_reference",
        title="Frechet to reference",
        better="lower",
        digits=2,
        definition="Frechet distance between Gaussians fitted to the features of these images and of the reference's: "
        "|m-m'|^2 + tr(S + S' - 2 (S S')^1/2). Features: 64 activations of a small network trained to classify the "
        "real training images, each scaled to mean 0 and variance 1 over them. Both sets come from the same noises, so "
        "equal models would be at 0.",
    ),
    Metric(
        key="frechet_real",
        title="Frechet to real",
        better="lower",
        digits=2,
        definition="The same distance to all real training images. It is not 0 for perfect samples: a small set has a "
        "distance of its own, as the row of held-out real images shows.",
    ),
    Metric(
        key="diversity",
        title="Diversity",
        better="one",
        digits=2,
        definition="Mean Euclidean distance between the features of two images of one prompt, averaged over prompts, "
        "divided by the reference's. Below 1: less varied than the reference.",
    ),
    Metric(
        key="diversity_pixels",
        title="Diversity in pixels",
        better="one",
        digits=2,
        definition="The same with the distance between pixels instead of features.",
    ),
    Metric(
        key="prompt_accuracy",
        title="Prompt accuracy",
        better="higher",
        digits=1,
        unit="%",
        definition="Share of images that the same small network puts into the class their prompt names.",
    ),
    Metric(
        key="latent_relative_error",
        title="Latent error",
        better="lower",
        digits=3,
        definition="|z - z'| / |z'| over all latents z of this folder and z' of the reference from the same noises.",
    ),
    Metric(
        key="evaluations_per_image",
        title="Evaluations / image",
        better="lower",
        digits=0,
        definition="Network evaluations per image. A guided teacher evaluates its network twice a step: with and "
        "without the prompt.",
    ),
    Metric(
        key="images_per_second",
        title="Images / s",
        better="higher",
        digits=1,
        definition="Images divided by the seconds spent in the sampler, decoding not counted, on the machine that "
        "sampled.",
    ),
)


def frechet_distance(features_a_BD: Tensor, features_b_BD: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of the two sets' means and covariances, in float64.

    Raises NotMeasurable where a set is too small for a covariance of full rank: it needs more samples than features.
    """
    dimension = features_a_BD.shape[1]
    smallest = min(len(features_a_BD), len(features_b_BD))
    if smallest <= dimension:
        raise NotMeasurable(
            f"a Frechet distance of {dimension} features needs at least {dimension + 1} samples in each set, here are "
            f"{smallest}: the covariance would not have full rank. Sample more images."
        )
    repair_torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    metric = FrechetInceptionDistance(feature=_Identity(dimension))
    metric.update(features_a_BD.double().cpu(), real=True)
    metric.update(features_b_BD.double().cpu(), real=False)
    return max(metric.compute().item(), 0.0)  # equal sets come out at about -1e-13


class _Identity(nn.Module):
    """Stands where torchmetrics expects a feature network: the features are already there."""

    def __init__(self, dimension: int):
        super().__init__()
        self.num_features = dimension

    def forward(self, features_BD: Tensor) -> Tensor:
        return features_BD


def psnr_per_image(images_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """PSNR in dB of each uint8 image against the reference's (B,), float64, at most PSNR_CAP_DB."""
    return _psnr(images_BCHW, reference_BCHW, dim=(1, 2, 3)).clamp(max=PSNR_CAP_DB)


def psnr_pooled(images_BCHW: Tensor, reference_BCHW: Tensor) -> float:
    """PSNR in dB of the mean squared error over the pixels of all uint8 images, at most PSNR_CAP_DB."""
    return min(_psnr(images_BCHW, reference_BCHW, dim=None).item(), PSNR_CAP_DB)


def _psnr(images_BCHW: Tensor, reference_BCHW: Tensor, dim: tuple[int, ...] | None) -> Tensor:
    if images_BCHW.shape != reference_BCHW.shape or {images_BCHW.dtype, reference_BCHW.dtype} != {torch.uint8}:
        raise ValueError(
            f"PSNR compares uint8 images of one shape, got {tuple(images_BCHW.shape)} {images_BCHW.dtype} and "
            f"{tuple(reference_BCHW.shape)} {reference_BCHW.dtype}."
        )
    repair_torchvision()
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds to import

    reduction = "elementwise_mean" if dim is None else "none"
    return peak_signal_noise_ratio(
        images_BCHW.double() / 255, reference_BCHW.double() / 255, data_range=1.0, dim=dim, reduction=reduction
    )


def mean_pairwise_distance(vectors_BD: Tensor, prompts: list[str]) -> float:
    """Mean Euclidean distance between two different samples of one prompt, averaged over the prompts with equal weight.

    Raises NotMeasurable where a prompt has a single sample.
    """
    members = defaultdict(list)
    for index, prompt in enumerate(prompts):
        members[prompt].append(index)
    single = [prompt for prompt, indices in members.items() if len(indices) < 2]
    if single:
        raise NotMeasurable(
            f"diversity needs two samples of every prompt, {len(single)} of {len(members)} prompts have one "
            f"({single[0]!r} ...). Sample more images a prompt."
        )
    means = [torch.pdist(vectors_BD[indices].double()).mean() for indices in members.values()]
    return torch.stack(means).mean().item()


def relative_diversity(vectors_BD: Tensor, reference_BD: Tensor, prompts: list[str]) -> float:
    """mean_pairwise_distance divided by the reference's; both sets have the same prompts."""
    whole = mean_pairwise_distance(reference_BD, prompts)
    if whole == 0:
        raise NotMeasurable("the reference's images of a prompt are all the same: nothing to relate diversity to.")
    return mean_pairwise_distance(vectors_BD, prompts) / whole


def prompt_accuracy(logits_BK: Tensor, prompts: list[str], classes: list[str]) -> float:
    """Share of samples whose largest logit belongs to the class of their prompt, 0 to 1.

    Raises NotMeasurable where a prompt is no class of the classifier.
    """
    unknown = sorted(set(prompts) - set(classes))
    if unknown:
        raise NotMeasurable(
            f"{len(unknown)} prompts are no class of the classifier ({unknown[0]!r} ...). It knows the data set's own: "
            "sample with those."
        )
    index = {name: number for number, name in enumerate(classes)}
    wanted_B = torch.tensor([index[prompt] for prompt in prompts], device=logits_BK.device)
    return (logits_BK.argmax(dim=1) == wanted_B).double().mean().item()


def latent_relative_error(latents_BCHW: Tensor, reference_BCHW: Tensor) -> float:
    """|z - z'| / |z'| over all samples, in float64."""
    scale = reference_BCHW.double().norm()
    if scale == 0:
        raise NotMeasurable("the reference's latents are all zero: there is no scale to relate the error to.")
    return ((latents_BCHW.double() - reference_BCHW.double()).norm() / scale).item()
