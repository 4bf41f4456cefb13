"""Checkpoints beside training: a copy of this rank's shards at a step boundary, written by a thread while training goes on.

    boundary of step N     copy to host memory (the stall), hand over to the thread
    thread                 write, flush, hash; agree with the other ranks' threads; rank 0: manifest, rename, latest, retention
    boundaries after N     ranks tell each other whether their threads are done or have failed; a failure stops all of them at once

The threads have a process group of their own: a collective of the training's thread in between would pair up wrongly.
"""

import logging
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piflow_dist.checkpoint.phases import enter
from piflow_dist.checkpoint.retention import Retention
from piflow_dist.checkpoint.sharded import Written, named_tensors, state_text, write_checkpoint
from piflow_dist.checkpoint.snapshot import Snapshot
from piflow_dist.config import CheckpointConfig
from piflow_dist.parallel.topology import Topology
from piflow_dist.parallel.zero import TrainedModel

log = logging.getLogger(__name__)

SLOWEST_DISK = timedelta(hours=6)
"""How long a rank's thread may wait for another's. A rank that dies ends the wait at once; this is for slow disks."""


class CheckpointSaver:
    """Saves of one run; every method but `close` is called by all ranks at the same step."""

    def __init__(self, folder: Path, topology: Topology, config: CheckpointConfig):
        self.folder, self.topology, self.config = folder, topology, config
        self.retention = Retention(
            config.keep, config.keep_every, config.keep_best, config.best_metric, config.best_mode
        )
        self.group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
        self.snapshot = Snapshot(page_locked=topology.device.type == "cuda")
        self.thread: threading.Thread | None = None
        """Of the save whose end the ranks have not yet agreed on."""
        self.written: Written | None = None
        self.error: Exception | None = None
        self.stall = 0.0
        self.began = time.monotonic()

    def at_boundary(self, step: int) -> tuple[bool, dict[str, float]]:
        """(whether to save now, figures of a save that has become complete), both alike on all ranks.

        Ranks talk only while a save is under way, or where checkpoint.every_minutes is set: rank 0's clock counts.
        Raises OSError on every rank where the save under way has failed on any.
        """
        figures = {}
        minutes = self.config.every_minutes
        due = bool(self.config.every) and step % self.config.every == 0
        if self.thread is not None or minutes:
            busy = self.thread is not None and self.thread.is_alive()
            failed = self.error is not None and not busy
            overdue = bool(minutes) and self.topology.is_main and time.monotonic() - self.began >= 60 * minutes
            signs = torch.tensor([busy, failed, overdue], dtype=torch.float32, device=self.topology.device)
            dist.all_reduce(signs, dist.ReduceOp.MAX)
            any_busy, any_failed, minutes_are_up = signs.tolist()
            if any_failed or (self.thread is not None and not any_busy):
                figures = self.wait()
            due = due or bool(minutes_are_up)
        return due, figures

    def start(self, step: int, model: TrainedModel, ema_flats: list[Tensor], state: dict[str, Any]) -> dict[str, float]:
        """Save the state of this moment. Waits for the save before, whose figures it returns, and copies; no more.

        With checkpoint.asynchronous=false it waits for this save too. Raises OSError where one of the two fails.
        """
        began = time.perf_counter()
        figures = self.wait()
        self.began = time.monotonic()
        enter("snapshot", step, self.topology.rank)
        self.snapshot.take(named_tensors(model, ema_flats))
        text = state_text(step, model, state, self.topology) if self.topology.is_main else ""
        self.written, self.error = None, None
        self.thread = threading.Thread(target=self._write, args=(step, text), name="checkpoint", daemon=True)
        self.thread.start()
        if not self.config.asynchronous:
            self.thread.join()
        self.stall = time.perf_counter() - began
        return figures if self.config.asynchronous else self.wait()

    def wait(self) -> dict[str, float]:
        """Wait for the save under way, if there is one; its figures. Raises OSError on every rank where it failed on any."""
        if self.thread is None:
            return {}
        self.thread.join()
        self.thread = None
        # Threads may fail apart only where their group broke: then the training's group has, too.
        if self.error is not None:
            raise self.error
        if self.topology.is_main:
            size, seconds = self.written.bytes, self.written.seconds
            log.info(
                "%s is complete: %.3f GB written in %.2f s; training stood still for %.3f s",
                *(self.written.path.name, size / 1e9, seconds, self.stall),
            )
        return {
            "checkpoint_stall": self.stall,
            "checkpoint_bytes": self.written.bytes,
            "checkpoint_write_seconds": self.written.seconds,
        }

    def close(self, patience: float) -> None:
        """Where training has failed: give the save under way `patience` seconds. Its state is from before, and whole."""
        if self.thread is not None:
            self.thread.join(patience)
            if self.error is not None:
                log.error("%s", self.error)

    def _write(self, step: int, state: str) -> None:
        try:
            self.written = write_checkpoint(
                self.folder, step, self.snapshot, state, self.topology, self.group, self.retention
            )
        except Exception as error:  # raised by the training's thread at a step boundary
            self.error = error
