"""Stored image files -> latents while training runs: for sets too large to encode before.

B batch  C latent channels  H W latent size  c image channels  h w image size
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.buckets import crop_box
from data_pipeline.codec import load_codec
from data_pipeline.decode import CropDecoder
from data_pipeline.description import DatasetDescription
from data_pipeline.errors import DataError
from data_pipeline.parts import to_images
from data_pipeline.screen import Limits, screen_image

LIMITS = Limits(max_pixels=1 << 62, max_file_bytes=1 << 62)
"""The preparation has kept to its own."""


class OnlineEncoder:
    """The codec of the set on `device`; DALI decodes on the same GPU, or on the CPU.

    augment: crop at a random place and mirror half of the images. Both depend on (seed, epoch, key) alone, so that a
    resumed run, on whatever number of ranks, sees the same pixels.
    """

    def __init__(
        self,
        description: DatasetDescription,
        *,
        seed: int,
        batch_size: int,
        device: str | torch.device = "cpu",
        augment: bool = False,
        threads: int = 1,
    ):
        self._device = torch.device(device)
        self._codec = load_codec(description.codec, self._device)
        on_gpu = self._device.type == "cuda"
        self._decoder = CropDecoder(
            self._codec.image_channels,
            device="gpu" if on_gpu else "cpu",
            batch_size=batch_size,
            threads=threads,
            device_id=self._device.index or 0 if on_gpu else 0,
        )
        self._seed, self._augment = seed, augment

    def decode(
        self, images: Sequence[bytes], keys: Sequence[str], epoch: int, latent_shape: tuple[int, int, int]
    ) -> Tensor:
        """uint8 (B,h,w,c) of the bucket's size. Raises DataError naming the sample that does not decode."""
        n = self._codec.downscale
        bucket = latent_shape[1] * n, latent_shape[2] * n
        sizes, boxes, mirrored = [], [], []
        for encoded, key in zip(images, keys, strict=True):
            down, right, mirror = self._draws(epoch, key) if self._augment else (0.5, 0.5, 0.0)
            sizes.append(screen_image(encoded, LIMITS).size)
            boxes.append(crop_box(sizes[-1], bucket, (down, right)))
            mirrored.append(mirror > 0.5)
        pixels_Bhwc, faults = self._decoder.crop(images, sizes, boxes, bucket, mirrored)
        if faults:
            place, reason = next(iter(faults.items()))
            raise DataError(
                f"Sample {keys[place]}: its image cannot be decoded (DALI: {reason}). Prepare the set again."
            )
        return pixels_Bhwc

    def encode(self, pixels_Bhwc: Tensor) -> Tensor:
        """Normalised latents (B,C,H,W), float32, on the encoder's device."""
        return self._codec.encode(to_images(pixels_Bhwc, self._device))

    def _draws(self, epoch: int, key: str) -> tuple[float, float, float]:
        """Three uniform numbers."""
        digest = hashlib.blake2b(
            f"{self._seed},{epoch},{key}".encode("utf-8", "surrogateescape"), digest_size=24
        ).digest()
        return tuple(int.from_bytes(digest[i : i + 8]) / 2**64 for i in (0, 8, 16))
