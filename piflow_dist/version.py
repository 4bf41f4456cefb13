"""Which code this is, for the record of what it made."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def code_version() -> str:
    """The package's version and, in a git checkout, its commit ("+" where files differ from it)."""
    try:
        name = version("piflow_dist")
    except PackageNotFoundError:  # run from a folder that was not installed
        name = "not installed"
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return name
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else's
        return name
    return f"{name} {commit}"
