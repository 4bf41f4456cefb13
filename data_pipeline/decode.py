"""Encoded images -> pixels, through one DALI pipeline on the CPU or on a GPU.

B batch  c image channels  h w image size
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.buckets import Box, Size
from data_pipeline.errors import DataError


class Decoder:
    """Decodes JPEG, PNG and other files of any size to uint8 (h, w, c); c = 1 (grey) or 3 (RGB).

    device "cpu" needs no GPU. "gpu" decodes what nvJPEG can on GPU number `device_id`, the rest on the CPU. EXIF
    orientation is applied.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        device: str = "cpu",
        batch_size: int = 256,
        threads: int = 1,
        device_id: int = 0,
    ):
        if channels not in (1, 3):
            raise ValueError(f"Decoder(channels={channels}): images decode to 1 channel (grey) or 3 (RGB).")
        if device not in ("cpu", "gpu"):
            raise ValueError(f'Decoder(device={device!r}): choose "cpu" or "gpu".')
        if batch_size < 1 or threads < 1:
            raise ValueError(f"Decoder(batch_size={batch_size}, threads={threads}): both must be at least 1.")
        self._channels, self._device, self._device_id = channels, device, device_id
        self._batch_size, self._threads = batch_size, threads
        self._pipeline = self._build(batch_size, threads)

    def decode(self, encoded: Sequence[bytes], keys: Sequence[str]) -> list[np.ndarray]:
        """One image per file, in order. Raises DataError naming the first key whose file cannot be decoded."""
        images: list[np.ndarray] = []
        for start in range(0, len(encoded), self._batch_size):
            part = slice(start, start + self._batch_size)
            images += self._decode_batch(encoded[part], keys[part])
        return images

    def _decode_batch(self, encoded: Sequence[bytes], keys: Sequence[str]) -> list[np.ndarray]:
        for key, data in zip(keys, encoded, strict=True):
            if not data:
                raise DataError(f"Sample {key}: the image file is empty.")
        try:
            return _copies(_run(self._pipeline, encoded))
        except RuntimeError:
            # DALI rejects the whole batch and does not say which sample it was: look for it one by one.
            single = self._build(batch_size=1, threads=1)
            for key, data in zip(keys, encoded, strict=True):
                try:
                    _run(single, [data])
                except RuntimeError as error:
                    raise DataError(
                        f"Sample {key}: its {len(data)} bytes are not a whole image file (DALI: {_reason(error)})."
                    ) from error
            raise  # each image decodes alone: the fault lies with the pipeline (memory, GPU), not with a sample

    def _build(self, batch_size: int, threads: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types  # imported here: readers of finished sets need no DALI

        colour = types.GRAY if self._channels == 1 else types.RGB
        on_gpu = self._device == "gpu"

        @pipeline_def(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self._device_id if on_gpu else None,
            prefetch_queue_depth=1,
        )
        def decode_pipeline() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=colour)

        pipeline = decode_pipeline()
        pipeline.build()
        return pipeline


class CropDecoder:
    """Decodes, turns upright, cuts out a box and resizes it (cubic, antialiased) to a bucket's size, in one pipeline.

    device "gpu" leaves the pixels on GPU number `device_id`; what nvJPEG cannot decode is decoded on the CPU.
    """

    def __init__(
        self, channels: int = 3, *, device: str = "cpu", batch_size: int = 64, threads: int = 1, device_id: int = 0
    ):
        self.channels, self.device, self.batch_size = channels, device, batch_size
        self._threads, self._device_id = threads, device_id
        self._pipeline = self._build(batch_size, threads)

    def crop(
        self,
        encoded: Sequence[bytes],
        sizes: Sequence[Size],
        boxes: Sequence[Box],
        bucket: Size,
        mirrored: Sequence[bool] | None = None,
    ) -> tuple[Tensor, dict[int, str]]:
        """uint8 images (B,h,w,c) of the files that decode, in order, and for each that does not, by place, the reason.

        sizes: (h, w) of the upright images; boxes: in their pixels.
        """
        mirrored = [False] * len(encoded) if mirrored is None else mirrored
        parts, faults = [], {}
        for start in range(0, len(encoded), self.batch_size):
            places = range(start, min(start + self.batch_size, len(encoded)))
            feed = [self._inputs(encoded[i], sizes[i], boxes[i], bucket, mirrored[i]) for i in places]
            try:
                parts.append(self._run(self._pipeline, feed))
            except RuntimeError:
                # DALI rejects the whole batch and does not say which sample it was: look for it one by one.
                single = self._build(batch_size=1, threads=1)
                found = 0
                for place, inputs in zip(places, feed, strict=True):
                    try:
                        parts.append(self._run(single, [inputs]))
                    except RuntimeError as error:
                        faults[place] = _reason(error)
                        found += 1
                if not found:
                    raise  # each decodes alone: the fault lies with the pipeline (memory, GPU), not with a sample
        empty = torch.empty(0, *bucket, self.channels, dtype=torch.uint8)
        return (torch.cat(parts) if parts else empty), faults

    @staticmethod
    def _inputs(encoded: bytes, size: Size, box: Box, bucket: Size, mirrored: bool) -> tuple[np.ndarray, ...]:
        h, w = size
        top, left, bottom, right = box
        return (
            np.frombuffer(encoded, np.uint8),
            np.array(bucket, np.float32),
            np.array([top / h, left / w], np.float32),
            np.array([bottom / h, right / w], np.float32),
            np.array(mirrored, np.int32),
        )

    @staticmethod
    def _run(pipeline: Any, feed: list[tuple[np.ndarray, ...]]) -> Tensor:
        for name, column in zip(("encoded", "size", "start", "end", "mirror"), zip(*feed, strict=True), strict=True):
            pipeline.feed_input(name, list(column))
        (images,) = pipeline.run()
        return torch.from_dlpack(images.as_tensor()).clone()  # a copy: DALI reuses the buffer

    def _build(self, batch_size: int, threads: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types  # imported here: readers of finished sets need no DALI

        colour = types.GRAY if self.channels == 1 else types.RGB
        on_gpu = self.device == "gpu"

        @pipeline_def(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self._device_id if on_gpu else None,
            prefetch_queue_depth=1,
        )
        def crop_pipeline() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
            end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=colour)
            resized = fn.resize(
                images,
                size=size,
                roi_start=start,
                roi_end=end,
                roi_relative=True,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            return fn.flip(resized, horizontal=mirror)

        pipeline = crop_pipeline()
        pipeline.build()
        return pipeline


def _run(pipeline: Any, encoded: Sequence[bytes]) -> Any:
    pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
    (images,) = pipeline.run()
    return images


def _copies(images: Any) -> list[np.ndarray]:
    images = images.as_cpu()
    return [np.array(images.at(i)) for i in range(len(images))]  # a copy: DALI reuses the buffer


def _reason(error: RuntimeError) -> str:
    """The telling line of DALI's long report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = next((i for i, line in enumerate(lines) if line.startswith("encountered")), -1)
    told = lines[after + 1] if after + 1 < len(lines) else str(error)
    return re.sub(r"\x1b\[[0-9;]*m", "", told)
