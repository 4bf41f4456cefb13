"""Evaluation of sample folders against a reference from the same noises and against the real images of a data set."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from piflow_dist.evaluation import metrics
from piflow_dist.evaluation.features import LabelledImages, TrainedFeatureNet, load_or_train
from piflow_dist.evaluation.metrics import METRICS, NotMeasurable
from piflow_dist.evaluation.progress import training_progress
from piflow_dist.evaluation.samples import EvaluationError, SampleFolder, check_same_noises
from piflow_dist.evaluation.shares import Share

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The measurements of one source. A metric without a value is None, and `notes` says why."""

    name: str
    title: str
    """As the label of a row."""
    phrase: str
    """As part of a sentence, after "the"."""
    kind: str
    """teacher, student or real."""
    steps: int | None
    count: int
    values: dict[str, float | None]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Everything that sources are measured with: the real images and the network trained on them."""

    feature_net: TrainedFeatureNet
    real_features_BD: Tensor
    """Of all real training images."""
    test_images_BCHW: Tensor
    test_prompts: list[str]

    @classmethod
    def from_dataset(
        cls,
        root: Path | str,
        *,
        cache_dir: Path | str = "outputs/feature_net",
        device: str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> "Judge":
        """Read the data set and train the feature network, or take it from the cache."""
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise EvaluationError(f"device={device}: PyTorch sees no GPU here. Set device=cpu.")
        train, test, classes = labelled_splits(root)
        net = load_or_train(train, test, classes, cache_dir, device=device, progress=progress)
        real_features_BD, _ = net.net.describe(train.images_BCHW)
        return cls(
            feature_net=net,
            real_features_BD=real_features_BD,
            test_images_BCHW=test.images_BCHW,
            test_prompts=[classes[label] for label in test.labels_B],
        )

    def measure(self, samples: SampleFolder, reference: SampleFolder | None) -> Evaluation:
        """All metrics of one folder. Those that cannot be computed are marked, not invented.

        Raises EvaluationError where samples and reference were not made from the same noises and prompts.
        """
        self._check_size(samples)
        features_BD, logits_BK = self.feature_net.net.describe(samples.images_BCHW)
        results = _Results()
        results.add("prompt_accuracy", metrics.prompt_accuracy, logits_BK, samples.prompts, self.feature_net.classes)
        results.add("frechet_real", metrics.frechet_distance, features_BD, self.real_features_BD)
        results.add("images_per_second", _images_per_second, samples)
        results.add("evaluations_per_image", _evaluations_per_image, samples)
        reason = "no reference was given. Set reference=DIR."
        if reference is not None:
            reason = "this is the reference."
            self._compare(results, samples, reference, features_BD)
        return Evaluation(
            name=samples.name,
            title=samples.title,
            phrase=samples.phrase,
            kind=samples.kind,
            steps=samples.steps,
            count=len(samples),
            values=results.complete(reason),
            notes=results.notes,
        )

    def measure_real(self) -> Evaluation:
        """The held-out real images as if they were samples: what the network makes of real images it never saw."""
        features_BD, logits_BK = self.feature_net.net.describe(self.test_images_BCHW)
        results = _Results()
        results.add("prompt_accuracy", metrics.prompt_accuracy, logits_BK, self.test_prompts, self.feature_net.classes)
        results.add("frechet_real", metrics.frechet_distance, features_BD, self.real_features_BD)
        return Evaluation(
            name="real",
            title="real, held out",
            phrase="held-out real images",
            kind="real",
            steps=None,
            count=len(self.test_prompts),
            values=results.complete("real images come from no noise."),
            notes=results.notes,
        )

    def _compare(
        self, results: "_Results", samples: SampleFolder, reference: SampleFolder, features_BD: Tensor
    ) -> None:
        check_same_noises(samples, reference)
        reference_BD, _ = self.feature_net.net.describe(reference.images_BCHW)
        pixels, reference_pixels = (each.images_BCHW.flatten(1).float() / 255 for each in (samples, reference))
        results.add("diversity", metrics.relative_diversity, features_BD, reference_BD, samples.prompts)
        results.add("diversity_pixels", metrics.relative_diversity, pixels, reference_pixels, samples.prompts)
        if samples.path.resolve() == reference.path.resolve():
            return
        images = (samples.images_BCHW, reference.images_BCHW)
        results.add("psnr_db", lambda: metrics.psnr_per_image(*images).mean().item())
        results.add("psnr_pooled_db", metrics.psnr_pooled, *images)
        results.add("frechet_reference", metrics.frechet_distance, features_BD, reference_BD)
        results.add("latent_relative_error", _latent_relative_error, samples, reference)

    def _check_size(self, samples: SampleFolder) -> None:
        mine, real = tuple(samples.images_BCHW.shape[1:]), tuple(self.test_images_BCHW.shape[1:])
        if mine != real:
            raise EvaluationError(
                f"{samples.path} holds images of {mine}, the data set has {real} (channels, height, width). "
                "Set dataset=DIR to the data their model was trained on."
            )


class _Results:
    """Values as they are computed, and the reason for each that could not be."""

    def __init__(self):
        self.values: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def add(self, key: str, measure: Callable[..., float], *arguments: Any) -> None:
        try:
            value = measure(*arguments)
        except NotMeasurable as error:
            self.notes[key] = str(error)
            return
        if not np.isfinite(value):
            raise EvaluationError(f"{key} came out as {value}: the images or latents are outside what it can measure.")
        self.values[key] = value

    def complete(self, reason: str) -> dict[str, float | None]:
        """Every metric of the table; `reason` stands for those that were not attempted."""
        for metric in METRICS:
            if metric.key not in self.values:
                self.notes.setdefault(metric.key, reason)
        return {metric.key: self.values.get(metric.key) for metric in METRICS}


def labelled_splits(root: Path | str) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """The training and the held-out real images with their captions as classes, and these."""
    splits = [read_real_images(root, split) for split in ("train", "test")]
    classes = sorted({prompt for _, prompts in splits for prompt in prompts})
    index = {name: number for number, name in enumerate(classes)}
    train, test = (
        LabelledImages(images_BCHW=images, labels_B=torch.tensor([index[prompt] for prompt in prompts]))
        for images, prompts in splits
    )
    return train, test, classes


def small_network_of(root: Path | str, cache: Path, share: Share) -> tuple[TrainedFeatureNet, tuple[int, ...]]:
    """The feature network of a data set, trained by the first rank where it is not cached yet, and the shape of its images.

    Raises NotMeasurable, on every rank, where that cannot be.
    """
    train, test, classes = share.attempt(lambda: labelled_splits(root))

    def prepare() -> None:
        if share.is_main:
            with training_progress() as progress:
                load_or_train(train, test, classes, cache, device=share.device, progress=progress)

    share.attempt(prepare)
    net = load_or_train(train, test, classes, cache, device=share.device)
    return net, tuple(train.images_BCHW.shape[1:])


def as_json(
    evaluation: Evaluation,
    judge: Judge,
    samples: SampleFolder,
    reference: SampleFolder | None,
    dataset_root: Path | str,
) -> dict[str, Any]:
    net = judge.feature_net
    return asdict(evaluation) | {
        "format": FORMAT,
        "samples": str(samples.path),
        "reference": str(reference.path) if reference else None,
        "dataset": str(dataset_root),
        "feature_net": {"file": net.path.name, "test_accuracy": net.test_accuracy, "train_seconds": net.train_seconds},
        "definitions": {metric.key: metric.definition for metric in METRICS},
    }


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers see the old file or the new one, never a part. Raises EvaluationError where it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # a read-only disk's answer, also where there is no such file
            partial.unlink()
        raise EvaluationError(f"{path} cannot be written ({error}).") from error


def read_real_images(root: Path | str, split: str) -> tuple[Tensor, list[str]]:
    """(images (B, C, H, W) uint8, prompts) of a split, decoded from its latents: what a perfect model would sample.

    The demo's codec is orthogonal, so these are the stored digits; behind a lossy VAE its losses count for no model.
    """
    from data_pipeline.codec import load_codec  # these take seconds to import
    from data_pipeline.stream import load_description, read_all

    codec = load_codec(load_description(root).codec)
    try:
        samples = read_all(root, split)
    except ValueError as error:  # no such split, or several latent sizes
        raise EvaluationError(f"The real images cannot be read: {error}") from error
    images_BCHW = torch.cat([codec.decode(chunk_BCHW) for chunk_BCHW in samples["latents"].split(256)])
    return ((images_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), list(samples["prompts"])


def _latent_relative_error(samples: SampleFolder, reference: SampleFolder) -> float:
    for folder in (samples, reference):
        if folder.latents_BCHW is None:
            raise NotMeasurable(f"{folder.path} holds no latents (latents=false).")
    return metrics.latent_relative_error(samples.latents_BCHW, reference.latents_BCHW)


def _images_per_second(samples: SampleFolder) -> float:
    images, seconds = samples.meta["images"], samples.meta["seconds"]
    if not seconds > 0:
        raise NotMeasurable(f"meta.json says that sampling took {seconds} seconds.")
    return images / seconds


def _evaluations_per_image(samples: SampleFolder) -> float:
    evaluations = samples.meta["network_evaluations"]
    if evaluations < samples.steps:
        raise EvaluationError(
            f"{samples.path}/meta.json: network_evaluations={evaluations} an image is less than one a step "
            f"({samples.steps} steps). Sample it again."
        )
    return float(evaluations)
