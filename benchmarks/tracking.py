"""What tracking costs of a training step, measured inside the trainer's own steps.

    python benchmarks/tracking.py experiment=demo_gmm optim=adamw bench.size=64 bench.text_length=8 [key=value ...]

Options as for benchmarks/step.py. The training's thread: time that it spends in the figures beside the loss, and in writing rows. The tracking thread:
what it computes while it copies them to an SQLite store, which on a loaded machine the training may have to wait for. Seconds of
CPU, so one process on a CPU; tracking.log_every is the configured one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step
import torch.distributed as dist
from meter import Meter
from torch.distributed.elastic.multiprocessing.errors import record

from piflow_dist.cli import run_tool
from piflow_dist.config import load_config, read_config, save_config
from piflow_dist.launch.local import run_workers
from piflow_dist.parallel.topology import Topology, start_process_group
from piflow_dist.tracking.tracker import Tracker

PARTS = ("losses and policy", "figures at the interval", "rows")


class Spent:
    """CPU seconds of the calling thread, by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.thread_time() - began

        return timed


def measure(config: step.StepBenchmark, topology: Topology) -> None:
    ours, spent = step.OurStep(config, topology, Meter(topology.device, time.process_time)), Spent()
    gauges = ours.run.gauges
    ours.step()  # compiles and allocates
    tracker = Tracker(config, 1, topology.world_size)
    tracker.flush(120)
    for owner, part, names in (
        (gauges.meter, PARTS[0], ("add_imitation", "add_velocities", "add_tokens")),
        (gauges.clock, PARTS[0], ("enter",)),
        (gauges, PARTS[1], ("end_step", "measure")),
        (tracker, PARTS[2], ("log",)),
    ):
        for name in names:
            setattr(owner, name, spent.wrap(part, getattr(owner, name)))
    sender = time.pthread_getcpuclockid(tracker.sender.ident)
    sender_began, began = time.clock_gettime(sender), time.thread_time()
    steps = config.bench.steps * config.tracking.log_every
    for number in range(1, steps + 1):
        loss = ours.step()
        gauges.end_step(0.1, False)
        values = {"loss": loss, "grad_norm": 1.0, "lr": 1e-4, "seconds": 0.1, "images_per_second": 1.0, "skipped": 0}
        tracker.log(number, values | gauges.measure(number))
    whole = time.thread_time() - began
    tracker.flush(120)
    aside = time.clock_gettime(sender) - sender_began
    step_seconds = (whole - sum(spent.seconds.values())) / steps
    print(
        f"a step without tracking: {step_seconds:.4f} s of CPU; {steps} steps, tracking.log_every={config.tracking.log_every}"
    )
    for part, seconds in spent.seconds.items():
        print(f"{part:26}{1e3 * seconds / steps:8.3f} ms a step {seconds / steps / step_seconds:8.2%}")
    print(f"{'the tracking thread':26}{1e3 * aside / steps:8.3f} ms a step {aside / steps / step_seconds:8.2%}")
    tracker.close("FINISHED")


@record
def work(path: str) -> None:
    config = read_config(Path(path), step.StepBenchmark)
    topology = start_process_group(config.launch.device, config.launch.timeout_seconds, config.parallel.tp)
    measure(config, topology)
    dist.destroy_process_group()


def benchmark(overrides: list[str]) -> None:
    config = load_config([*step.DEFAULTS, "launch.device=cpu", "launch.threads=1", *overrides], step.StepBenchmark)
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        config.run_dir, config.tracking.uri = f"{folder}/run", None
        (Path(folder) / "run").mkdir()
        save_config(config, Path(folder) / "run" / "config.yaml")
        run_workers("tracking", [f"--worker={folder}/run/config.yaml"], config.launch, Path(folder) / "logs")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--worker="):
        work(sys.argv[1].partition("=")[2])
    else:
        run_tool(benchmark, sys.argv[1:], __doc__)
