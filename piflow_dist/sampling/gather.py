"""The finished folder of a sampling request: images, latents, manifest and settings, joined from the parts."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import ConfigError
from piflow_dist.sampling.settings import SampleRequest, part_path

REQUEST, META, MANIFEST, SAMPLES = "request.json", "meta.json", "manifest.jsonl", "samples.safetensors"


def prepare_folder(request: SampleRequest) -> bool:
    """Make the output folder fit for this request. Returns True where all its images are there already.

    Raises ConfigError where it holds images of another request and overwrite is not set.
    """
    out, identity = Path(request.config.out), request.identity()
    path = out / REQUEST
    if path.exists():
        found = json.loads(path.read_text())
        changed = [f"{key}: {found.get(key)} -> {value}" for key, value in identity.items() if found.get(key) != value]
        if not changed:
            return (out / META).exists()
        if not request.config.overwrite:
            raise ConfigError(
                f"out={out} holds images of other settings ({'; '.join(changed)}). "
                "Choose another folder, or overwrite=true."
            )
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"out={out} is not empty and was not made by this tool. Choose another folder.")
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(identity, indent=1))
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}. Choose another folder.") from error
    return False


def gather(request: SampleRequest) -> Path:
    """Join the parts into samples.safetensors, images/, manifest.jsonl and, last, meta.json."""
    out = Path(request.config.out)
    parts = [load_file(part_path(out, part)) for part in range(len(request.parts()))]
    latents_BCHW = torch.cat([part["latents"] for part in parts])
    images_Bchw = torch.cat([part["images"] for part in parts])
    save_file({"latents": latents_BCHW, "images": images_Bchw}, out / SAMPLES)
    (out / "images").mkdir(exist_ok=True)
    lines = []
    for index, prompt in enumerate(request.prompts):
        line = {"index": index, "seed": request.image_seed(index), "prompt": prompt, "file": f"images/{index:05d}.png"}
        save_png(out / line["file"], images_Bchw[index], {**line, "source": str(request.checkpoint)})
        lines.append(json.dumps(line) + "\n")
    write_atomic(out / MANIFEST, "".join(lines))
    write_atomic(out / META, json.dumps(describe(request, parts), indent=1))
    shutil.rmtree(out / "parts")
    return out


def save_png(path: Path, image_chw: torch.Tensor, info: dict) -> None:
    metadata = PngInfo()
    for key, value in info.items():
        metadata.add_text(key, str(value))
    pixels = image_chw.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, pnginfo=metadata)


def describe(request: SampleRequest, parts: list[dict]) -> dict:
    processes = request.config.launch.processes
    meta = {
        "source": str(request.checkpoint),
        "kind": request.kind,
        "images": len(request.prompts),
        "network_evaluations": request.evaluations,
        # Parts run side by side on the processes; this is the time they would have taken one after the other, shared out.
        "seconds": sum(part["seconds"].item() for part in parts) / processes,
        "processes": processes,
        "dataset": request.run.data.root,
        "seed": request.config.seed,
        "ema": request.config.ema,
    }
    if request.kind == "teacher":
        return {**meta, "steps": request.config.steps, "guidance": request.config.guidance}
    sampler = {"temperature": request.temperature, "h": request.config.h, "substeps": request.config.substeps}
    return {**meta, "nfe": request.evaluations, "policy": request.run.policy.type, **sampler}
