"""Images <-> latents. A codec stands between the pixels and the network: a pretrained VAE, or a fixed transform.

B batch  C latent channels  H W latent size  c image channels  h w image size  n block edge
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.compat import repair_torchvision
from data_pipeline.pretrained import loading

SAMPLED_BLOCKS, BLOCK_BYTES = 16, 1 << 16
PIXELS_AT_ONCE = 4 << 20
"""Of one pass through the VAE, whose first layers keep hundreds of numbers a pixel: 4 images of 1024 x 1024."""


class Codec(Protocol):
    latent_channels: int
    image_channels: int
    downscale: int
    """Image pixels per latent pixel, along each side."""

    def encode(self, images_Bchw: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] -> normalised latents (B,C,H,W), float32, on the images' device.

        Of a VAE the mode of the posterior: encoding one image twice gives the same latents. With standard normal noise a sample.
        """
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents -> images (B,c,h,w), float32, clamped to [-1, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `load_codec` needs to build this codec again; plain JSON."""
        ...


class BlockCodec:
    """Orthogonal cosine transform (DCT-II) of n x n pixel blocks, times one number.

    A stand-in for a VAE that needs no weights and loses nothing: n * n latent channels per image channel, image channel
    by image channel, vertical before horizontal frequency. `scale` brings the latents of a training set to unit
    variance; one number for all channels keeps distances in latent space proportional to distances in pixels.
    """

    def __init__(self, image_channels: int = 1, block: int = 4, scale: float = 1.0):
        if image_channels < 1 or block < 1:
            raise ValueError(f"BlockCodec(image_channels={image_channels}, block={block}): both must be at least 1.")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"BlockCodec(scale={scale}): the scale must be a positive finite number.")
        self.image_channels = image_channels
        self.downscale = block
        self.latent_channels = image_channels * block * block
        self.scale = scale
        self._basis_nn = _cosine_basis(block)

    def encode(self, images_Bchw: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        _check_image_shape(images_Bchw, self.image_channels, self.downscale)
        if noise_BCHW is not None:
            raise ValueError("BlockCodec has no posterior to draw from. Leave posterior=sample out.")
        B, c, h, w = images_Bchw.shape
        n = self.downscale
        basis_nn = self._basis_nn.to(images_Bchw.device)
        blocks_BcHiWj = images_Bchw.float().reshape(B, c, h // n, n, w // n, n)
        coefficients = torch.einsum("bcHiWj,ui,vj->bcuvHW", blocks_BcHiWj, basis_nn, basis_nn)
        return coefficients.reshape(B, self.latent_channels, h // n, w // n) * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        B, C, H, W = latents_BCHW.shape
        if self.latent_channels != C:
            raise ValueError(
                f"BlockCodec decodes {self.latent_channels} latent channels, got {C} (shape {(B, C, H, W)})."
            )
        n = self.downscale
        basis_nn = self._basis_nn.to(latents_BCHW.device)
        coefficients = (latents_BCHW.float() / self.scale).reshape(B, self.image_channels, n, n, H, W)
        blocks = torch.einsum("bcuvHW,ui,vj->bcHiWj", coefficients, basis_nn, basis_nn)
        return blocks.reshape(B, self.image_channels, H * n, W * n).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "block_dct",
            "image_channels": self.image_channels,
            "block": self.downscale,
            "scale": self.scale,
        }


class QwenImageCodec:
    """Qwen-Image's VAE: 8 x smaller, 16 channels, normalised by its own latents_mean and latents_std.

    `path` is a local Qwen-Image folder (its `vae/` is read). The VAE is one for videos; the frame axis stays inside
    this class.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        folder = qwen_vae_folder(path)
        repair_torchvision()
        from diffusers import AutoencoderKLQwenImage

        self._path, self._dtype, self._weights = str(path), dtype, vae_fingerprint(folder)
        vae = AutoencoderKLQwenImage.from_pretrained(folder, **loading(dtype, device))
        self._vae = vae.eval().requires_grad_(False)
        self.image_channels = vae.config.input_channels
        self.latent_channels = vae.config.z_dim
        self.downscale = vae.spatial_compression_ratio
        self._mean_1C11 = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1)
        self._std_1C11 = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images_Bchw: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        _check_image_shape(images_Bchw, self.image_channels, self.downscale)
        noise_BCFHW = None if noise_BCHW is None else noise_BCHW.unsqueeze(2)
        raw_BCHW = encode_in_parts(self._vae, images_Bchw.unsqueeze(2).to(self._dtype), noise_BCFHW).squeeze(2)
        return (raw_BCHW - self._mean_1C11) / self._std_1C11

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        raw_BCHW = latents_BCHW.float() * self._std_1C11 + self._mean_1C11
        tile_where_large(self._vae, latents_BCHW.shape[2] * latents_BCHW.shape[3] * self.downscale**2)
        return self._vae.decode(raw_BCHW.to(self._dtype).unsqueeze(2)).sample.squeeze(2).float().clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return {"kind": "qwen_image_vae", "path": self._path, "dtype": dtype, "weights": self._weights}


