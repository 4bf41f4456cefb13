"""A small convolutional classifier of the real images: its features measure distances, its classes check prompts.

Stands in for Inception where its weights do not exist or do not fit (32 x 32 digits). It is trained on the real
training images in seconds, from a fixed seed, and kept in a cache whose file name hashes images, labels and settings.

B images, C image channels, D features, K classes.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from piflow_dist.evaluation.samples import EvaluationError

NET_VERSION = 1  # raise with every change of the network or its training, so that no older cache is taken for it


@dataclass(frozen=True, kw_only=True)
class FeatureNetSettings:
    features: int = 64
    epochs: int = 5
    batch_size: int = 100
    lr: float = 4e-3
    weight_decay: float = 1e-2
    seed: int = 0
    rotation: float = 0.22
    """Largest random rotation of a training image, radians."""
    scale: float = 0.12
    shear: float = 0.2
    shift: float = 0.14
    """Largest random shift, in half image widths."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    images_BCHW: Tensor
    """uint8."""
    labels_B: Tensor
    """int64, index into the classes."""

    def __len__(self) -> int:
        return len(self.labels_B)


@dataclass(frozen=True, kw_only=True)
class TrainedFeatureNet:
    net: "FeatureNet"
    classes: list[str]
    test_accuracy: float
    """Of the classifier on the held-out real images, 0 to 1."""
    train_seconds: float
    """What training took, when it was done."""
    path: Path
    cached: bool


