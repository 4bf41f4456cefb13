"""Folders, tables and archives of photographs for the tests of data_pipeline: the few that ship inside packages."""

import csv
import io
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.prepare_settings import PrepareConfig

PHOTOS = {
    "temple": ("sklearn", "datasets/images/china.jpg"),  # 640 x 427
    "flower": ("sklearn", "datasets/images/flower.jpg"),  # 640 x 427
    "officer": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),  # 512 x 600
}
CAPTIONS = {
    "temple": "a temple with a red roof",
    "flower": "a red flower",
    "officer": "an officer in uniform",
}


def photo_bytes(name: str) -> bytes:
    package, path = PHOTOS[name]
    return Path(find_spec(package).origin).parent.joinpath(path).read_bytes()


def cut(name: str, i: int, height: int, width: int) -> Image.Image:
    """The i-th of many different parts of a photograph."""
    with Image.open(io.BytesIO(photo_bytes(name))) as image:
        w, h = image.size
        top, left = (37 * i) % (h - height + 1), (53 * i) % (w - width + 1)
        return image.convert("RGB").crop((left, top, left + width, top + height))


def save(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


SIZES = ((200, 300), (300, 200), (240, 240))


def photo_list(count: int) -> list[tuple[str, str, bytes]]:
    """(name, caption, JPEG file): real pixels in three aspect ratios."""
    names = sorted(PHOTOS)
    return [
        (f"{names[i % 3]}-{i:03d}", CAPTIONS[names[i % 3]], save(cut(names[i % 3], i, *SIZES[i // 3 % 3]), quality=85))
        for i in range(count)
    ]


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, caption, encoded) in enumerate(photo_list(count)):
        (folder / f"{name}.jpg").write_bytes(encoded)
        if i % 2:
            (folder / f"{name}.txt").write_text(caption + "\n")
        else:
            (folder / f"{name}.json").write_text(json.dumps({"caption": caption, "source": "a package"}))
    return folder


def write_csv(folder: Path, count: int) -> Path:
    write_folder(folder, count)
    with (folder / "table.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["image", "caption"])
        writer.writerows([f"{name}.jpg", caption] for name, caption, _ in photo_list(count))
    return folder / "table.csv"


def write_tars(folder: Path, count: int, per_tar: int = 5) -> Path:
    folder.mkdir(parents=True)
    photos = photo_list(count)
    for number in range(0, count, per_tar):
        with tarfile.open(folder / f"{number // per_tar:05d}.tar", "w") as archive:
            for name, caption, encoded in photos[number : number + per_tar]:
                for suffix, content in (("jpg", encoded), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def write_mds(folder: Path, count: int, compression: str | None) -> Path:
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from streaming import MDSWriter

    columns = {"image": "jpeg" if compression is None else "bytes", "caption": "str", "rank": "int"}
    with MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=["xxh64"], size_limit=60_000
    ) as writer:
        for i, (_, caption, encoded) in enumerate(photo_list(count)):
            image = Image.open(io.BytesIO(encoded)) if compression is None else encoded
            writer.write({"image": image, "caption": caption, "rank": i})
    return folder


def settings(out: Path, path: Path, **changes) -> PrepareConfig:
    """Buckets of about 64 x 64 in steps of 16: 48 x 80, 64 x 64 and 80 x 48."""
    defaults = {"source": "folder", "resolution": 64, "bucket_step": 16, "samples_per_part": 8, "prompt_dim": 8}
    return PrepareConfig(out=str(out), path=str(path), **defaults | changes)


def hostile_files() -> dict[str, bytes]:
    """Files that must not become samples, or only after a change."""
    image = cut("temple", 0, 120, 160)
    rgba = image.convert("RGBA")
    rgba.putalpha(0)
    sixteen = Image.fromarray(np.full((120, 160), 40_000, np.uint16))
    bomb = save(Image.new("1", (12_000, 12_000)), "PNG")  # 20 kB; Pillow's own limit is higher
    return {
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>",
        "cut.jpg": save(image)[:-400],
        "cut.png": save(image, "PNG")[:-4000],
        "head.png": save(image, "PNG")[:60],
        "bomb.png": bomb,
        "animated.gif": save(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "animated.webp": save(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "tiny.png": save(image.resize((3, 3)), "PNG"),
        "float.tiff": save(Image.fromarray(np.zeros((64, 64), np.float32)), "TIFF"),
        "cmyk.jpg": save(image.convert("CMYK")),
        "grey.png": save(image.convert("L"), "PNG"),
        "sixteen.png": save(sixteen, "PNG"),
        "alpha.png": save(rgba, "PNG"),
        "palette.gif": save(image.convert("P"), "GIF"),
    }
