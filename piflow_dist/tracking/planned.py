"""The planner's view of a training, made beside it: `python -m piflow_dist.tracking.planned CONFIG.yaml`, a process of its own.

RUN/tracking/plan.json holds the operations of a step per GPU, from which the achieved FLOP/s follow; plan.txt what tools/plan.py
prints. The planner needs a process group of its own, and seconds to minutes: not in the training's process.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import Config, read_config
from piflow_dist.tracking.gauges import PLAN
from piflow_dist.tracking.journal import TRACKING, post_artifact

log = logging.getLogger(__name__)
PLAN_TEXT = "plan.txt"


def is_wanted(config: Config) -> bool:
    """Where a peak is known that the figure can be compared with; small local runs are spared the process."""
    return config.tracking.enabled and (config.cluster is not None or config.tracking.peak_tflops is not None)


def start_planning(config: Config) -> subprocess.Popen | None:
    """Rank 0 calls this once; the figures are there when they are there. Those of an earlier start are removed: its world and its
    batches may have been others."""
    for name in (PLAN, PLAN_TEXT):
        (Path(config.run_dir) / TRACKING / name).unlink(missing_ok=True)
    if not is_wanted(config):
        return None
    command = [sys.executable, "-m", "piflow_dist.tracking.planned", str(Path(config.run_dir) / "config.yaml")]
    words = Path(config.run_dir) / "logs" / "plan.log"
    with open(words, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    threading.Thread(target=tell_failure, args=(process, words), name="planning", daemon=True).start()
    return process


def tell_failure(process: subprocess.Popen, words: Path) -> None:
    code = process.wait()
    if code not in (0, -signal.SIGTERM):  # SIGTERM: the training ended first
        log.warning("The planner ended with exit code %d, see %s: tflops_per_gpu is not logged", code, words)


def write_plan(config: Config) -> None:
    from rich.console import Console

    from piflow_dist.launch.plan_report import as_json, print_plan
    from piflow_dist.parallel.dryrun import fake_world, trace_step
    from piflow_dist.parallel.memory import Planner, data_shape

    folder, shape = Path(config.run_dir) / TRACKING, data_shape(config, None, None)
    if config.cluster is not None:
        planner = Planner(shape)
        plan = planner.plan(config)
        with open(folder / PLAN_TEXT, "w") as file:
            print_plan(planner, plan, Console(file=file, width=160))
        content = as_json(planner, plan)
    else:
        step = config.distill.num_decay_iters if config.distils else 0
        with fake_world(config.launch.processes, 0, config.parallel.tp) as topology:
            record = trace_step(config, topology, shape.latent, shape.text_length, step)
        micro_batches, _ = config.train.accumulation(topology.dp_size)
        content = {"flops": {phase: count * micro_batches for phase, count in record.flops.items()}}
    write_atomic(folder / PLAN, json.dumps(content, indent=1) + "\n")
    for name in (PLAN_TEXT, PLAN):
        if (folder / name).exists():
            post_artifact(Path(config.run_dir), folder / name, "plan")


if __name__ == "__main__":
    os.nice(10)
    write_plan(read_config(Path(sys.argv[1])))
