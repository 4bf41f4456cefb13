"""The folder of a sampling request: made fit before the processes start, and finished with what is known of the whole."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from piflow_dist.checkpoint.files import read_json, write_atomic
from piflow_dist.config import ConfigError
from piflow_dist.sampling import failures
from piflow_dist.sampling.images import ImageRequest, replacing
from piflow_dist.sampling.settings import SampleRequest

log = logging.getLogger(__name__)

REQUEST, META, MANIFEST = "request.json", "meta.json", "manifest.jsonl"
FAILURES, CONTACT_SHEET = "failures.jsonl", "contact_sheet.png"
EARLIER = {"guidance_interval": [0.0, 1.0], "merge": False}
"""Settings that folders of earlier versions do not name."""
HASHED = {
    "images_sha256": "prompts, seeds or sizes",
    "weights_sha256": "weights of the source",
    "codec_sha256": "codec of the data",
    "prompt_encoder_sha256": "prompt encoder of the data",
    "base_sha256": "weights of the base",
}
"""Keys of request.json whose values tell people nothing."""
LATER = ("codec_sha256", "prompt_encoder_sha256", "base_sha256")
"""Keys of which folders of earlier versions say nothing: taken to be as they were."""
SHEET_IMAGES, SHEET_COLUMNS, TILE = 64, 8, (64, 256)


def prepare_folder(request: SampleRequest) -> bool:
    """Make the output folder fit for this request. Returns True where all is there already.

    Raises ConfigError where it holds images of another request and overwrite is not set.
    """
    out, identity = request.out, request.identity()
    finished, changed = check_folder(request, identity)
    if finished:
        return True
    try:
        if changed:
            remove_images(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / REQUEST, json.dumps(identity, indent=1))  # first: a folder that a kill leaves is known by it
        shutil.rmtree(out / failures.FOLDER, ignore_errors=True)  # what failed is tried again
        for folder in ("images", failures.FOLDER, *(["latents"] if request.config.latents else [])):
            (out / folder).mkdir(exist_ok=True)
        for stale in (META, FAILURES):
            (out / stale).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}. Choose another folder.") from error
    return False


def check_folder(request: SampleRequest, identity: dict[str, Any]) -> tuple[bool, bool]:
    """(all is there already, images of other settings are to be replaced). Writes nothing; raises as prepare_folder does."""
    out = request.out
    if not (out / REQUEST).exists():
        if out.exists() and not (out.is_dir() and all(map(is_leftover, out.iterdir()))):
            raise ConfigError(f"out={out} is not empty and was not made by this tool. Choose another folder.")
        return False, False
    changed = changes(identity, read_json(out / REQUEST))
    if changed and not request.config.overwrite:
        what = "; ".join(describe_change(key, old, identity[key]) for key, old in changed.items())
        raise ConfigError(
            f"out={out} holds images of other settings ({what}). Choose another folder, or overwrite=true."
        )
    return not changed and is_finished(out) and not request.missing(), bool(changed)


def is_leftover(path: Path) -> bool:
    """Of a kill before request.json was there: its temporary file, or (of earlier versions) folders with nothing in them."""
    if path.name in ("images", "latents", failures.FOLDER):
        return path.is_dir() and not any(path.iterdir())
    return path.name.startswith(f".{REQUEST}.") and path.suffix == ".tmp"


def remove_images(out: Path) -> None:
    """All but request.json, so that a folder whose removal was cut short is still known as one of this tool."""
    (out / META).unlink(missing_ok=True)
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != REQUEST:
            path.unlink()


def changes(identity: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """Key -> what request.json says, where that is another request's."""
    found = EARLIER | {key: identity[key] for key in LATER if key in identity} | written
    return {key: found.get(key) for key, value in identity.items() if found.get(key) != value}


def describe_change(key: str, old: object, new: object) -> str:
    return f"{HASHED[key]} changed" if key in HASHED else f"{key}: {old} -> {new}"


def is_finished(out: Path) -> bool:
    """Whether `gather` has found every image there, and nobody has removed what it wrote."""
    return all((out / name).exists() for name in (META, MANIFEST, CONTACT_SHEET)) and not (out / FAILURES).exists()


def check_unchanged(request: SampleRequest) -> None:
    """Raise ConfigError where what was read later is not what the folder was prepared for: images would go under wrong prompts."""
    changed = changes(request.identity(), read_json(request.out / REQUEST))
    if changed:
        raise ConfigError(
            f"out={request.out}: {', '.join(HASHED.get(key, key) for key in changed)} changed since the folder was prepared. Put back what was changed, or "
            "start the command again."
        )


