"""From command lines and files to checked configurations, and back."""

import dataclasses
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config.checks import CONFIG_DIR, ConfigError, require
from piflow_dist.config.run import Config


def load_config(overrides: list[str], schema: type = Config, name: str = "train") -> Any:
    """Compose configs/<name>.yaml with Hydra overrides into a checked `schema` object.

    Raises ConfigError with a message for people where a key is unknown or a value cannot work.
    """
    chosen = next((override for override in overrides if override.startswith("cluster=")), None)
    require(chosen is None, f"{chosen}: runs have no cluster unless one is added. Write +{chosen}.")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            composed = compose(name, overrides=list(overrides))
        missing = sorted(OmegaConf.missing_keys(composed))
        hint = " Choose a run with experiment=NAME, or" if name == "train" else ""
        adding = f"{'add' if hint else 'Add'} {' '.join(f'{key}=VALUE' for key in missing)}"
        require(not missing, f"No value for {', '.join(missing)}.{hint} {adding}.")
        return OmegaConf.to_object(composed)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's answer to group=null
        raise ConfigError(explain(error, OmegaConf.structured(schema))) from error


def explain(error: Exception, structured: Any) -> str:
    """Hydra's message, and what exists at the place where it looked."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = first_line(cause).rstrip(".")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group = Path(str(error.missing_cfg_file)).parent
        return f"{text}. Choose one of: {', '.join(sorted(path.stem for path in (CONFIG_DIR / group).glob('*.yaml')))}."
    key = getattr(cause, "full_key", None)
    if not key or not isinstance(key, str):  # a number: a place in a list
        return f"{text}."
    parent = OmegaConf.select(structured, key.rpartition(".")[0]) if "." in key else structured
    names = ", ".join(str(name) for name in parent) if isinstance(parent, DictConfig) else ""
    return f"{key}: {text}." + (f" Keys there: {names}." if names else "")


def save_config(config: Any, path: Path) -> None:
    """Write a resolved configuration; a reader sees the old file or the new one."""
    write_atomic(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_config(path: Path, schema: type = Config) -> Any:
    """The resolved configuration that a run saved. Raises ConfigError where the file cannot be read as one."""
    try:
        return config_from(OmegaConf.load(path), schema)
    except (OSError, YAMLError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read as saved settings: {first_line(error)}") from error


def config_from(values: Any, schema: type = Config) -> Any:
    """Plain nested values, as saved, -> a checked configuration. Raises ConfigError where they are not one."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(first_line(error)) from error


def config_values(config: Any) -> dict[str, Any]:
    """The configuration as plain nested values, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def changed_keys(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every value that differs between two configurations."""
    changed = {}
    for item in dataclasses.fields(new):
        before, after, key = getattr(old, item.name), getattr(new, item.name), prefix + item.name
        if dataclasses.is_dataclass(after) and dataclasses.is_dataclass(before):
            changed |= changed_keys(before, after, key + ".")
        elif before != after:
            changed[key] = (before, after)
    return changed


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
