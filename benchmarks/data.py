"""The data pipeline on this machine, each comparison side by side in one run.

    OMP_NUM_THREADS=1 python benchmarks/data.py [stream] [decode] [wait] [--samples 200] [--repeats 3]

stream  samples/s of LatentStream over pre-encoded latents and embeddings of Qwen-Image's size, against reading the bytes
        of the same shard files, decompressed and compressed, and against what a step of the 20B model could consume
decode  images/s of DALI's decode, crop and resize on one thread, against Pillow's and torchvision's
wait    share of the demo teacher's training steps that is spent waiting for a batch, and the stream alone against what they
        consume

The alternatives take turns; the best of each counts. Shards are read from the page cache in all cases.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.buckets import crop_box
from data_pipeline.codec import BlockCodec
from data_pipeline.compat import repair_torchvision
from data_pipeline.decode import CropDecoder
from data_pipeline.description import DatasetDescription
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.source import RawSample
from data_pipeline.stream import LatentStream
from data_pipeline.writing import SplitWriter

LATENT = (16, 128, 128)
TOKENS, WIDTH = 128, 3584
H100_FLOPS = 989e12
"""Dense bf16, by its data sheet; no training reaches it."""
PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


def best(alternatives: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Largest rate of each; they take turns, so that a slow spell of the machine hits all."""
    rates = {name: 0.0 for name in alternatives}
    for _ in range(repeats):
        for name, run in alternatives.items():
            rates[name] = max(rates[name], run())
    return rates


def rate(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def most_consumed() -> float:
    """Samples/s that a distillation step of Qwen-Image 20B would consume of one H100 at its full rate, for 1024 x 1024.

    At least six forward passes: the teacher with and without prompt at two states, the student's forward and the
    gradients of its activations. Two thirds of the parameters act on every token, half of them on images' tokens and
    half on text's; the modulation acts once a sample.
    """
    image_tokens, parameters, width, layers = LATENT[1] * LATENT[2] // 4, 20.43e9, 3072, 60
    tokens = image_tokens + TOKENS
    forward = 2 * parameters / 3 * tokens + 4 * tokens**2 * width * layers
    return H100_FLOPS / (6 * forward)


class RandomPrompts:
    """Embeddings of Qwen2.5-VL's width: what is in them does not matter here."""

    dim = WIDTH

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(len(prompts))
        return [torch.randn(TOKENS, WIDTH, generator=generator) for _ in prompts]


def write_latents(root: Path, count: int) -> DatasetDescription:
    writer = SplitWriter(root / "train", RandomPrompts(), 64 << 20, keep_images=False)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, 8):
        samples = [RawSample(f"{i:06d}", f"prompt {i}", b"") for i in range(start, start + 8)]
        writer.write(samples, torch.randn(8, *LATENT, generator=generator))
    description = DatasetDescription(
        root=root,
        bucket_lists={"train": writer.finish()},
        codec=BlockCodec().describe(),
        prompt_encoder={"kind": "random"},
        prompt_dim=WIDTH,
        prompts=(),
        source={"name": "random"},
        request={},
        created_by={},
    )
    description.write()
    return description


