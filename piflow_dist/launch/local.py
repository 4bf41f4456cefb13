"""Run a module in N processes of this machine (torch's elastic agent): logs per rank, all ended when one fails."""

import importlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from piflow_dist.config import ConfigError, LaunchConfig
from piflow_dist.launch.failure_record import failure_path, read_failure
from piflow_dist.launch.failures import tells_of_lost_partner
from piflow_dist.parallel.topology import LAUNCHER_PID

KILLED = [-number for number in signal.Signals if number != signal.SIGTERM]
"""Exit codes of processes that died of something else than the agent's SIGTERM."""


class WorkerFailed(RuntimeError):
    """A worker process ended with an error; the message names rank, exit code and log."""


def default_threads(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def check_port(port: int) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"launch.port={port} cannot be used: {error.strerror}. Choose another one, or launch.port=0 for a free one."
            ) from error


def check_devices(launch: LaunchConfig) -> None:
    if launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available()):
        found = torch.cuda.device_count()
        if launch.processes > found:
            fewer = f"Set launch.processes to at most {found}, or" if found else "Set"
            raise ConfigError(
                f"launch.processes={launch.processes} with launch.device={launch.device}, but this machine has {found} GPUs. "
                f"{fewer} launch.device=cpu."
            )


def run_workers(module: str, arguments: list[str], launch: LaunchConfig, log_dir: Path) -> None:
    """Run `python -m module *arguments` in launch.processes processes and wait.

    Rank 0 keeps this terminal, the other ranks write to log_dir. Raises WorkerFailed where one fails (the others are ended
    first) and KeyboardInterrupt on Ctrl-C or SIGTERM, again with all workers ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
    from torch.distributed.launcher.api import elastic_launch

    check_port(launch.port)
    check_devices(launch)
    log_dir.mkdir(parents=True, exist_ok=True)
    failure_path(log_dir.parent).unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(launch.threads or default_threads(launch.processes))
    # Libraries tell users what their own authors should change; -W or PYTHONWARNINGS brings it back.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    os.environ[LAUNCHER_PID] = str(os.getpid())
    config = ElasticConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=launch.processes,
        run_id=f"piflow_{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{launch.port}",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=launch.warning_seconds,  # after SIGTERM or Ctrl-C: a step and a save may take minutes
        start_method="fork",  # of launch.start=fork; fresh interpreters are started otherwise
        monitor_interval=0.2,
        # Ctrl-C is left to Python: the agent would pass SIGINT on, which workers ignore, and wait half a minute for them.
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(log_dir), redirects={rank: Std.ALL for rank in range(1, launch.processes)}
        ),
    )
    try:
        if launch.start == "fork":
            elastic_launch(config, run_forked)(module, arguments)
        else:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as failure:
        raise WorkerFailed(describe(failure, log_dir)) from failure
    except SignalException as stop:
        raise KeyboardInterrupt(signal.Signals(stop.sigval).name) from stop
    finally:
        os.environ.pop(LAUNCHER_PID, None)


def run_forked(module: str, arguments: list[str]) -> None:
    """`python -m module *arguments` in a copy of the launcher: its imports stay, its answers to signals do not."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which OpenMP read when the launcher was loaded
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def first_of(failure: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """The process that failed by itself. On a loaded machine all may be found dead together, and the agent ends the others by SIGTERM."""
    found = list(failure.failures.items())
    killed = [(rank, each) for rank, each in found if each.exitcode in KILLED]
    raised = [(rank, each) for rank, each in found if each.exitcode > 0 and not tells_of_lost_partner(message_of(each))]
    ended = [(rank, each) for rank, each in found if each.exitcode < 0]
    for own in (killed, raised, ended):
        if own:
            return min(own, key=lambda entry: entry[1].timestamp)
    return failure.get_first_failure()


def message_of(failure: "ProcessFailure") -> str:
    """ "TypeName: text" of a recorded exception, empty where there is none."""
    if not failure.error_file_data:
        return ""
    return failure.message if isinstance(failure.message, str) else failure.message.get("message", "")


def describe(failure: "ChildFailedError", log_dir: Path) -> str:
    known = read_failure(log_dir.parent)
    rank, first = first_of(failure)
    # A process that was killed takes the others with it, and says nothing itself.
    if known is not None and first.exitcode not in KILLED:
        where = f" in step {known.step}, {known.phase}" if known.step else f" before the first step ({known.phase})"
        return (
            f"Process {known.rank} failed{where if known.phase else ''}; the other processes were ended too. Logs: {log_dir}.\n"
            f"{known.reason}"
        )
    if first.exitcode < 0:
        cause = f"was ended by {signal.Signals(-first.exitcode).name}"
    else:
        cause = f"ended with exit code {first.exitcode}"
    # Only a recorded exception says more than the exit code does.
    reason = f"\n{message}" if (message := message_of(first)) else ""
    return f"Process {rank} {cause}; the other processes were ended too. Logs: {log_dir}.{reason}"
