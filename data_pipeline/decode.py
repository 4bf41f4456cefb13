"""Encoded images -> pixels, through one DALI pipeline on the CPU or on a GPU."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

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
            return _run(self._pipeline, encoded)
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


def _run(pipeline: Any, encoded: Sequence[bytes]) -> list[np.ndarray]:
    pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
    (images,) = pipeline.run()
    images = images.as_cpu()
    return [np.array(images.at(i)) for i in range(len(images))]  # a copy: DALI reuses the buffer


def _reason(error: RuntimeError) -> str:
    """The telling line of DALI's long report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = next((i for i, line in enumerate(lines) if line.startswith("encountered")), -1)
    told = lines[after + 1] if after + 1 < len(lines) else str(error)
    return re.sub(r"\x1b\[[0-9;]*m", "", told)
