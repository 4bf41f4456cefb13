"""data_pipeline/decode.py: DALI against Pillow, and broken files named."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from data_sets import png
from PIL import Image

from data_pipeline.decode import Decoder
from data_pipeline.errors import DataError


def photo(height: int, width: int, channels: int) -> np.ndarray:
    """Smooth enough for JPEG, different everywhere."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 120 * np.sin(x / (5 + c) + y / 9) for c in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def jpeg(image: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=90, **options)
    return stream.getvalue()


def test_png_is_exact_in_order_and_of_any_size() -> None:
    images = [np.random.RandomState(i).randint(0, 256, (8 + i, 20 - i), dtype=np.uint8) for i in range(7)]
    decoded = Decoder(channels=1, batch_size=3).decode([png(image) for image in images], list("abcdefg"))
    assert len(decoded) == 7
    for image, got in zip(images, decoded, strict=True):
        assert got.dtype == np.uint8
        assert np.array_equal(got[:, :, 0], image)


@pytest.mark.parametrize("encode", [png, jpeg])
def test_colour_matches_pillow(encode: Callable[[np.ndarray], bytes]) -> None:
    encoded = encode(photo(40, 56, 3))
    (got,) = Decoder(channels=3).decode([encoded], ["k"])
    want = np.array(Image.open(io.BytesIO(encoded)))
    assert got.shape == (40, 56, 3)
    assert np.abs(got.astype(int) - want).max() <= 1  # decoders may round differently


def test_grey_files_decode_to_colour_and_back() -> None:
    grey = photo(16, 16, 1)[:, :, 0]
    (colour,) = Decoder(channels=3).decode([png(grey)], ["k"])
    assert np.array_equal(colour, np.stack([grey] * 3, axis=-1))


def test_orientation_in_the_file_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (got,) = Decoder(channels=3).decode([jpeg(photo(24, 40, 3), exif=exif)], ["k"])
    assert got.shape == (40, 24, 3)


@pytest.mark.parametrize("cut", [lambda good: b"no image", lambda good: good[:80], lambda good: good[:-20]])
def test_a_broken_file_is_named_and_the_decoder_goes_on(cut: Callable[[bytes], bytes]) -> None:
    good = png(photo(16, 16, 1)[:, :, 0])
    decoder = Decoder(channels=1)
    with pytest.raises(DataError, match=r"Sample digit-7: its \d+ bytes are not a whole image file"):
        decoder.decode([good, cut(good), good], ["digit-6", "digit-7", "digit-8"])
    assert len(decoder.decode([good], ["digit-6"])) == 1


def test_an_empty_file_is_named() -> None:
    with pytest.raises(DataError, match="Sample k: the image file is empty"):
        Decoder().decode([b""], ["k"])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="channels=2"):
        Decoder(channels=2)
    with pytest.raises(ValueError, match="device='tpu'"):
        Decoder(device="tpu")
    with pytest.raises(ValueError, match="batch_size=0"):
        Decoder(batch_size=0)
