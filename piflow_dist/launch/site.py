"""The site file: what a cluster's users must know about it, for batch scripts and for tools/launch.py alike."""

import os
import subprocess
from pathlib import Path

from piflow_dist.config import CONFIG_DIR, ConfigError

SITE = "PIFLOW_SITE"


def site_file() -> Path | None:
    """The file that slurm/common.sh would source. Raises ConfigError where PIFLOW_SITE names one that is not there."""
    named = os.environ.get(SITE)
    if not named:
        default = CONFIG_DIR / "site" / "site.sh"
        return default if default.exists() else None
    path = Path(named) if "/" in named else CONFIG_DIR / "site" / f"{named}.sh"
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in (CONFIG_DIR / "site").glob("*.sh")))
        raise ConfigError(f"{SITE}={named}: there is no {path}. Choose one of: {known}; or give a path with a slash.")
    return path.resolve()


def load_site() -> None:
    """Take over what the site file sets into this process's environment, as bash understands it."""
    path = site_file()
    if path is None:
        return
    script = 'env -0; printf "%s\\0" "$1"; set -ae; source "$1" > /dev/null; env -0'
    done = subprocess.run(["bash", "-c", script, "bash", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(f"{path} cannot be sourced: {done.stderr.strip()}")
    words = done.stdout.split("\0")
    before, after = words[: words.index(str(path))], words[words.index(str(path)) + 1 :]
    changed = (word.partition("=")[::2] for word in set(after) - set(before) if "=" in word)
    os.environ |= {name: value for name, value in changed if not name.startswith("BASH_FUNC_")}
    os.environ[SITE] = str(path)  # jobs find it wherever they start
