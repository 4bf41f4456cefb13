"""What is computed of the features and scores of one source, each by one rank, whole.

B images  D features  K classes
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow_dist.evaluation import quality
from piflow_dist.evaluation.folder import SampleList
from piflow_dist.evaluation.instruments import Tools, scorers
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.networks import SmallNetwork
from piflow_dist.evaluation.quality import Result
from piflow_dist.evaluation.real import Moments, RealStatistics


@dataclass(frozen=True)
class Measure:
    """A computation that one rank does whole, and the metrics that it gives."""

    keys: tuple[str, ...]
    compute: Callable[[], Result | tuple[Result, ...]]
    cost: float = 0.0
    """About how many multiplications, for those that take more than a moment with the features of InceptionV3."""

    def __call__(self) -> dict[str, Result]:
        found = self.compute()
        return dict(zip(self.keys, found if isinstance(found, tuple) else (found,), strict=True))


def measures(
    samples: SampleList,
    seen: dict[str, Tensor],
    theirs: dict[str, Tensor] | None,
    is_reference: bool,
    tools: Tools,
    resamples: int,
    device: torch.device,
) -> list[Measure]:
    """What can be computed for one source, in a fixed order; the seed of its intervals is always the same."""
    n, seed = resamples, 0
    found = []
    if tools.network is not None:
        features, logits, patch = seen["features"], seen["logits"], seen["patch"]
        D = features.shape[1]
        frechet = quality.frechet_cost(len(samples), D, n)
        score_cost = n * logits.numel()
        found.append(
            Measure(("inception_score",), lambda: quality.inception_score(logits, n, seed, device), score_cost)
        )
        if isinstance(tools.network, SmallNetwork):
            classes = tools.network.classes
            found.append(Measure(("prompt_accuracy",), lambda: accuracy(logits, samples.prompts, classes, n, seed)))
        if tools.real is not None:
            real = tools.real
            pairs = (len(samples) + len(real.features_ND)) ** 2
            found += [
                Measure(("fid",), lambda: quality.fid_with_interval(features, real.moments, n, seed, device), frechet),
                Measure(("kid",), lambda: quality.kid(features, real.features_ND), quality.KERNELS * D),
                Measure(
                    ("precision", "recall"),
                    lambda: quality.precision_recall(features, real.features_ND, n, seed, device),
                    pairs * D,
                ),
                Measure(
                    ("patch_fid",), lambda: patch_fid(patch, real, n, seed, device), frechet if patch.numel() else 0
                ),
            ]
        if theirs is not None:
            other = theirs["features"]
            found.append(
                Measure(("diversity",), lambda: quality.relative_diversity(features, other, samples.prompts, n, seed))
            )
            if not is_reference:
                found.append(
                    Measure(
                        ("fid_reference",),
                        lambda: quality.fid_with_interval(features, Moments.of(other, device), n, seed, device, other),
                        2 * frechet,
                    )
                )
    for key in scorers(tools):
        found.append(Measure((key,), lambda key=key: quality.mean_score(seen[key], n, seed)))
    if theirs is not None:
        pixels, other_pixels = seen["pixels"], theirs["pixels"]
        found.append(
            Measure(
                ("diversity_pixels",),
                lambda: quality.relative_diversity(pixels, other_pixels, samples.prompts, n, seed),
            )
        )
        if not is_reference:
            found.append(Measure(("psnr_db",), lambda: quality.mean_score(seen["psnr"], n, seed)))
            found.append(Measure(("latent_relative_error",), lambda: latent_error(seen["latent"], n, seed)))
            if tools.lpips is not None:
                found.append(Measure(("lpips",), lambda: quality.mean_score(seen["lpips"], n, seed)))
    return found


def accuracy(logits_BK: Tensor, prompts: list[str], classes: list[str], resamples: int, seed: int) -> Result:
    unknown = sorted(set(prompts) - set(classes))
    if unknown:
        raise NotMeasurable(
            f"{len(unknown)} prompts are no class of the classifier ({unknown[0]!r} ...). It knows the data set's own: sample with those."
        )
    wanted_B = torch.tensor([classes.index(prompt) for prompt in prompts])
    return quality.mean_score((logits_BK.argmax(dim=1) == wanted_B).double(), resamples, seed)


def patch_fid(patch_BD: Tensor, real: RealStatistics, resamples: int, seed: int, device: torch.device) -> Result:
    if real.patch_moments is None or patch_BD.numel() == 0:
        raise NotMeasurable(
            "patch FID needs InceptionV3 and images of at least 299 x 299, more than 2048 of them, in both sets."
        )
    whole = patch_BD[~patch_BD.isnan().any(dim=1)]
    return quality.fid_with_interval(whole, real.patch_moments, resamples, seed, device)


def latent_error(parts_B2: Tensor, resamples: int, seed: int) -> Result:
    if parts_B2.numel() == 0:
        raise NotMeasurable("a folder keeps no latents, or they are of other sizes. Sample with latents.")
    return quality.root_ratio(parts_B2, resamples, seed)
