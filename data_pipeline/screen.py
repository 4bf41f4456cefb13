"""What an image file and a caption must be like, told before a pixel is decoded. Everything else is left out, by name.

The reasons below are the keys of "left_out" in dataset.json; the notes are those of "changed".
"""

import io
import unicodedata
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")
"""Those that Pillow may open; its rarer readers are not worth their risk. Its JPEG reader opens MPO too."""
DECODED_BY_DALI = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000")
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


class Unusable(DataError):
    """A sample that is left out. `reason` is one of a few; the message says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    max_pixels: int = 100_000_000
    """Of an image, by its header: a small file may claim any size."""
    max_file_bytes: int = 256 << 20
    min_side: int = 1
    max_caption: int = 4000
    """Characters; what is behind them is cut off. 512 tokens are rarely more."""


@dataclass(frozen=True)
class ScreenedImage:
    encoded: bytes
    """A file that DALI decodes to RGB or grey as it is."""
    size: tuple[int, int]
    """(h, w) once it is upright"""
    note: str | None = None
    """What had to be changed."""


def screen_image(encoded: bytes, limits: Limits) -> ScreenedImage:
    """Reads the header. Raises Unusable.

    Alpha is laid on white; CMYK, 16 bits and palettes become 8-bit RGB or grey: those are rewritten as PNG by Pillow, so
    that decoding is the same on CPU and GPU, in preparation and on line.
    """
    if not encoded:
        raise Unusable("empty file")
    if len(encoded) > limits.max_file_bytes:
        raise Unusable("file too large", f"{len(encoded)} bytes; max_file_mb={limits.max_file_bytes >> 20}")
    image = _open(encoded)
    h, w = _upright_size(image)
    if h * w > limits.max_pixels:
        raise Unusable("too many pixels", f"{h} x {w}; max_pixels={limits.max_pixels}")
    if min(h, w) < limits.min_side:
        raise Unusable("too small", f"{h} x {w}; min_side={limits.min_side}")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a camera's MPO is a photograph and its previews
        raise Unusable("animated", f"{image.n_frames} frames")
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if image.format in DECODED_BY_DALI and image.mode in ("RGB", "L", "YCbCr") and not transparent:
        return ScreenedImage(encoded, (h, w))
    note = "alpha laid on white" if transparent else f"{image.mode} converted"
    return ScreenedImage(_plain_png(image, transparent), (h, w), note)


def _open(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unusable("too many pixels", str(error)) from error
    except Exception as error:  # Pillow's readers raise whatever a hostile header leads them to
        raise Unusable("not an image", f"{type(error).__name__} in its header") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    w, h = image.size
    if image.format == "TIFF":
        return h, w  # Pillow has turned it
    # Pillow would decode a whole PNG in search of a late EXIF chunk.
    if image.format == "PNG" and "exif" not in image.info:
        return h, w
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception:  # broken EXIF data says nothing about orientation; DALI ignores it too
        turned = False
    return (w, h) if turned else (h, w)


def _plain_png(image: Image.Image, transparent: bool) -> bytes:
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            plain = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        elif transparent:
            rgba = image.convert("RGBA")
            plain = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        elif image.mode in ("1", "P", "CMYK", "RGB", "L", "YCbCr", "LAB"):
            plain = image.convert("L" if image.mode in ("1", "L") else "RGB")
        else:
            raise Unusable("pixels of an unknown kind", f"mode {image.mode}")
    except Unusable:
        raise
    except Exception as error:  # as above: a truncated or hostile body
        raise Unusable("damaged image", str(error)) from error
    stream = io.BytesIO()
    plain.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def screen_caption(caption: str | bytes | None, limits: Limits) -> tuple[str, str | None]:
    """(caption, note). Raises Unusable where there is none.

    Control, format and unassigned characters become blanks, runs of blanks one; long captions are cut at a word.
    """
    if isinstance(caption, bytes):
        try:
            caption = caption[: 8 * limits.max_caption + 1024].decode("utf-8", errors="strict")
        except UnicodeDecodeError as error:
            # The cut may have split the last character; anything before that is the file's own fault.
            if error.start < 8 * limits.max_caption:
                raise Unusable("caption is not UTF-8", error.reason) from error
            caption = caption[: error.start].decode("utf-8")
    if caption is None or not caption.strip("\ufeff \t\r\n"):
        raise Unusable("no caption")
    caption, was_long = caption[: 8 * limits.max_caption], len(caption) > limits.max_caption
    kept = "".join(" " if _is_control(char) else char for char in caption)
    cleaned = " ".join(kept.split())
    if not cleaned:
        raise Unusable("no caption", "control characters only")
    if was_long and len(cleaned) > limits.max_caption:
        head = cleaned[: limits.max_caption + 1]
        cleaned = (head.rpartition(" ")[0] or head)[: limits.max_caption]
        return cleaned, "caption shortened"
    harmless = caption.replace("\ufeff", "").replace("\n", " ").replace("\r", " ").replace("\t", " ")
    return cleaned, "control characters removed" if any(map(_is_control, harmless)) else None


def _is_control(char: str) -> bool:
    # Cc controls, Cs lone surrogates, Co/Cn private and unassigned; of Cf only what reorders text or marks its ends:
    # joiners are part of emoji and of several scripts.
    category = unicodedata.category(char)
    return category in ("Cc", "Cs", "Co", "Cn") or (category == "Cf" and char not in "\u200c\u200d")
