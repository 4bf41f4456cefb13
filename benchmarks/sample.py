"""The student's images/s against its teacher's with guidance, side by side in one process, and the time outside the network.

    OMP_NUM_THREADS=1 python benchmarks/sample.py model=qwen_image_300m bench.cpu_seconds=true [mode=tied] [key=value ...]

Both go through the sampler as tools/sample.py runs it: its batches, policies, decoding and files; weights, prompts and the
orthogonal stand-in for the VAE are made up, so nothing has to exist. The student's nfe and the teacher's steps give the limit:
2 x 50 evaluations against 4 are 25. mode=full is a merged student, mode=tied has its adapters beside the weights.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from meter import Meter
from step import EMPTY_PROMPT, RandomWeights
from torch import Tensor

from data_pipeline.codec import load_codec
from piflow_dist.cli import run_tool
from piflow_dist.config import Config, load_config, require, require_positive
from piflow_dist.models.architecture import plan_model, plan_student, plan_tied
from piflow_dist.parallel.loading import load_slices
from piflow_dist.parallel.topology import Topology, choose_device
from piflow_dist.sampling.failures import FailureLog
from piflow_dist.sampling.images import list_images
from piflow_dist.sampling.sampler import Sampler, Saver
from piflow_dist.sampling.settings import DTYPES, SampleConfig, SampleRequest

CODEC = {"kind": "block_dct", "image_channels": 1, "block": 4, "scale": 1.0}
DEFAULTS = (
    *("experiment=qwen_gmm", "mode=full", "train.dtype=fp32", "data.root=random", "distill.teacher=random"),
    *("launch.processes=1", "launch.device=auto", "lora.rank=64", "lora.alpha=64"),
)


@dataclass(kw_only=True)
class BenchConfig:
    latent: int = 32
    """Side of the square latents: an eighth of an image's behind a VAE."""
    text_length: int = 64
    """Tokens of every prompt."""
    images: int = 2
    """Of one batch."""
    steps: int = 50
    """Of the teacher."""
    guidance: float = 4.0
    """Of the teacher: above 1, two evaluations a step."""
    repeats: int = 2
    """Batches of each that are timed, after a short one that is not; the best counts."""
    cpu_seconds: bool = False
    """Count what this process computes instead of what the clock says: on a CPU that others use too."""

    def __post_init__(self):
        require_positive("bench", self, "latent", "text_length", "images", "steps", "repeats")


@dataclass(kw_only=True)
class SampleBenchmark(Config):
    bench: BenchConfig = field(default_factory=BenchConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.distils, f"objective={self.objective} has no student to sample. Use experiment=qwen_gmm or another."
        )
        require(self.launch.processes == 1, f"launch.processes={self.launch.processes}: only one process is measured.")


class RandomEmbeddings:
    """What the sampler asks of its cache of prompt embeddings."""

    def __init__(self, config: SampleBenchmark):
        self.lengths, self.width = (EMPTY_PROMPT, config.bench.text_length), config.model.joint_attention_dim

    def read(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(prompt))
        return torch.randn(self.length(prompt), self.width, generator=generator)

    def length(self, prompt: str) -> int:
        return self.lengths[prompt != ""]


