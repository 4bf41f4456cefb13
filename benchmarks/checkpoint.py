"""Checkpoints: speed to and from a disk against plain copies, memory, and how long training stands still.

    python benchmarks/checkpoint.py [--out FOLDER] [--gigabytes 1] [--ranks 2] [--repeats 3] [--model qwen_image_demo] [--steps 30]

Disk: every rank writes and reads as many bytes at the same time; the ways alternate, the best of each counts. What is read has left
the page cache before. Stall (not with --steps 0): the same training with checkpoint.asynchronous=true and false, every 5 steps.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from piflow_dist.checkpoint.files import file_digest
from piflow_dist.checkpoint.snapshot import Snapshot

REPO = Path(__file__).parents[1]
TENSORS = 200


class Bench:
    """One rank's tensors and ways to write and read them."""

    def __init__(self, folder: Path, rank: int, gigabytes: float):
        self.path, self.other = folder / f"rank_{rank}", folder / f"other_{rank}"
        generator = torch.Generator().manual_seed(rank)
        size = int(gigabytes * 1e9 / 4 / TENSORS)
        self.tensors = {f"weights/{i:03d}": torch.randn(size, generator=generator) for i in range(TENSORS)}
        self.snapshot = Snapshot(page_locked=False)
        self.snapshot.take(self.tensors)

    def dd_write(self) -> None:
        size = self.snapshot.size
        command = [
            "dd",
            "if=/dev/zero",
            f"of={self.other}",
            "bs=32M",
            f"count={size >> 25}",
            "conv=fsync",
            "status=none",
        ]
        subprocess.run(command, check=True)

    def dd_read(self) -> None:
        subprocess.run(["dd", f"if={self.other}", "of=/dev/null", "bs=32M", "status=none"], check=True)

    def plain_write(self) -> None:
        """What a synchronous save would do: clone, safetensors, fsync."""
        save_file({name: value.clone() for name, value in self.tensors.items()}, self.other)
        with open(self.other, "rb+") as file:
            os.fsync(file.fileno())

    def take(self) -> None:
        self.snapshot.take(self.tensors)

    def our_write(self) -> None:
        self.snapshot.write(self.path)

    def plain_read(self) -> None:
        load_file(self.path)

    def hash_and_read(self) -> None:
        """As resuming does: hashes first, then the tensors."""
        file_digest(self.path)
        load_file(self.path)


def forget(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def with_peak(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and by how much anonymous memory rose meanwhile."""
    before, highest, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return seconds, max(0, highest[0] - before)


WAYS = ("dd_write", "dd_read", "plain_write", "take", "our_write", "plain_read", "hash_and_read")


def rank_main(
    folder: Path, rank: int, gigabytes: float, repeats: int, barrier: Barrier, results: "multiprocessing.Queue"
) -> None:
    torch.set_num_threads(1)
    bench = Bench(folder, rank, gigabytes)
    size, best, peaks = bench.snapshot.size, dict.fromkeys(WAYS, float("inf")), dict.fromkeys(WAYS, 0)
    for _ in range(repeats):
        for way in WAYS:
            if way.endswith("read"):
                forget(bench.other if way == "dd_read" else bench.path)
            barrier.wait()
            seconds, peak = with_peak(getattr(bench, way))
            best[way], peaks[way] = min(best[way], seconds), max(peaks[way], peak)
    results.put({way: (size / best[way] / 1e9, peaks[way] / size) for way in WAYS})


def measure_disk(folder: Path, gigabytes: float, ranks: int, repeats: int) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    arguments = [(folder, rank, gigabytes, repeats, barrier, results) for rank in range(ranks)]
    processes = [context.Process(target=rank_main, args=args) for args in arguments]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    print(f"{ranks} ranks at once, {gigabytes:g} GB each, {folder}")
    print(f"{'':<42}{'GB/s a rank':>12}{'memory / file':>15}")
    names = {
        "dd_write": "dd conv=fsync",
        "plain_write": "clone + safetensors + fsync",
        "take": "snapshot (copy in memory: the stall)",
        "our_write": "snapshot to disk, SHA-256, fsync",
        "dd_read": "dd",
        "plain_read": "safetensors",
        "hash_and_read": "SHA-256 of the file, then safetensors",
    }
    for way, name in names.items():
        verb = "read:  " if way.endswith("read") else "write: "
        speed, peak = (statistics.mean(numbers[way][i] for numbers in found) for i in (0, 1))
        print(f"{verb + name:<46}{speed:>8.2f}{peak:>15.2f}")


def measure_stall(folder: Path, model: str, steps: int) -> None:
    from data_pipeline.synthetic import write_random_set

    write_random_set(folder / "data", train=64, size=8, dim=prompt_width(model))
    shared = [
        f"model={model}",
        "objective=flow_matching",
        "schedule.shift=1.0",
        "train.batch_size=16",
        f"train.steps={steps}",
        "checkpoint.every=5",
        "checkpoint.keep=1",
        "launch.device=cpu",
        "launch.processes=2",
        "launch.threads=1",
        "tracking.enabled=false",
        f"data.root={folder / 'data'}",
    ]
    print(f"\ntraining of {model} on 2 processes, a checkpoint every 5 steps")
    for asynchronous in ("true", "false"):
        run_dir = folder / f"asynchronous_{asynchronous}"
        command = [sys.executable, str(REPO / "tools" / "launch.py"), *shared]
        subprocess.run(
            [*command, f"checkpoint.asynchronous={asynchronous}", f"run_dir={run_dir}"], check=True, capture_output=True
        )
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        step = statistics.median(row["seconds"] for row in rows[2:])
        saves = [row for row in rows if "checkpoint_stall" in row]
        stall = statistics.median(row["checkpoint_stall"] for row in saves)
        write = statistics.median(row["checkpoint_write_seconds"] for row in saves)
        size = saves[-1]["checkpoint_bytes"] / 1e6
        print(
            f"asynchronous={asynchronous:<6} step {step * 1e3:7.1f} ms   stall {stall * 1e3:7.1f} ms = {stall / step:6.1%} of a step, "
            f"{stall / step / 100:.3%} at checkpoint.every=100   {size:.0f} MB written in {write * 1e3:.0f} ms"
        )


def prompt_width(model: str) -> int:
    from omegaconf import OmegaConf

    return OmegaConf.load(REPO / "configs" / "model" / f"{model}.yaml").joint_attention_dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="qwen_image_demo")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_", dir=arguments.out))
    try:
        if arguments.repeats:
            measure_disk(folder, arguments.gigabytes, arguments.ranks, arguments.repeats)
        if arguments.steps:
            measure_stall(folder, arguments.model, arguments.steps)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
