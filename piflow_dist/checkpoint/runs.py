"""Run folders: their newest checkpoint, and the configuration that wrote it."""

from pathlib import Path

from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.config import Config, ConfigError, read_config, require


def resolve_checkpoint(source: str, option: str) -> Path:
    """A checkpoint folder, or the newest complete checkpoint of a run folder."""
    path = Path(source)
    if (path / "manifest.json").is_file():
        return path
    require(path.is_dir(), f"{option}={source} does not exist. Give a run folder or a checkpoint folder.")
    checkpoint, problems = newest_complete(path / "checkpoints")
    detail = " ".join(problems)
    require(
        checkpoint is not None, f"{option}={source} has no complete checkpoint under {path / 'checkpoints'}. {detail}"
    )
    return checkpoint


def read_run_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote a checkpoint."""
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {checkpoint} does not lie in a run folder (RUN/checkpoints/step_N).")
    return read_config(path)
