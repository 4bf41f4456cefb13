"""What every check of a configuration says, and how."""

import math
from pathlib import Path
from typing import Any

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the value, the reason and the option to change."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{option}={value} is not known. Choose one of: {', '.join(choices)}.")


def require_positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), f"{prefix}.{name}={value} must be a number greater than zero.")


def require_interval(option: str, interval: list[float]) -> None:
    """Of noise levels."""
    require(len(interval) == 2, f"{option}={list(interval)} must be two numbers.")
    low, high = interval
    require(0 <= low < high <= 1, f"{option}={list(interval)} is not an interval inside [0, 1].")