class AutoencoderKLCodec:
    """diffusers' AutoencoderKL, normalised by its own numbers: (latents - shift_factor) * scaling_factor.

    SD's VAE (4 channels, no shift), as for models of ImageNet, and FLUX's (16 channels). `path` is a local model with a
    `vae/` folder, or the folder of a VAE itself.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        folder = kl_vae_folder(path)
        repair_torchvision()
        from diffusers import AutoencoderKL

        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"{folder} holds a {kind}, not an AutoencoderKL. Choose the codec made for it.")
        self._path, self._dtype, self._weights = str(path), dtype, vae_fingerprint(folder)
        vae = AutoencoderKL.from_pretrained(folder, **loading(dtype, device))
        if vae.config.latents_mean is not None or vae.config.latents_std is not None:
            raise ValueError(f"{folder} normalises channel by channel (latents_mean), which this codec does not.")
        self._vae = vae.eval().requires_grad_(False)
        self.image_channels = vae.config.in_channels
        self.latent_channels = vae.config.latent_channels
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._scale, self._shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images_Bchw: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        _check_image_shape(images_Bchw, self.image_channels, self.downscale)
        return (encode_in_parts(self._vae, images_Bchw.to(self._dtype), noise_BCHW) - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        raw_BCHW = latents_BCHW.float() / self._scale + self._shift
        tile_where_large(self._vae, latents_BCHW.shape[2] * latents_BCHW.shape[3] * self.downscale**2)
        return self._vae.decode(raw_BCHW.to(self._dtype)).sample.float().clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return {"kind": "autoencoder_kl", "path": self._path, "dtype": dtype, "weights": self._weights}


def encode_in_parts(vae: Any, images: Tensor, noise: Tensor | None) -> Tensor:
    """Raw latents (B, C, ...), float32: a diffusers VAE's posterior mode, or with noise of the same shape mean + std * noise."""
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
    parts = images.split(at_once)
    noises = [None] * len(parts) if noise is None else noise.to(images).split(at_once)
    raw = []
    for part, its_noise in zip(parts, noises, strict=True):
        posterior = vae.encode(part).latent_dist
        raw.append((posterior.mode() if its_noise is None else posterior.mean + posterior.std * its_noise).float())
    return torch.cat(raw)


def posterior_noise(keys: Sequence[str], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal (B,C,H,W), a function of each sample's key alone: the same after a kill and on any number of processes."""
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    generators = [torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1) for digest in digests]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def qwen_vae_folder(path: str | Path) -> Path:
    folder = Path(path) / "vae"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"No VAE in {folder} (config.json is missing). Give the path of a local Qwen-Image model."
        )
    return folder