class FeatureNet(nn.Module):
    """Three convolutions, 64 features, one linear layer. About 90,000 parameters for 32 x 32 images."""

    def __init__(self, channels: int, classes: int, features: int = 64):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.GELU(),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            # Features are taken before the activation: nearer to a Gaussian, which the Frechet distance assumes.
            nn.Linear(1024, features, bias=False),
            nn.BatchNorm1d(features),
        )
        self.head = nn.Linear(features, classes)
        self.register_buffer("mean_D", torch.zeros(features))
        self.register_buffer("std_D", torch.ones(features))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] -> raw features (B, D) and class logits (B, K)."""
        features_BD = self.trunk(images_BCHW)
        return features_BD, self.head(F.gelu(features_BD))

    @torch.no_grad()
    def describe(self, images_BCHW: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """uint8 images -> features (B, D), mean 0 and variance 1 over the real training images; logits (B, K)."""
        self.eval()
        features, logits = [], []
        for chunk_BCHW in images_BCHW.split(batch_size):
            raw_BD, logits_BK = self(unit_range(chunk_BCHW.to(self.mean_D.device)))
            features.append((raw_BD - self.mean_D) / self.std_D)
            logits.append(logits_BK)
        return torch.cat(features), torch.cat(logits)


def unit_range(images_BCHW: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images_BCHW.float() / 255


def load_or_train(
    train: LabelledImages,
    test: LabelledImages,
    classes: list[str],
    cache_dir: Path | str,
    *,
    settings: FeatureNetSettings | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TrainedFeatureNet:
    """The feature network of these images: from the cache, or trained now (about 10 s on one core) and cached.

    progress(step, steps) is called after every training step. Raises EvaluationError where a class has no training
    image, where a cached file is damaged, or where the cache cannot be written.
    """
    settings = settings or FeatureNetSettings()
    path = Path(cache_dir) / f"feature_net_{_fingerprint(train, test, classes, settings)}.safetensors"
    channels = train.images_BCHW.shape[1]
    net = FeatureNet(channels, len(classes), settings.features)
    if path.is_file():
        accuracy, seconds = _read(net, path)
        return TrainedFeatureNet(
            net=net.to(device).eval(),
            classes=classes,
            test_accuracy=accuracy,
            train_seconds=seconds,
            path=path,
            cached=True,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before training: a read-only place should fail at once
        (probe := path.with_name(f".{path.name}.{os.getpid()}")).touch()
        probe.unlink()
    except OSError as error:
        raise EvaluationError(
            f"The feature network cannot be kept in {path.parent} ({error}). Set cache=DIR."
        ) from error
    started = time.perf_counter()
    net = train_feature_net(train, len(classes), settings, device=device, progress=progress)
    seconds = time.perf_counter() - started
    accuracy = (net.describe(test.images_BCHW)[1].argmax(1).cpu() == test.labels_B).double().mean().item()
    _write(
        net,
        path,
        {"test_accuracy": accuracy, "train_seconds": seconds, "settings": asdict(settings), "classes": classes},
    )
    return TrainedFeatureNet(
        net=net, classes=classes, test_accuracy=accuracy, train_seconds=seconds, path=path, cached=False
    )


def train_feature_net(
    train: LabelledImages,
    classes: int,
    settings: FeatureNetSettings,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> FeatureNet:
    """Cross-entropy on randomly deformed images, AdamW, one learning-rate cycle.

    Leaves the global RNG and the number of threads as they were. Raises EvaluationError where a class has no image.
    """
    counts = torch.bincount(train.labels_B, minlength=classes)
    if len(train) < settings.batch_size or (counts == 0).any():
        raise EvaluationError(
            f"{len(train)} training images with {counts.tolist()} per class cannot train the feature network: it needs "
            f"every class and at least {settings.batch_size} images. Prepare a larger training split."
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same network on any number of cores; on busy ones several threads took 5 x longer
    try:
        return _train(train, classes, settings, device, progress)
    finally:
        torch.set_num_threads(threads)


def _train(
    train: LabelledImages,
    classes: int,
    settings: FeatureNetSettings,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None,
) -> FeatureNet:
    images_BCHW, labels_B = unit_range(train.images_BCHW).to(device), train.labels_B.to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = FeatureNet(images_BCHW.shape[1], classes, settings.features).train()
    net = net.to(device, memory_format=torch.channels_last)  # a fifth faster on a CPU
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * (len(train) // settings.batch_size)
    rise = max(0.2, min(1.0, 2 / steps)) if steps > 1 else 0.2  # OneCycleLR divides by a rise's steps less one
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps, pct_start=rise)
    step = 0
    for _ in range(settings.epochs):
        order_B = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train) - settings.batch_size + 1, settings.batch_size):
            chosen_B = order_B[start : start + settings.batch_size].to(device)
            batch_BCHW = _deform(images_BCHW[chosen_B], settings, generator)
            batch_BCHW = batch_BCHW.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(batch_BCHW)[1], labels_B[chosen_B])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            step += 1
            if progress is not None:
                progress(step, steps)
    net = net.to(memory_format=torch.contiguous_format)  # as it comes from the cache: the same last digits
    _standardise(net, train.images_BCHW)
    return net


def _standardise(net: FeatureNet, images_BCHW: Tensor) -> None:
    features_BD = net.describe(images_BCHW)[0].double()
    std_D = features_BD.std(dim=0)
    if not (std_D > 1e-6).all():
        raise EvaluationError(
            f"{int((std_D <= 1e-6).sum())} features are the same for every real image and cannot be standardised. "
            "Train the feature network with another seed or for more epochs."
        )
    net.mean_D.copy_(features_BD.mean(dim=0))
    net.std_D.copy_(std_D)


def _deform(images_BCHW: Tensor, settings: FeatureNetSettings, generator: torch.Generator) -> Tensor:
    """A random small rotation, scaling, shear and shift of each image."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator) * 2 - 1

    count = len(images_BCHW)
    angle_B, scale_B = uniform(count) * settings.rotation, 1 + uniform(count) * settings.scale
    affine_B23 = torch.empty(count, 2, 3)
    affine_B23[:, 0, 0] = scale_B * angle_B.cos()
    affine_B23[:, 0, 1] = -scale_B * angle_B.sin() + uniform(count) * settings.shear
    affine_B23[:, 1, 0] = scale_B * angle_B.sin()
    affine_B23[:, 1, 1] = scale_B * angle_B.cos()
    affine_B23[:, :, 2] = uniform(count, 2) * settings.shift
    grid_BHW2 = F.affine_grid(affine_B23.to(images_BCHW.device), list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid_BHW2, align_corners=False)


def _fingerprint(train: LabelledImages, test: LabelledImages, classes: list[str], settings: FeatureNetSettings) -> str:
    digest = hashlib.sha256(json.dumps([NET_VERSION, classes, asdict(settings)], sort_keys=True).encode())
    for part in (train, test):
        digest.update(str(tuple(part.images_BCHW.shape)).encode())
        digest.update(part.images_BCHW.contiguous().numpy().tobytes())
        digest.update(part.labels_B.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(net: FeatureNet, path: Path) -> tuple[float, float]:
    """Fill `net` from a cached file; (test accuracy, training seconds)."""
    try:
        with safe_open(path, framework="pt") as file:
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
            facts = json.loads(file.metadata()["facts"])
    except (SafetensorError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise EvaluationError(
            f"The cached feature network {path} is damaged ({error}). Delete it and run again."
        ) from error
    return facts["test_accuracy"], facts["train_seconds"]


def _write(net: FeatureNet, path: Path, facts: dict) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, partial, metadata={"facts": json.dumps(facts)})
    os.replace(partial, path)
