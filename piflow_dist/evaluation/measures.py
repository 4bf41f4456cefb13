"""What is computed of the features and scores of one source, each by one rank, whole.

B images  P pairs with the reference's  V those of prompts that have several  D features  K classes
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from piflow_dist.evaluation import quality
from piflow_dist.evaluation.instruments import Tools, scorers
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.networks import SmallNetwork
from piflow_dist.evaluation.quality import Result
from piflow_dist.evaluation.real import Moments, RealStatistics
from piflow_dist.evaluation.samples import SampleFolder

SEED = 0
"""Of intervals."""


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


def measures_of(
    samples: SampleFolder,
    seen: dict[Path, dict[str, Tensor]],
    reference: SampleFolder | None,
    pairs: dict[int, int],
    tools: Tools,
    resamples: int,
    device: torch.device,
) -> list[Measure]:
    """What can be computed for one source, in a fixed order; the seed of its intervals is always the same.

    seen: of each folder, one row an image. pairs: places of images -> those of their partners in the reference.
    """
    mine = seen[samples.path]
    scores = [Measure((key,), lambda key=key: quality.mean_score(mine[key], resamples, SEED)) for key in scorers(tools)]
    own = [*of_features(samples, mine, tools, resamples, device), *scores]
    if reference is None:
        return own
    return own + of_pairs(samples, mine, reference, seen[reference.path], pairs, tools, resamples, device)


def of_features(
    samples: SampleFolder, mine: dict[str, Tensor], tools: Tools, resamples: int, device: torch.device
) -> list[Measure]:
    """Of the feature network alone, and against real images."""
    if tools.network is None:
        return []
    features, logits, patch = mine["features"], mine["logits"], mine["patch"]
    n, D = resamples, features.shape[1]
    found = [
        Measure(
            ("inception_score",), lambda: quality.inception_score(logits, n, SEED, device), (n + 1) * logits.numel()
        )
    ]
    if isinstance(tools.network, SmallNetwork):
        classes = tools.network.classes
        found.append(Measure(("prompt_accuracy",), lambda: accuracy(logits, samples.prompts, classes, n, SEED)))
    if tools.real is None:
        return found
    real, cost = tools.real, quality.frechet_cost(len(samples), D, n)
    kept = real.features_ND
    return [
        *found,
        Measure(("fid",), lambda: quality.fid_with_interval(features, real.moments, n, SEED, device), cost),
        Measure(("kid",), lambda: quality.kid(features, kept), quality.KERNELS * D),
        Measure(
            ("precision", "recall"),
            lambda: quality.precision_recall(features, kept, n, SEED, device),
            (len(samples) + len(kept)) ** 2 * D,
        ),
        Measure(("patch_fid",), lambda: patch_fid(patch, real, n, SEED, device), cost if patch.numel() else 0.0),
    ]


def of_pairs(
    samples: SampleFolder,
    mine: dict[str, Tensor],
    reference: SampleFolder,
    theirs: dict[str, Tensor],
    pairs: dict[int, int],
    tools: Tools,
    resamples: int,
    device: torch.device,
) -> list[Measure]:
    """Against the reference, of the images that both have."""
    n, found = resamples, []
    mine_P, theirs_P = list(pairs), list(pairs.values())
    varied = list(pairs.items())
    if not len(samples) == len(reference) == len(pairs):  # what could not be made may leave an image of a prompt alone
        images = Counter(samples.prompts[place] for place in pairs)
        varied = [(place, their) for place, their in varied if images[samples.prompts[place]] > 1]
    mine_V, theirs_V = [place for place, _ in varied], [their for _, their in varied]
    prompts = [samples.prompts[place] for place in mine_V]

    def diversity(key: str) -> Result:
        return quality.relative_diversity(mine[key][mine_V], theirs[key][theirs_V], prompts, n, SEED)

    def frechet() -> Result:
        features, others = mine["features"][mine_P], theirs["features"][theirs_P]
        return quality.fid_with_interval(features, Moments.of(others, device), n, SEED, device, others)

    if tools.network is not None:
        found.append(Measure(("diversity",), lambda: diversity("features")))
        if samples is not reference:
            D = mine["features"].shape[1]
            found.append(Measure(("fid_reference",), frechet, 2 * quality.frechet_cost(len(pairs), D, n)))
    found.append(Measure(("diversity_pixels",), lambda: diversity("pixels")))
    if samples is not reference:
        found.append(Measure(("psnr_db",), lambda: quality.mean_score(mine["psnr"][mine_P], n, SEED)))
        found.append(Measure(("latent_relative_error",), lambda: latent_error(mine["latent"][mine_P], n, SEED)))
        if tools.lpips is not None:
            found.append(Measure(("lpips",), lambda: quality.mean_score(mine["lpips"][mine_P], n, SEED)))
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
