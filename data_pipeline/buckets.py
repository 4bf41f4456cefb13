"""Aspect buckets: image sizes of about one area. An image goes to the one nearest to its own aspect ratio.

h w image size in pixels
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(h, w)"""
Box = tuple[float, float, float, float]
"""(top, left, bottom, right) in pixels of the upright image."""


def make_buckets(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes of multiples of `step` whose area is near resolution^2 and whose aspect ratio is within 1/max to max.

    For every multiple of `step` as the short side, the multiple nearest to area / side as the long one; and upright.
    """
    if step < 1 or resolution < step:
        raise ValueError(f"resolution={resolution} is smaller than bucket_step={step}. Use a smaller bucket_step.")
    if max_aspect < 1:
        raise ValueError(f"max_aspect={max_aspect} must be at least 1 (square images only).")
    square = round(resolution / step) * step
    sizes = {(square, square)}
    for short in range(step, square, step):
        long = round(resolution**2 / short / step) * step
        if short < long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of nearest aspect ratio, by the ratio of ratios: 2:1 and 1:2 are equally far from 1:1."""
    aspect = math.log(size[1] / size[0])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[1] / bucket[0]) - aspect), bucket))


def crop_box(size: Size, bucket: Size, place: tuple[float, float] = (0.5, 0.5)) -> Box:
    """The largest part of an image with the bucket's aspect ratio; `place` (0 to 1) moves it down and right."""
    h, w = size
    scale = min(h / bucket[0], w / bucket[1])
    crop_h, crop_w = bucket[0] * scale, bucket[1] * scale
    top, left = (h - crop_h) * place[0], (w - crop_w) * place[1]
    return top, left, top + crop_h, left + crop_w