def gather(request: SampleRequest) -> str:
    """Write manifest.jsonl, contact_sheet.png, failures.jsonl where images failed and, last, meta.json.

    Returns what went wrong in words for people, empty where every image is there.
    """
    out = request.out
    for place, image in enumerate(request.images):
        if (out / image.file).exists() and not is_readable(out / image.file, place < SHEET_IMAGES):
            log.warning("%s is damaged, and removed: it counts as missing.", out / image.file)
            (out / image.file).unlink()
    absent = {image.index for image in request.missing()}
    made = [image for image in request.images if image.index not in absent]
    failed = [line for line in failures.read_failures(out) if line["index"] in absent]
    for temporary in (*out.glob("images/.*.tmp"), *out.glob("latents/.*.tmp")):
        temporary.unlink()
    lines = [manifest_line(request, image) for image in made]
    write_atomic(out / MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    if made:
        write_contact_sheet(out, made)
    if failed:
        write_atomic(out / FAILURES, "".join(json.dumps(line) + "\n" for line in failed))
    if len(failed) == len(absent):
        write_atomic(out / META, json.dumps(describe(request, lines, len(failed)), indent=1))
    shutil.rmtree(out / failures.FOLDER)
    return complaint(out, len(request.images), failed, len(absent) - len(failed))


def complaint(out: Path, wanted: int, failed: list[dict], lost: int) -> str:
    if lost:
        return f"{lost} of {wanted} images are not in {out}, and no process says why. Run the same command again."
    if failed:
        first = failed[0]
        return (
            f"{len(failed)} of {wanted} images could not be made; the others are in {out}. Reasons: {out / FAILURES}. "
            f"The first, prompt {first['prompt_index']} ({first['prompt']!r}) with seed {first['seed']}: {first['reason']}"
        )
    return ""


def manifest_line(request: SampleRequest, image: ImageRequest) -> dict:
    line = {"index": image.index, "prompt_index": image.prompt_index, "seed": image.seed, "prompt": image.prompt}
    line |= {"file": image.file, "width": image.width, "height": image.height}
    line |= {"latents": image.latents_file} if request.config.latents else {}
    cut = info_of(request.out / image.file).get("cut")
    return {**line, "cut": cut} if cut else line


def write_contact_sheet(out: Path, made: list[ImageRequest]) -> None:
    """The first images in small, in reading order; a line per prompt where all prompts have the same few seeds."""
    per_prompt = set(Counter(image.prompt_index for image in made).values())
    same = per_prompt.pop() if len(per_prompt) == 1 else 1
    columns = same if 1 < same <= SHEET_COLUMNS else SHEET_COLUMNS
    shown = made[: SHEET_IMAGES // columns * columns]
    tile = min(max(TILE[0], *(max(image.width, image.height) for image in shown)), TILE[1])
    sheet = Image.new("RGB", (min(columns, len(shown)) * tile, -(-len(shown) // columns) * tile), "white")
    for place, image in enumerate(shown):
        with Image.open(out / image.file) as picture:
            scale = tile / max(picture.size)
            small = picture.convert("RGB").resize(tuple(max(1, round(side * scale)) for side in picture.size))
        sheet.paste(small, (place % columns * tile, place // columns * tile))
    with replacing(out / CONTACT_SHEET) as temporary:
        sheet.save(temporary, "PNG")


def is_readable(path: Path, pixels: bool) -> bool:
    """By its header, or by all of it."""
    try:
        with Image.open(path) as picture:
            if pixels:
                picture.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow says of damaged files
        return False
    return True


def info_of(path: Path) -> dict[str, str]:
    """What was noted in the image as it was made, so that it outlives a killed process."""
    with Image.open(path) as picture:
        return picture.info


def seconds_of(path: Path) -> float:
    """An image's share of the time in which it and others, of all processes, were sampled: it holds whatever number of
    processes makes the rest."""
    return float(info_of(path)["seconds"])


def sampling_seconds(request: SampleRequest, made: list[dict]) -> float:
    """Of all images together. Those made while the network was compiled for them count as the others took, where there are
    others: minutes at the start say nothing of the rate."""
    paths = [request.out / line["file"] for line in made]
    timed = [path for path in paths if "compiled" not in info_of(path)] or paths
    return sum(map(seconds_of, timed)) * len(paths) / max(len(timed), 1)


def describe(request: SampleRequest, made: list[dict], failed: int) -> dict:
    """made: lines of the manifest."""
    config = request.config
    meta = {
        "source": str(request.checkpoint),
        **request.settings(),
        "images": len(made),
        "failed": failed,
        "cut_prompts": len({line["prompt_index"] for line in made if "cut" in line}),
        "network_evaluations": request.evaluations,
        "seconds": sampling_seconds(request, made),
        "processes": config.launch.processes,
        "tp": config.parallel.tp,
        "dataset": request.run.data.root,
    }
    if request.kind == "teacher":
        return meta
    return {**meta, "policy": request.run.policy.type}