def bench_stream(folder: Path, count: int, repeats: int) -> None:
    count = count // 8 * 8
    description = write_latents(folder / "latents", count)
    bytes_of_sample = 2 * (np.prod(LATENT) + TOKENS * WIDTH)

    def read_files(suffix: str) -> float:
        files = sorted((description.root / "train").rglob(f"*{suffix}"))
        return rate(count, lambda: [len(path.read_bytes()) for path in files])

    def read_stream(workers: int) -> float:
        stream = LatentStream(description.root, "train", batch_size=4, seed=0, num_workers=workers)
        stream._samples._kept = None  # the second epoch of a set that fits into memory costs nothing
        stream.next()  # starts workers, computes the order
        began = time.perf_counter()
        for _ in range(count // 4 - 1):
            stream.next()
        seconds = time.perf_counter() - began
        stream.close()
        return (count - 4) / seconds

    read_stream(0)  # decompresses
    rates = best(
        {
            "raw read, decompressed shards": lambda: read_files(".mds"),
            "raw read, compressed shards": lambda: read_files(".zstd"),
            "stream, no worker": lambda: read_stream(0),
            "stream, 1 worker": lambda: read_stream(1),
            "stream, 2 workers": lambda: read_stream(2),
        },
        repeats,
    )
    raw = rates["raw read, decompressed shards"]
    consumed = most_consumed()
    print(
        f"stream: {count} samples of {bytes_of_sample / 2**20:.2f} MiB; one H100 consumes at most {consumed:.2f} a second"
    )
    for name, value in rates.items():
        print(
            f"  {name:<32} {value:9.1f} samples/s  {value * bytes_of_sample / 2**30:6.2f} GiB/s  {value / raw:6.3f} of raw  "
            f"{value / consumed:5.0f} x an H100's"
        )


def photographs(scale: int) -> list[bytes]:
    files = []
    for package, path in PHOTOS:
        with Image.open(Path(find_spec(package).origin).parent / path) as image:
            image = image.convert("RGB")
            larger = image.resize((image.width * scale, image.height * scale), Image.BICUBIC)
            stream = io.BytesIO()
            larger.save(stream, "JPEG", quality=90)
            files.append(stream.getvalue())
    return files


def bench_decode(repeats: int) -> None:
    repair_torchvision()
    from torchvision.transforms import InterpolationMode, functional

    torch.set_num_threads(1)
    for scale, bucket in ((1, (256, 256)), (4, (1024, 1024))):
        files = photographs(scale) * (8 if scale == 1 else 2)
        sizes = [Image.open(io.BytesIO(file)).size[::-1] for file in files]
        boxes = [crop_box(size, bucket) for size in sizes]
        decoder = CropDecoder(3, batch_size=len(files), threads=1)

        def with_dali(files=files, sizes=sizes, boxes=boxes, bucket=bucket, decoder=decoder) -> float:
            return rate(len(files), lambda: decoder.crop(files, sizes, boxes, bucket))

        def with_pillow(files=files, boxes=boxes, bucket=bucket) -> float:
            def one(encoded: bytes, box: tuple) -> np.ndarray:
                top, left, bottom, right = box
                pixels = Image.open(io.BytesIO(encoded)).convert("RGB")
                return np.asarray(pixels.resize(bucket[::-1], Image.BICUBIC, box=(left, top, right, bottom)))

            return rate(len(files), lambda: [one(*pair) for pair in zip(files, boxes, strict=True)])

        def with_torchvision(files=files, boxes=boxes, bucket=bucket) -> float:
            def run() -> None:
                for file, box in zip(files, boxes, strict=True):
                    top, left, bottom, right = (round(edge) for edge in box)
                    pixels = functional.pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB"))
                    functional.resized_crop(
                        pixels, top, left, bottom - top, right - left, list(bucket), InterpolationMode.BICUBIC, True
                    )

            return rate(len(files), run)

        rates = best({"DALI": with_dali, "Pillow": with_pillow, "torchvision": with_torchvision}, repeats)
        print(
            f"decode: JPEG photographs of about {640 * scale} x {427 * scale} -> {bucket[0]} x {bucket[1]}, one thread"
        )
        for name, value in rates.items():
            print(f"  {name:<14} {value:8.1f} images/s   DALI is {rates['DALI'] / value:5.2f} x as fast")


def bench_wait(folder: Path, steps: int = 30) -> None:
    """One process, the demo's teacher on the digits; the first ten steps are not counted."""
    from piflow_dist.build import build_run
    from piflow_dist.config import load_config
    from piflow_dist.parallel.topology import start_process_group
    from piflow_dist.train import train_step

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    prepare(PrepareConfig(out=str(folder / "digits")), show_progress=False)
    config = load_config(
        [
            "experiment=demo_teacher",
            f"data.root={folder / 'digits'}",
            f"run_dir={folder / 'run'}",
            "launch.device=cpu",
            "tracking.enabled=false",
        ]
    )
    run = build_run(config, start_process_group("cpu", 600, 1))
    waited, plain = 0.0, run.stream.next

    def timed() -> object:
        nonlocal waited
        began = time.perf_counter()
        batch = plain()
        waited += time.perf_counter() - began
        return batch

    run.stream.next = timed
    for step in range(steps):
        if step == 10:
            waited, began = 0.0, time.perf_counter()
        train_step(run)
        run.state.step += 1
    seconds = time.perf_counter() - began
    per_step = seconds / (steps - 10)
    consumed = (steps - 10) * config.train.batch_size / seconds
    run.stream.next()
    given = rate(200 * config.train.batch_size, lambda: [plain() for _ in range(200)])
    print(f"wait: demo teacher, batch {config.train.batch_size}, {per_step * 1000:.0f} ms a step")
    print(f"  waiting for data: {100 * waited / seconds:.2f} % of the step")
    print(f"  consumed {consumed:.0f} samples/s; the stream alone gives {given:.0f}: {given / consumed:.0f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["stream", "decode", "wait"])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "stream" in given.what:
            bench_stream(Path(folder), given.samples, given.repeats)
        if "decode" in given.what:
            bench_decode(given.repeats)
        if "wait" in given.what:
            bench_wait(Path(folder))


if __name__ == "__main__":
    main()
