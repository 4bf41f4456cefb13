"""A training step by its parts, beside a plain one (diffusers, peft, the textbook's loop), in one run, for any configuration.

    python benchmarks/step.py experiment=qwen_gmm model=qwen_image_300m bench.size=256 [key=value ...]

The step is the trainer's own (train.train_step: objectives, policies, ZeRO-3 engine); data and the teacher's weights are
random, so nothing has to exist. One process and two images unless launch.processes and train.batch_size say otherwise.
bench.plain=false leaves the plain step out, bench.largest_batch=true looks for the largest batch that fits. The two steps
alternate; the best of bench.steps counts (other load only adds). The parts are timed in a step of their own that waits for the device at each border.
"""

import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from meter import Arithmetic, Memory, Meter, matmul_rate, messages, timed
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from piflow_dist import train
from piflow_dist.cli import run_tool
from piflow_dist.config import Config, load_config, read_config, require, require_positive, save_config
from piflow_dist.distill.ema import Ema
from piflow_dist.distill.objectives import build_schedule
from piflow_dist.launch.local import run_workers
from piflow_dist.launch.straggler import StragglerProbe
from piflow_dist.launch.watchdog import UNWATCHED
from piflow_dist.models.architecture import plan_model, plan_student, plan_tied
from piflow_dist.models.heads import PATCH
from piflow_dist.parallel.topology import Topology, start_process_group
from piflow_dist.parallel.zero import DTYPES, FrozenModel, TiedTeacher, TrainedModel
from piflow_dist.tracking.gauges import Gauges

GIB = 1 << 30
PIXELS = 8
"""Side of a latent's pixel in the image."""
EMPTY_PROMPT = 5
TORCHS_LINEAR = torch.nn.functional.linear
PARTS = ("student forward", "teacher", "policy", "backward", "optimizer", "average", "data")
BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
DEFAULTS = (
    "distill.teacher=random",
    "data.root=random",
    "launch.processes=1",
    "launch.device=auto",
    "train.batch_size=2",
    "train.micro_batch_size=null",
    "optim.clip_from_step=0",
    "ema.start_step=1",
)


@dataclass(kw_only=True)
class BenchConfig:
    size: int = 1024
    """Side of the square images, in pixels; a latent is an eighth of it."""
    text_length: int = 128
    """Tokens of the longest prompt of a batch; the others are shorter."""
    steps: int = 3
    """Steps of each kind that are timed, after one that is not."""
    plain: bool = True
    """Run the plain step too. Every process holds a whole model then."""
    cpu_seconds: bool = False
    """Count what this process computes instead of what the clock says: for one process on a CPU that others use too."""
    largest_batch: bool = False
    """Look for the largest batch of one process that fits."""
    memory_gib: float = 0.0
    """What "fits" means; 0: the device's memory."""

    def __post_init__(self):
        require_positive("bench", self, "size", "steps")
        require(self.size % (PIXELS * PATCH) == 0, f"bench.size={self.size} is no multiple of {PIXELS * PATCH}.")
        require(
            self.text_length >= EMPTY_PROMPT,
            f"bench.text_length={self.text_length} is shorter than the empty prompt, of {EMPTY_PROMPT} tokens.",
        )


@dataclass(kw_only=True)
class StepBenchmark(Config):
    bench: BenchConfig = field(default_factory=BenchConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.objective.startswith("imitation"),
            f"objective={self.objective} has no policy to measure. Use experiment=qwen_gmm or another.",
        )
        if self.bench.plain:
            require(self.optim.type != "muon", "optim.type=muon is not in the plain step. Set bench.plain=false.")
            require(not self.model.guidance_embeds, "diffusers' model has no guidance input. Set bench.plain=false.")
        require(
            not self.bench.cpu_seconds or (self.launch.processes == 1 and self.launch.device == "cpu"),
            "bench.cpu_seconds=true leaves out what a process waits for. Use launch.processes=1 and launch.device=cpu.",
        )
        require(
            not self.bench.largest_batch or self.launch.processes == 1,
            f"bench.largest_batch=true with launch.processes={self.launch.processes}: a process that runs out of memory "
            "leaves the others waiting. Use launch.processes=1.",
        )


