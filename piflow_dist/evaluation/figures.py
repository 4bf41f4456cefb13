"""The report's pictures. Grey text on a transparent ground reads on light and dark pages alike."""

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from piflow_dist.evaluation.samples import EvaluationError

INK = "#808790"
COLOURS = {"student": "#2f8fe0", "teacher": ("#d98a00", "#1f9e77", "#b06fc4", "#8a8a8a")}
TILE = 96
"""Edge of a picture's tile, pixels. 32 x 32 images are enlarged three times, so that their pixels stay visible."""


@dataclass(frozen=True, kw_only=True)
class GridRow:
    label: str
    images: Sequence[Tensor | None]
    """One uint8 image (C, H, W) per column; None: its place is empty."""


def tile_for(images_BCHW: Sequence[Tensor]) -> int:
    """Edge of a tile for images of this size: large ones are shown at up to 256 pixels."""
    return min(256, max(TILE, *images_BCHW[0].shape[-2:]))


def grid(rows: Sequence[GridRow], headings: Sequence[str], tile: int = TILE) -> bytes:
    """Tiles with a label before each row and a heading above each column, as PNG."""
    for row in rows:
        if len(row.images) != len(headings):
            raise ValueError(f"Row {row.label!r} has {len(row.images)} images for {len(headings)} columns.")
    font = ImageFont.load_default(size=17)
    gap, top = 4, 28
    left = int(max(font.getlength(row.label) for row in rows)) + 16
    canvas = Image.new("RGBA", (left + len(headings) * (tile + gap), top + len(rows) * (tile + gap)), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        draw.text((left + column * (tile + gap) + tile / 2, top / 2), heading, fill=INK, font=font, anchor="mm")
    for line, row in enumerate(rows):
        y = top + line * (tile + gap)
        draw.text((left - 12, y + tile / 2), row.label, fill=INK, font=font, anchor="rm")
        for column, image in enumerate(row.images):
            if image is None:
                continue
            picture = _tile(image, tile)
            x = left + column * (tile + gap)
            canvas.paste(picture, (x + (tile - picture.width) // 2, y + (tile - picture.height) // 2))
    return _png(canvas)


def choose_columns(prompts: Sequence[str], prompt_order: Sequence[str], count: int) -> list[int]:
    """Indices of each prompt's first sample, then of each second one, ...: nothing is picked.

    prompt_order: prompts come in the order in which they first appear here, others after them.
    """
    order: dict[str, int] = {}
    for prompt in (*prompt_order, *prompts):
        order.setdefault(prompt, len(order))
    seen: Counter[str] = Counter()
    keys = []
    for index, prompt in enumerate(prompts):
        keys.append((seen[prompt], order[prompt], index))
        seen[prompt] += 1
    return [index for _, _, index in sorted(keys)[:count]]


def short_names(prompts: Sequence[str]) -> dict[str, str]:
    """Prompts without the words that all of them begin with: 'a handwritten three' -> 'three'."""
    words = {prompt: prompt.split() for prompt in sorted(set(prompts))}
    shared = len(os.path.commonprefix(list(words.values()))) if len(words) > 1 else 0
    return {prompt: (" ".join(each[shared:]) or prompt)[:12] for prompt, each in words.items()}


def loss_curves(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> bytes:
    """One panel per run: the loss of every step and its running mean, logarithmic. Rows come from metrics.jsonl."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    figure, axes = _figure(1, len(runs), height=3.0)
    for axis, (title, rows) in zip(axes, runs, strict=True):
        steps, losses = clean_curve(title, rows)
        window = max(3, len(losses) // 50)
        axis.plot(steps, losses, color=COLOURS["student"], alpha=0.3, linewidth=0.8, label="each step")
        axis.plot(steps, _running_mean(losses, window), color=COLOURS["student"], label=f"mean of {window} steps")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title, color=INK, loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.legend(frameon=False, labelcolor=INK, fontsize=9)
    return _finish(figure)


def clean_curve(title: str, rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses): the last entry of each step (a resumed run repeats some), without skipped, non-finite steps."""
    last = {row["step"]: row["loss"] for row in rows}
    pairs = [(step, loss) for step, loss in sorted(last.items()) if loss is not None and np.isfinite(loss) and loss > 0]
    if not pairs:
        raise EvaluationError(f"The metrics of {title} hold no finite, positive loss: nothing was trained.")
    steps, losses = zip(*pairs, strict=True)
    return np.array(steps), np.array(losses)


def psnr_histogram(sources: Sequence[tuple[str, str, Tensor]], reference: str) -> bytes:
    """Distribution of the per-image PSNR. sources: (title, kind, psnr_B in dB)."""
    figure, (axis,) = _figure(1, 1, height=2.8)
    values = np.concatenate([psnr_B.numpy() for _, _, psnr_B in sources])
    bins = np.linspace(np.floor(values.min()), np.ceil(values.max()) + 1e-6, 41)
    teacher_colours = iter(COLOURS["teacher"] * len(sources))
    for title, kind, psnr_B in sources:
        colour = COLOURS["student"] if kind == "student" else next(teacher_colours)
        label = f"{title} (median {psnr_B.median().item():.1f} dB)"
        axis.hist(psnr_B.numpy(), bins=bins, histtype="stepfilled", alpha=0.18, color=colour)
        axis.hist(psnr_B.numpy(), bins=bins, histtype="step", linewidth=1.6, color=colour, label=label)
    axis.set_xlabel(f"PSNR of an image against that of the {reference}, dB")
    axis.set_ylabel("images")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(sources))
    return _finish(figure)


def _tile(image_CHW: Tensor, tile: int) -> Image.Image:
    pixels = image_CHW.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    factor = tile // max(picture.size)
    if factor >= 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = tile / max(picture.size)
    size = [max(1, round(edge * scale)) for edge in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)


def _figure(rows: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(9.6, height * rows), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_facecolor("none")
        axis.tick_params(colors=INK, which="both", labelsize=9)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.grid(color=INK, alpha=0.2, linewidth=0.6)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
    return figure, axes


def _finish(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return _png(Image.open(buffer))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` values around each, fewer at the ends."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")
