"""Synthetic sample folders in the format of tools/sample.py, for the tests of the evaluation."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor


def write_samples(
    path: Path,
    images_BCHW: Tensor,
    prompts: list[str],
    *,
    kind: str = "teacher",
    steps: int = 4,
    latents_BCHW: Tensor | None = None,
    evaluations_per_step: int = 1,
    seconds: float = 2.0,
) -> Path:
    """images_BCHW uint8. Latents default to the images themselves, scaled to [-1, 1]; seed = 1000 + index."""
    path.mkdir(parents=True)
    latents_BCHW = images_BCHW.float() / 127.5 - 1 if latents_BCHW is None else latents_BCHW
    (path / "images").mkdir()
    (path / "latents").mkdir()
    lines = []
    for index, (prompt, image_chw, latents_CHW) in enumerate(zip(prompts, images_BCHW, latents_BCHW, strict=True)):
        file, latents = f"images/{index:05d}_{1000 + index}.png", f"latents/{index:05d}_{1000 + index}.safetensors"
        pixels = image_chw.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path / file)
        save_file({"latents": latents_CHW.contiguous()}, path / latents)
        line = {"index": index, "prompt_index": index, "seed": 1000 + index, "prompt": prompt, "file": file}
        lines.append({**line, "width": image_chw.shape[2], "height": image_chw.shape[1], "latents": latents})
    (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {
        "source": f"outputs/demo/{kind}",
        "kind": kind,
        "nfe" if kind == "student" else "steps": steps,
        "seconds": seconds,
        "images": len(prompts),
        "network_evaluations": steps * evaluations_per_step,
        "dataset": "outputs/demo/data",
    }
    if kind == "teacher":
        meta["guidance"] = 2.0
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def striped_images(count: int, seed: int, noise: float = 20.0) -> tuple[Tensor, list[str]]:
    """Three easy classes of noisy 16 x 16 images in turn: horizontal stripes, vertical stripes, a disc."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    shapes = torch.stack([y % 4 < 2, x % 4 < 2, (x - 8) ** 2 + (y - 8) ** 2 < 25]).float() * 200
    names = ["a drawing of rows", "a drawing of columns", "a drawing of a disc"]
    labels = torch.arange(count) % 3
    brightness_B111 = 0.7 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    images = shapes[labels].unsqueeze(1) * brightness_B111 + noise * torch.randn(count, 1, 16, 16, generator=generator)
    return images.clamp(0, 255).round().to(torch.uint8), [names[label] for label in labels]


def write_training(path: Path, steps: int = 60, seed: int = 0) -> Path:
    """metrics.jsonl of a training whose loss falls, and config.yaml."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "step": step,
            "loss": (1 + 9 / step) * (1 + 0.2 * torch.rand(1, generator=generator).item()),
            "grad_norm": 1.0,
            "lr": 1e-3,
            "seconds": 0.1,
        }
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(
        "objective: imitation\npolicy: {type: gmflow, num_components: 8, num_nodes: 10, mode: grid}\n"
        "distill: {nfe: 4, guidance: {scale: 2.0}}\ntrain: {steps: 60, batch_size: 64, seed: 0}\n"
    )
    return path