class RandomWeights:
    """A teacher of the configured shape, made on the device where it is asked for, tensor by tensor: no file, no whole copy."""

    origin = "random weights"

    def __init__(self, config: Config, device: torch.device):
        self.device, self.dtype = device, DTYPES[config.train.dtype]
        self.found = {name: tuple(p.shape) for name, p in plan_model(config.model).named_parameters()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.found

    def view(self, name: str) -> Tensor:
        shape = self.found[name]
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            return weight.fill_(0.0 if name.endswith("bias") else 1.0)
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        return weight.normal_(0, 0.5 / math.sqrt(shape[1]), generator=torch.Generator(self.device).manual_seed(seed))


class RandomStream:
    """Batches as the data pipeline gives them: latents, and prompts of different lengths with their mask, on the CPU."""

    def __init__(self, config: StepBenchmark, dp_rank: int):
        self.config, self.generator = config, torch.Generator().manual_seed(dp_rank)
        self.images = 0

    def next(self) -> dict[str, Tensor]:
        config, B, L = self.config, self.images, self.config.bench.text_length
        side = config.bench.size // PIXELS
        length_B = torch.randint(min(8, L), L + 1, (B,), generator=self.generator)
        length_B[0] = L
        return {
            "latents": torch.randn(B, config.model.latent_channels, side, side, generator=self.generator),
            "prompt_embeds": torch.randn(B, L, config.model.joint_attention_dim, generator=self.generator),
            "prompt_mask": torch.arange(L) < length_B[:, None],
        }


class Metered:
    """A trained model or a teacher, whose calls are parts of the step."""

    def __init__(self, model: Any, meter: Meter, forward: str):
        self.model, self.meter, self.forward = model, meter, forward
        if isinstance(model, TrainedModel):
            self.backward = meter.wrap("backward", model.backward)
            self.step = meter.wrap("optimizer", model.step)

    def __call__(self, *inputs: Tensor | None) -> Any:
        with self.meter.part(self.forward):
            return self.model(*inputs)


class OurStep:
    """train.train_step on random data, and the average that the training loop keeps."""

    def __init__(self, config: StepBenchmark, topology: Topology, meter: Meter):
        self.config, self.meter, self.topology = config, meter, topology
        weights, seed, parallel = RandomWeights(config, topology.device), config.train.seed, config.parallel
        if config.mode == "tied":
            module, start = plan_tied(config.model, config.policy, config.lora, weights, seed)
        else:
            module, start = plan_student(config.model, config.policy, weights, seed)
        model = TrainedModel(module, start, topology, config.optim, parallel, config.train.dtype)
        if config.mode == "tied":
            teacher: Any = TiedTeacher(model)
        else:
            teacher = FrozenModel(plan_model(config.model), weights, topology, parallel, config.train.dtype)
        self.model, self.ema = model, Ema(model.masters, config.ema.gamma, config.ema.start_step)
        stream = RandomStream(config, topology.dp_rank)
        stream.next = meter.wrap("data", stream.next)
        side = config.bench.size // PIXELS
        empty_LD = torch.randn(
            EMPTY_PROMPT, config.model.joint_attention_dim, generator=torch.Generator().manual_seed(1)
        )
        self.run = SimpleNamespace(
            config=config,
            topology=topology,
            schedule=build_schedule(config.schedule, (config.model.latent_channels, side, side)),
            model=Metered(model, meter, "student forward"),
            teacher=Metered(teacher, meter, "teacher"),
            stream=stream,
            empty_LD=empty_LD.to(topology.device),
            state=train.TrainState(),
            watchdog=UNWATCHED,
            straggler=StragglerProbe(topology.device, config.tracking.log_every),
            gauges=Gauges(config, topology),
        )

    def step(self) -> float:
        """Returns the loss."""
        run = self.run
        _, run.stream.images = self.config.train.accumulation(self.topology.dp_size)
        with self.meter.part("policy"):  # what is left of the step without its other parts
            loss, _ = train.train_step(run)
        run.state.step += 1
        with self.meter.part("average"):
            self.ema.update(self.model.masters, run.state.step)
        return loss.item()


class Plain:
    """plain.PlainStep on the same data, noise and weights as OurStep; data-parallel over all processes."""

    def __init__(self, config: StepBenchmark, topology: Topology, meter: Meter, ours: OurStep):
        from plain import PlainStep

        self.images = max(1, config.train.batch_size // topology.world_size)
        self.stream, self.empty_LD, self.topology = RandomStream(config, topology.rank), ours.run.empty_LD, topology
        self.stream.images, self.done, self.seed = self.images, 0, config.train.seed
        weights = RandomWeights(config, topology.device)
        self.plain = PlainStep(config, ours.run.schedule, weights, topology.device, meter)

    def step(self) -> float:
        # ZeRO-3 has put a slower linear layer, which holds fewer weights in memory, in the place of torch's.
        theirs, torch.nn.functional.linear = torch.nn.functional.linear, TORCHS_LINEAR
        try:
            return self._step()
        finally:
            torch.nn.functional.linear = theirs

    def _step(self) -> float:
        topology = self.topology
        seed = train.seed_from(self.seed, self.done, topology.rank)
        generator = torch.Generator(topology.device).manual_seed(seed)
        torch.manual_seed(seed)
        batch = train.next_batch(SimpleNamespace(stream=self.stream, topology=topology, empty_LD=self.empty_LD))
        loss = self.plain.step(batch, self.done, generator)
        self.done += 1
        return loss


def flops_of_parts(config: StepBenchmark) -> dict[str, float]:
    """Of one step over all processes."""
    tokens = (config.bench.size // PIXELS // PATCH) ** 2
    one, distill = Arithmetic.of(config, tokens, config.bench.text_length), config.distill
    segments = distill.nfe if config.objective == "imitation_datafree" else 1
    passes = distill.num_intermediate_states
    if distill.guidance.scale > 1 and not config.model.guidance_embeds:
        passes *= 2
    images = config.train.batch_size * segments
    return {
        "student forward": images * one.forward,
        "teacher": images * passes * one.teacher,
        "backward": images * one.backward(config.mode == "tied"),
    }


def in_parts(meter: Meter, step: Callable[[], float], repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """(seconds, peak bytes) of the parts of a step, each the best of `repeats`, as the whole step's time is."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        meter.clear()
        meter.on = True
        step()
        meter.on = False
        best = {part: min(seconds, best.get(part, seconds)) for part, seconds in meter.seconds.items()}
    return best, meter.peak


def measure(config: StepBenchmark, topology: Topology) -> None:
    device, world = topology.device, topology.world_size
    clock = time.process_time if config.bench.cpu_seconds else time.perf_counter
    meter = Meter(device, clock)
    say = print if topology.is_main else lambda *_, **__: None
    memory = Memory(device)
    ours = OurStep(config, topology, meter)
    describe(config, topology, ours.model.engine.module, say)
    first = ours.step()
    memory.reset()
    ours.step()
    peak = memory.peak
    seconds, peaks = in_parts(meter, ours.step, config.bench.steps)
    with messages(device) as sent:
        ours.step()
    times, plain, plain_seconds = {"ours": [], "plain": []}, None, {}
    if config.bench.plain:
        plain = Plain(config, topology, meter, ours)
        plain_first = plain.step()
        plain_seconds, _ = in_parts(meter, plain.step, config.bench.steps)
    for _ in range(config.bench.steps):
        times["ours"].append(timed(device, ours.step, clock))
        if plain is not None:
            times["plain"].append(timed(device, plain.step, clock))
    flops = flops_of_parts(config)
    whole = min(times["ours"])
    say(f"\n{'part':18}{'seconds':>9}{'peak GiB':>10}{'GFLOP/s':>10}" + (f"{'plain':>10}" if plain else ""))
    for part in PARTS:
        rate = f"{flops[part] / world / seconds[part] / 1e9:10.1f}" if part in flops else f"{'':10}"
        other = f"{plain_seconds[part]:10.3f}" if part in plain_seconds else ""
        say(f"{part:18}{seconds[part]:9.3f}{peaks[part] / GIB:10.2f}{rate}{other}")
    say(f"{'(messages)':18}{sum(s for _, s in sent.values()):9.3f}  inside of these, waiting included: {listed(sent)}")
    rate, peak_rate = sum(flops.values()) / world / whole, matmul_rate(device, DTYPES[config.train.dtype], clock)
    images = config.train.batch_size / whole
    tokens = (config.bench.size // PIXELS // PATCH) ** 2 + config.bench.text_length
    say(
        f"\na step: {whole:.3f} s, {images:.3f} images/s, {images * tokens:,.0f} tokens/s, peak {peak / GIB:.2f} GiB a process\n"
        f"model FLOP/s a process: {rate / 1e9:,.1f} G, {rate / peak_rate:.0%} of the {peak_rate / 1e9:,.1f} G of a "
        f"{config.train.dtype} matrix product measured here (recomputed activations do not count)"
    )
    if plain is not None:
        slow = min(times["plain"])
        others = plain.images * world / slow
        say(f"a plain step: {slow:.3f} s, {others:.3f} images/s. Ours: {images / others:.2f} x the images per second")
        if world == 1 and config.train.accumulation(1)[0] == 1:
            say(f"loss of the first step: ours {first:.6f}, plain {plain_first:.6f}, on the same weights and noise")


def describe(config: StepBenchmark, topology: Topology, module: nn.Module, say: Callable) -> None:
    total = sum(p.ds_numel for p in module.parameters())
    trained = sum(p.ds_numel for p in module.parameters() if p.requires_grad)
    device = topology.device
    name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    say(
        f"{total / 1e6:,.1f} million parameters a tensor-parallel rank, {trained / 1e6:,.1f} trained; mode {config.mode}, "
        f"{config.objective}, {config.policy.type}, {config.train.dtype}\n"
        f"{config.train.batch_size} images of {config.bench.size} x {config.bench.size} a step, text of "
        f"{config.bench.text_length}; {topology.world_size} processes, parallel.tp={config.parallel.tp}, "
        f"parallel.recompute_every={config.parallel.recompute_every}; {name}, torch {torch.__version__}",
        flush=True,
    )


def listed(sent: dict[str, tuple[int, float]]) -> str:
    return ", ".join(f"{count} {name}" for name, (count, _) in sent.items()) or "none"


def find_largest_batch(config: StepBenchmark, topology: Topology) -> None:
    device, memory = topology.device, Memory(topology.device)
    limit = config.bench.memory_gib * GIB
    if limit == 0:
        require(device.type != "cpu", "bench.largest_batch=true on a CPU needs bench.memory_gib.")
        limit = torch.accelerator.get_memory_info(device)[1]
    ours, fits = OurStep(config, topology, Meter(device)), 0
    for batch in BATCHES:
        config.train.batch_size, config.train.micro_batch_size = batch, None
        memory.reset()
        try:
            ours.step()
            seconds = timed(device, ours.step)
        except torch.OutOfMemoryError:
            print(f"batch {batch:3}: out of memory")
            break
        print(f"batch {batch:3}: peak {memory.peak / GIB:7.2f} GiB, {batch / seconds:7.3f} images/s", flush=True)
        if memory.peak > limit:
            break
        fits = batch
    print(
        f"largest batch of one process within {limit / GIB:.1f} GiB: {fits}"
        + (" or more" if fits == BATCHES[-1] else "")
    )


@record
def work(path: str) -> None:
    config = read_config(Path(path), StepBenchmark)
    topology = start_process_group(config.launch.device, config.launch.timeout_seconds, config.parallel.tp)
    if config.bench.largest_batch:
        find_largest_batch(config, topology)
    else:
        measure(config, topology)
    dist.destroy_process_group()


def benchmark(overrides: list[str]) -> None:
    config = load_config([*DEFAULTS, *overrides], StepBenchmark)
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        config.run_dir = folder
        save_config(config, Path(folder) / "config.yaml")
        run_workers("step", [f"--worker={folder}/config.yaml"], config.launch, Path(folder) / "logs")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--worker="):
        work(sys.argv[1].partition("=")[2])
    else:
        run_tool(benchmark, sys.argv[1:], __doc__)
