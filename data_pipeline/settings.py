"""key=value arguments -> a typed dataclass."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")


def parse_settings(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """Raises ValueError naming the argument that is unknown, missing or of the wrong type, and the keys there are."""
    known = [field.name for field in dataclasses.fields(config_class)]
    settings = OmegaConf.structured(config_class)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not of the form key=value. Keys: {', '.join(known)}.")
        if key not in known:
            raise ValueError(f"Unknown key {key!r}. Keys: {', '.join(known)}.")
        try:
            settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([argument]))
        except OmegaConfBaseException as error:
            raise ValueError(f"{argument}: {str(error).splitlines()[0]}.") from error
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing:
        raise ValueError(f"{missing[0]}=... is needed. Keys: {', '.join(known)}.")
    return OmegaConf.to_object(settings)


def list_settings(config_class: type) -> str:
    """One line per key with its default, for --help."""
    lines = []
    for field in dataclasses.fields(config_class):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "(needed)" if value == MISSING else f"{value}"
        lines.append(f"  {field.name}={default}")
    return "\n".join(lines)
