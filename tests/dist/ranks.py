"""Functions run as N processes of one gloo group on this machine's CPU, for tests of what ranks do together."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

WARM = "warm"
GRACE = 3.0
"""Seconds in which the other ranks may still report their own tracebacks after the first failure."""


class RanksFailed(AssertionError):
    """Some ranks failed or did not finish; the message holds what each of them said."""


def run_ranks(
    check: Callable[..., Any], world_size: int, *args: Any, time_limit: float = 120.0, warm: bool = True
) -> list[Any]:
    """Run check(rank, *args) in world_size new processes joined to one gloo group; what each rank returned.

    `check` must be importable (a function of a module). RANK and its companions are set as torchrun sets them, but for the
    address: ranks meet in a file of this call, as a port could be taken by another test run. A rank that fails stops the others
    at once; RanksFailed then holds the traceback of every rank that raised. Nothing of a run outlives this call, whatever happens.

    warm: fork the ranks from a server that has done the imports (warm.py), seconds less each. Their memory is then not all
    their own, which matters where it is measured, and variables that a library reads when it is loaded are those of the first call.
    """
    context = warm_context() if warm else multiprocessing.get_context("spawn")
    ranks, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        try:
            with one_thread():
                for rank in range(world_size):
                    receiver, sender = context.Pipe(duplex=False)
                    arguments = (
                        sender,
                        check,
                        rank,
                        world_size,
                        f"file://{folder}/store",
                        warm,
                        dict(os.environ),
                        args,
                    )
                    process = context.Process(target=_main, args=arguments, daemon=True)
                    process.start()
                    sender.close()
                    ranks.append(process)
                    pipes.append(receiver)
            return _collect(ranks, pipes, time_limit)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


def warm_context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WARM])
    before = os.environ.get("PYTHONPATH")
    # The server does not get this process's sys.path, and passes over what it cannot import.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        with one_thread():
            forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


@contextmanager
def one_thread() -> Iterator[None]:
    """Processes started inside use one thread each: OpenMP reads its environment when it is loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _main(
    sender: Connection,
    check: Callable[..., Any],
    rank: int,
    world_size: int,
    meeting: str,
    warm: bool,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",
    }
    try:
        assert not warm or WARM in sys.modules, "the server has not done the imports"
        torch.set_num_threads(1)
        dist.init_process_group("gloo", meeting, timedelta(seconds=600), world_size, rank)
        result = check(rank, *args)
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    sender.send((True, result))
    dist.barrier()  # none closes its connections while another may still read from them
    dist.destroy_process_group()


def _collect(ranks: list, pipes: list[Connection], time_limit: float) -> list[Any]:
    """Results by rank, or RanksFailed as soon as one failed (after GRACE) or the time is up."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    deadline = time.monotonic() + time_limit
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting.values()), timeout=0.1):
            rank = pipes.index(pipe)
            del waiting[rank]
            try:
                fine, value = pipe.recv()
            except EOFError:
                ranks[rank].join(timeout=GRACE)
                fine, value = False, f"ended without a word, exit code {ranks[rank].exitcode}"
            (results if fine else failures)[rank] = value
            if not fine and len(failures) == 1:
                deadline = min(deadline, time.monotonic() + GRACE)
    if failures or waiting:
        unfinished = "was stopped" if failures else f"did not finish within {time_limit:g} s"
        said = [f"rank {rank}: {failures.get(rank, unfinished)}" for rank in range(len(ranks)) if rank not in results]
        raise RanksFailed("\n\n".join(said))
    return [results[rank] for rank in range(len(ranks))]
