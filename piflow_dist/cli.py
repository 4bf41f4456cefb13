"""How every tool ends: help, a message for people instead of a traceback, and an exit code that scripts can read."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.settings import parse_settings
from piflow_dist.checkpoint.files import CheckpointError
from piflow_dist.config import ConfigError
from piflow_dist.launch.local import WorkerFailed
from piflow_dist.parallel.topology import LAUNCHER_PID, die_with_parent
from piflow_dist.tracking.secrets import mask

Options = TypeVar("Options")


def run_tool(tool: Callable[[list[str]], None], arguments: list[str], usage: str) -> None:
    """Exit codes: 0 done, 1 a process failed, 2 the request cannot work, 130 interrupted."""
    if {"-h", "--help"} & set(arguments):
        print(usage)
        return
    if LAUNCHER_PID in os.environ:
        die_with_parent()  # started by another tool
        del os.environ[LAUNCHER_PID]  # what this one starts has another launcher
    try:
        tool(arguments)
    except ConfigError as error:
        fail(f"error: {error}", 2)
    except (WorkerFailed, CheckpointError) as error:
        fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        fail("Stopped. The same command goes on from what is finished.", 130)


def parse_options(options_class: type[Options], arguments: list[str]) -> Options:
    """key=value arguments -> a checked dataclass. Raises ConfigError."""
    try:
        return parse_settings(options_class, arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fail(message: str, code: int) -> None:
    print(f"\n{mask(message)}", file=sys.stderr)
    sys.exit(code)