def kl_vae_folder(path: str | Path) -> Path:
    folder = next((place for place in (Path(path) / "vae", Path(path)) if (place / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"No VAE in {path} or its vae/ (config.json is missing). Give the path of a local model with an "
            "AutoencoderKL, such as FLUX.1-dev or sd-vae-ft-ema."
        )
    return folder


@cache
def vae_downscale(kind: str, path: str) -> int:
    """Image pixels per latent pixel of a VAE that is not loaded, by its config.json (a missing key: diffusers' default)."""
    if kind == "qwen_image_vae":
        config = json.loads((qwen_vae_folder(path) / "config.json").read_text())
        return 2 ** len(config.get("temperal_downsample", (False, True, True)))
    config = json.loads((kl_vae_folder(path) / "config.json").read_text())
    return 2 ** (len(config.get("block_out_channels", (64,))) - 1)


def tile_where_large(vae: Any, pixels: int) -> None:
    """Let diffusers' VAE decode an image of more than PIXELS_AT_ONCE in overlapping tiles: its memory grows with the pixels.

    By the image's own size alone, as tiles change the pixels at their borders a little.
    """
    if pixels > PIXELS_AT_ONCE:
        vae.enable_tiling()
    else:
        vae.disable_tiling()


def vae_fingerprint(folder: Path) -> str:
    """Of a VAE's weights, wherever they lie: sizes and sampled contents of its safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name},{size}".encode())
        with open(path, "rb") as file:
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * max(0, size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def load_codec(description: Mapping[str, Any], device: str | torch.device = "cpu") -> Codec:
    """Build the codec that `describe()` described, for example the "codec" entry of a dataset.json.

    Raises ValueError where the VAE at its path is not the one that was described.
    """
    match description.get("kind"):
        case "block_dct":
            return BlockCodec(description["image_channels"], description["block"], description["scale"])
        case "qwen_image_vae":
            codec = QwenImageCodec(description["path"], getattr(torch, description["dtype"]), device)
        case "autoencoder_kl":
            codec = AutoencoderKLCodec(description["path"], getattr(torch, description["dtype"]), device)
        case kind:
            raise ValueError(
                f'Unknown codec kind {kind!r}. Known kinds: "block_dct", "qwen_image_vae", "autoencoder_kl".'
            )
    found, wanted = codec.describe()["weights"], description.get("weights")  # sets of earlier versions do not say
    if wanted not in (None, found):
        raise ValueError(
            f"The VAE in {description['path']} (fingerprint {found[:12]}) is not the one that made these latents "
            f"({wanted[:12]}). Put that one back in its place."
        )
    return codec


def downscale_of(description: Mapping[str, Any]) -> int:
    """`downscale` of the codec that `describe()` described, which is not loaded. Raises FileNotFoundError where its VAE is gone."""
    if description["kind"] == "block_dct":
        return description["block"]
    return vae_downscale(description["kind"], description["path"])


def _cosine_basis(n: int) -> Tensor:
    """(n, n) orthonormal DCT-II: row u is the cosine of frequency u, sampled at the n pixel centres."""
    frequency_n1 = torch.arange(n, dtype=torch.float64).unsqueeze(1)
    centre_n = torch.arange(n, dtype=torch.float64) + 0.5
    basis_nn = torch.cos(math.pi / n * frequency_n1 * centre_n) * math.sqrt(2 / n)
    basis_nn[0] /= math.sqrt(2)
    return basis_nn.float()


def _check_image_shape(images_Bchw: Tensor, channels: int, downscale: int) -> None:
    B, c, h, w = images_Bchw.shape
    if c != channels:
        raise ValueError(f"This codec encodes images of {channels} channel(s), got {c} (shape {(B, c, h, w)}).")
    if h % downscale or w % downscale:
        raise ValueError(f"Images of {h} x {w} pixels do not split into blocks of {downscale}: crop or pad them first.")
