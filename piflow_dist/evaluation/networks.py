"""Networks that look at images, from local weights: InceptionV3, CLIP, LPIPS, the data set's own small one, and scores of users.

Weights are read as safetensors into models that are built empty; nothing is downloaded and nothing is unpickled.
B images  D features  K classes; images are (B, c, h, w) uint8 of one size
"""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.compat import repair_torchvision
from piflow_dist.evaluation.features import TrainedFeatureNet
from piflow_dist.evaluation.metrics import NotMeasurable

INCEPTION_SIZE = 299
"""Edge of InceptionV3's input: images are resized to it, and patches cut out at it."""


class FeatureNetwork(Protocol):
    title: str
    fingerprint: str
    """Of weights and preprocessing: statistics of other networks are not comparable."""

    def describe(self, images_Bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and class logits (B, K), float32 on the CPU."""
        ...

    def describe_patch(self, images_Bchw: Tensor) -> Tensor | None:
        """Features (B, D) of the middle of each image at full resolution; None where images are smaller, or the network has none."""
        ...


class Inception:
    """torch-fidelity's InceptionV3 (converted from the TensorFlow graph of 2015): pool features 2048, logits without bias 1008."""

    def __init__(self, path: Path | str, device: torch.device):
        """Raises NotMeasurable where the weights are missing or are others."""
        weights = read_weights(path, "inception")
        repair_torchvision()
        from torch_fidelity import feature_extractor_inceptionv3 as library

        # Its constructor downloads weights, or unpickles a file: it is handed the tensors in the place of the download.
        download, library.load_state_dict_from_url = library.load_state_dict_from_url, lambda url, progress: weights
        try:
            net = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except RuntimeError as error:
            raise NotMeasurable(
                f"inception={path} holds other weights than torch-fidelity's InceptionV3: {_brief(error)}"
            ) from error
        finally:
            library.load_state_dict_from_url = download
        self.net, self.device = net.to(device), device
        self.title = "InceptionV3"
        self.fingerprint = fingerprint_of(weights, "inception-v3-compat")

    @torch.no_grad()
    def describe(self, images_Bchw: Tensor) -> tuple[Tensor, Tensor]:
        features_BD, logits_BK = self.net(as_rgb(images_Bchw).to(self.device))
        return features_BD.cpu(), logits_BK.cpu()

    def describe_patch(self, images_Bchw: Tensor) -> Tensor | None:
        height, width = images_Bchw.shape[-2:]
        if min(height, width) < INCEPTION_SIZE:
            return None
        top, left = (height - INCEPTION_SIZE) // 2, (width - INCEPTION_SIZE) // 2
        return self.describe(images_Bchw[..., top : top + INCEPTION_SIZE, left : left + INCEPTION_SIZE])[0]


class SmallNetwork:
    """The classifier trained on a data set of few captions (features.py)."""

    def __init__(self, trained: TrainedFeatureNet, image_shape: tuple[int, ...]):
        self.trained, self.image_shape = trained, image_shape
        self.title = "small network of the data set"
        self.fingerprint = fingerprint_of(trained.net.state_dict(), "small")

    @property
    def classes(self) -> list[str]:
        return self.trained.classes

    def describe(self, images_Bchw: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(images_Bchw.shape[1:]) != self.image_shape:
            raise NotMeasurable(
                f"images of {tuple(images_Bchw.shape[1:])}, and the small network was trained on {self.image_shape} (channels, "
                "height, width). Set dataset=DIR to the data their model was trained on, or inception=FILE."
            )
        features_BD, logits_BK = self.trained.net.describe(images_Bchw)
        return features_BD.cpu(), logits_BK.cpu()

    def describe_patch(self, images_Bchw: Tensor) -> None:
        return None


class Clip:
    """100 cos(image, prompt), at least 0, of a CLIP model, by torchmetrics."""

    def __init__(self, path: Path | str, device: torch.device):
        if not (Path(path) / "config.json").is_file():
            raise NotMeasurable(
                f"clip={path} has no config.json. Give the folder of a CLIP model in transformers' layout."
            )
        repair_torchvision()
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            self.processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise NotMeasurable(
                f"clip={path} cannot be read: {_brief(error)} Weights have to be safetensors."
            ) from error
        self.model, self.device = model.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(B,) float32."""
        from torchmetrics.functional.multimodal.clip_score import _clip_score_update

        rgb = [as_rgb(image[None])[0].to(self.device) for image in images]
        scores_B, _ = _clip_score_update(rgb, list(prompts), self.model, self.processor)
        return scores_B.float().clamp(min=0).cpu().reshape(-1)


class Lpips:
    """torchmetrics' LPIPS; which of its networks, the weights tell."""

    def __init__(self, path: Path | str, device: torch.device):
        weights = read_weights(path, "lpips")
        second = weights.get("lin1.model.1.weight")
        widths = {192: "alex", 128: "vgg"}
        kind = None if second is None or second.dim() != 4 else widths.get(second.shape[1])
        if kind is None:
            raise NotMeasurable(
                f"lpips={path} holds no weights of torchmetrics' LPIPS with alex or vgg (lin1.model.1.weight)."
            )
        repair_torchvision()
        from torchmetrics.functional.image.lpips import _LPIPS

        net = _LPIPS(pretrained=False, net=kind, pnet_rand=True)
        # lins.* are lin0 to lin4 under a second name, which a file may leave out.
        missing, unexpected = net.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.startswith("lins.")]
        if missing or unexpected:
            raise NotMeasurable(f"lpips={path} is not whole: missing {missing[:3]}, unknown {unexpected[:3]}.")
        self.net, self.device, self.kind = net.eval().requires_grad_(False).to(device), device, kind

    @torch.no_grad()
    def distance(self, images_Bchw: Tensor, reference_Bchw: Tensor) -> Tensor:
        """(B,) float32."""
        pair = (as_rgb(each).to(self.device).float() / 255 for each in (images_Bchw, reference_Bchw))
        return self.net(*pair, normalize=True).flatten(1).mean(1).cpu()


@dataclass(frozen=True)
class Reward:
    """A user's score: function(images, prompts) -> one number an image, greater is better. images are PIL images, RGB."""

    name: str
    function: Callable[[list[Image.Image], list[str]], Any]

    @classmethod
    def load(cls, entry: str) -> "Reward":
        """module:function, found as Python finds modules, the working folder included. Raises NotMeasurable."""
        module, _, name = entry.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            return cls(name, getattr(importlib.import_module(module), name))
        except Exception as error:  # somebody else's code
            raise NotMeasurable(f"rewards={entry} cannot be loaded: {_brief(error)}") from error

    def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(B,) float64. Raises NotMeasurable where the function fails, or gives no numbers or another number of them."""
        pictures = [Image.fromarray(as_rgb(image[None])[0].permute(1, 2, 0).numpy()) for image in images]
        try:
            scores = self.function(pictures, list(prompts))
        except Exception as error:  # somebody else's code and weights: the other metrics go on
            raise NotMeasurable(f"{self.name} failed: {type(error).__name__}: {_brief(error)}") from error
        try:
            scores_B = torch.as_tensor(scores, dtype=torch.float64).detach().cpu().reshape(-1)
        except Exception as error:  # whatever it gave
            raise NotMeasurable(
                f"{self.name} gave no number an image: {type(error).__name__}: {_brief(error)}"
            ) from error
        if len(scores_B) != len(images):
            raise NotMeasurable(f"{self.name} gave {len(scores_B)} scores for {len(images)} images.")
        return scores_B


def read_weights(path: Path | str, option: str) -> dict[str, Tensor]:
    """Raises NotMeasurable where the file is missing or is no safetensors."""
    path = Path(path)
    if not path.is_file():
        raise NotMeasurable(f"{option}={path} does not exist. docs/evaluation.md says where the weights come from.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise NotMeasurable(
            f"{option}={path} is no safetensors file ({error}); others are not read, as they can run code. "
            "docs/evaluation.md has the line that converts it."
        ) from error


def fingerprint_of(weights: dict[str, Tensor], kind: str) -> str:
    digest = hashlib.sha256(kind.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_rgb(images_Bchw: Tensor) -> Tensor:
    return images_Bchw.expand(-1, 3, -1, -1) if images_Bchw.shape[1] == 1 else images_Bchw


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