class Contestant:
    """A teacher or a student on its device, with the sampler's own loop for one batch."""

    def __init__(
        self, config: SampleBenchmark, sampling: SampleConfig, student: bool, device: torch.device, meter: Meter
    ):
        side = config.bench.latent * CODEC["block"]
        run = config if student else SimpleNamespace(**vars(config), distils=False)
        images = list_images([{"prompt": "a"}], list(range(config.bench.images)), (side, side))
        dataset = SimpleNamespace(codec=CODEC, location="random", prompt_encoder={})
        request = SampleRequest(sampling, run, Path("random"), dataset, images)
        weights, seed = RandomWeights(config, torch.device("cpu")), config.train.seed
        if not student:
            module, start = plan_model(config.model), weights
        elif config.mode == "tied":
            module, start = plan_tied(config.model, config.policy, config.lora, weights, seed)
        else:
            module, start = plan_student(config.model, config.policy, weights, seed)
        load_slices(module.eval(), start, Topology(0, 1, 0, device), DTYPES[request.dtype])
        self.request, self.meter = request, meter
        self.sampler = Sampler(request, meter.wrap("network", module), RandomEmbeddings(config), device)
        for folder in ("images", "latents", "failures"):
            (request.out / folder).mkdir(parents=True, exist_ok=True)
        self.saver = Saver(request, load_codec(CODEC, device), FailureLog(request.out, 0), device, {})

    def batch(self) -> None:
        for piece in self.sampler.pieces(self.request.images):
            with self.meter.part("policy and schedule"):
                latents_nCHW = self.sampler.sample(piece).cpu()
            with self.meter.part("decoding and files"):
                self.saver.save(piece, latents_nCHW, 1.0)
                self.saver.finish()


def measure(contestant: Contestant, config: SampleBenchmark) -> dict[str, float]:
    """Seconds by part, of the best batch."""
    found = []
    for _ in range(config.bench.repeats):
        contestant.meter.clear()
        contestant.batch()
        found.append(dict(contestant.meter.seconds))
    return min(found, key=lambda seconds: sum(seconds.values()))


def benchmark(overrides: list[str]) -> None:
    config = load_config([*DEFAULTS, *overrides], SampleBenchmark, "train")
    bench, device = config.bench, choose_device(config.launch.device, 0)
    meter = Meter(device, time.process_time if bench.cpu_seconds else time.perf_counter)
    meter.on = True
    with tempfile.TemporaryDirectory() as folder:
        common = {"source": "random", "dtype": config.train.dtype, "batch_size": bench.images}
        student = SampleConfig(out=os.path.join(folder, "student"), **common)
        steps = {"steps": bench.steps, "guidance": bench.guidance}
        teacher = SampleConfig(out=os.path.join(folder, "teacher"), **common, **steps)
        contestants = {
            "student": Contestant(config, student, True, device, meter),
            "teacher": Contestant(config, teacher, False, device, meter),
        }
        contestants["student"].batch()  # allocates, and warms caches for both
        report(config, device, contestants, {name: measure(each, config) for name, each in contestants.items()})


def report(
    config: SampleBenchmark, device: torch.device, contestants: dict, seconds: dict[str, dict[str, float]]
) -> None:
    bench = config.bench
    name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    millions = sum(parameter.numel() for parameter in plan_model(config.model).parameters()) / 1e6
    print(
        f"{millions:,.0f} million parameters, mode {config.mode}, {config.policy.type}, {config.train.dtype}; {bench.images} images of "
        f"{bench.latent} x {bench.latent} latents, text of {bench.text_length}; {name}, torch {torch.__version__}"
    )
    parts = ("network", "policy and schedule", "decoding and files")
    print(
        f"{'':10}{'evaluations':>12}{'images/s':>12}"
        + "".join(f"{part:>22}" for part in parts)
        + "   (share of seconds)"
    )
    rates, outside = {}, {}
    for name, found in seconds.items():
        whole = sum(found.values())
        rates[name] = bench.images / whole
        shares = "".join(f"{found[part] / whole:22.2%}" for part in parts)
        print(f"{name:10}{contestants[name].request.evaluations:12}{rates[name]:12.4f}{shares}")
        outside[name] = 1 - found["network"] / whole
    limit = contestants["teacher"].request.evaluations / contestants["student"].request.evaluations
    print(f"student / teacher: {rates['student'] / rates['teacher']:.2f} x the images per second, limit {limit:g}")
    print(f"outside the network: student {outside['student']:.2%}, teacher {outside['teacher']:.2%}")


if __name__ == "__main__":
    run_tool(benchmark, sys.argv[1:], __doc__)
