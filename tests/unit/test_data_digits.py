"""data_pipeline/digits.py: the real digits, whole, balanced and always the same."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_pipeline.digits import DIGIT_WORDS, DigitSource


@pytest.fixture(scope="module")
def source() -> DigitSource:
    return DigitSource()


def test_splits_are_stratified_and_disjoint(source: DigitSource) -> None:
    train, test = list(source.samples("train")), list(source.samples("test"))
    assert (len(train), len(test)) == (source.count("train"), source.count("test")) == (4500, 500)
    assert set(Counter(sample.caption for sample in train).values()) == {450}
    assert set(Counter(sample.caption for sample in test).values()) == {50}
    assert len({sample.key for sample in train + test}) == 5000
    for split in (train, test):  # any head of a split is balanced
        assert len({sample.caption for sample in split[:10]}) == 10


def test_captions_name_the_digit(source: DigitSource) -> None:
    assert source.captions() == sorted(f"a handwritten {word}" for word in DIGIT_WORDS)
    first = next(source.samples("train"))
    assert (first.key, first.caption) == ("digit-00000", "a handwritten zero")


def test_images_are_the_packages_pixels_in_a_black_border(source: DigitSource) -> None:
    sample = next(sample for sample in source.samples("test") if sample.key == "digit-00009")
    image = np.array(Image.open(io.BytesIO(sample.encoded)))
    assert image.shape == (32, 32) and image.dtype == np.uint8
    assert np.array_equal(image[2:-2, 2:-2], source._images_Nhw[9])
    assert image[2:-2, 2:-2].sum() == image.sum() > 0


def test_content_is_pinned(source: DigitSource) -> None:
    assert source.describe()["sha256"] == "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
