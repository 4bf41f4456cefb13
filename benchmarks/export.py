"""Memory and time of exporting, rewriting and comparing a tied checkpoint: python benchmarks/export.py [--model qwen_image_300m]

Writes random weights of the model's shape (base in bf16, checkpoint in fp32) into --folder and prints, for each task, seconds and
the growth of anonymous memory over what the process held before, beside the model's largest tensor.
"""

import argparse
import json
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from piflow_dist.checkpoint.compare import compare
from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.checkpoint.files import FORMAT, MANIFEST, STATE, file_digest, shard_name
from piflow_dist.checkpoint.reshard import reshard
from piflow_dist.checkpoint.streaming import Spec, TensorFile
from piflow_dist.config import Config, config_values, load_config
from piflow_dist.models.architecture import plan_model, shape_tied
from piflow_dist.models.pretrained import SINGLE, DiffusersWeights
from piflow_dist.models.published import model_json

KINDS = ("weights", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq")


def write_random(path: Path, specs: dict[str, Spec]) -> None:
    generator = torch.Generator().manual_seed(0)
    with TensorFile(path, specs) as file:
        for name, (_, shape) in specs.items():
            file.write(name, 0.02 * torch.randn(shape, generator=generator))


def write_base(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True)
    parameters = plan_model(config.model).named_parameters()
    write_random(folder / SINGLE, {n.removeprefix("head."): (torch.bfloat16, tuple(p.shape)) for n, p in parameters})
    (folder / "config.json").write_text(json.dumps(model_json(config.model, None)))


def write_checkpoint(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True)
    model = shape_tied(config.model, config.policy, config.lora)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    specs = {f"{kind}/{name}": (torch.float32, (math.prod(shapes[name]),)) for kind in KINDS for name in shapes}
    write_random(folder / shard_name(0), specs)
    state = {
        "step": 1,
        "dp_size": 1,
        "tp": 1,
        "parameters": {name: {"shape": list(shape), "split_dim": None} for name, shape in shapes.items()},
        "config": config_values(config),
        "teacher": DiffusersWeights(Path(config.distill.teacher), config.model).fingerprint(),
    }
    (folder / STATE).write_text(json.dumps(state))
    files = {name: file_digest(folder / name) for name in (STATE, shard_name(0))}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))


def anonymous_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


@contextmanager
def watched() -> Iterator[list[float]]:
    """The largest anonymous memory, looked at every 5 ms."""
    peak, done = [anonymous_megabytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_megabytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(name: str, task: Callable[[], object]) -> None:
    before, began = anonymous_megabytes(), time.perf_counter()
    with watched() as peak:
        task()
    print(f"{name:10} {time.perf_counter() - began:7.1f} s   {before:6.0f} -> {peak[0]:6.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen_image_300m")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("outputs/export_benchmark"))
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    lora = [f"lora.rank={options.rank}", f"lora.alpha={options.rank}"]
    places = [f"distill.teacher={folder / 'base'}", f"run_dir={folder / 'run'}", "data.root=none"]
    config = load_config([f"model={options.model}", "mode=tied", *lora, *places])
    checkpoint = folder / "run" / "checkpoints" / "step_00000001"
    write_base(folder / "base", config)
    write_checkpoint(checkpoint, config)
    with warnings.catch_warnings(action="ignore"):
        import piflow_dist.parallel.tensor  # noqa: F401 (Megatron's import is no part of what is measured)
    largest = max(p.numel() for p in plan_model(config.model).parameters()) * 4 / 1e6
    sizes = [sum(f.stat().st_size for f in place.iterdir()) / 1e6 for place in (folder / "base", checkpoint)]
    print(f"largest tensor {largest:.0f} MB in fp32; base {sizes[0]:.0f} MB, checkpoint {sizes[1]:.0f} MB")
    source = str(folder / "run")
    measure("adapter", lambda: export(ExportConfig(source=source, out=str(folder / "adapter"))))
    measure("merged", lambda: export(ExportConfig(source=source, out=str(folder / "merged"), format="merged")))
    measure("reshard", lambda: reshard(checkpoint, folder / "resharded", 4, 2))
    measure("diff", lambda: compare(checkpoint, folder / "resharded" / "checkpoints" / checkpoint.name))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
