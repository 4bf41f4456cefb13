"""Several trainings from one command, in Hydra's notation: -m policy=gmflow,dx optim.lr=1e-4,3e-4."""

from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from piflow_dist.config import ConfigError, first_line, load_config, require

FLAGS = {"-m", "--multirun"}


def expand(arguments: list[str]) -> list[list[str]]:
    """The overrides of each training. Those of a sweep are in folders of the run_dir that the command alone would have.

    Raises ConfigError where -m comes without a value that is a list, or with one that cannot be read.
    """
    words = [word for word in arguments if word not in FLAGS]
    if len(words) == len(arguments):
        return [arguments]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
        (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(f"-m: {first_line(error)}.") from error
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    require(bool(swept), "-m trains combinations, but no key has several values. Write, for example, policy=gmflow,dx.")
    base = Path(load_config(list(batch[0])).run_dir)
    runs = []
    for run in batch:
        # By key: the sweeper keeps a key that was given twice at the place of the first.
        chosen = [word for key in swept for word in run if word.partition("=")[0] == key]
        name = ",".join(word.lstrip("+") for word in chosen).replace("/", "_")
        runs.append([*run, f"run_dir={quote(str(base / name))}", f"tracking.sweep={quote(str(base.resolve()))}"])
    return runs


def quote(value: str) -> str:
    """A value with any characters, for Hydra's grammar."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
