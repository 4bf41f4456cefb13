"""What a training ran with, as files that go to MLflow: settings, package versions, what the code differs by from its commit."""

import subprocess
from importlib.metadata import distributions
from pathlib import Path

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.tracking.journal import TRACKING, post_artifact
from piflow_dist.tracking.secrets import mask

ROOT = Path(__file__).resolve().parents[2]
PATCH_BYTES = 1 << 20


def write_description(run_dir: Path) -> None:
    """Written to RUN/tracking and posted; an earlier start's is replaced."""
    folder = run_dir / TRACKING
    versions = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}, key=str.lower)
    write_atomic(folder / "packages.txt", "\n".join(versions) + "\n")
    write_atomic(folder / "code.patch", mask(code_patch()))
    post_artifact(run_dir, run_dir / "config.yaml")
    for name in ("packages.txt", "code.patch"):
        post_artifact(run_dir, folder / name, "environment")


def code_patch() -> str:
    """Commit, remote, and `git diff HEAD`; a sentence where there is no checkout."""
    if not (ROOT / ".git").exists():
        return "# The package was not run from a git checkout.\n"
    try:
        commit, remote, patch = git("rev-parse", "HEAD"), git("remote", "-v"), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError) as error:  # no git, or a checkout of somebody else's
        return f"# git does not answer: {error}\n"
    if len(patch) > PATCH_BYTES:
        patch = patch[:PATCH_BYTES] + f"\n# cut: the difference has {len(patch):,} characters\n"
    header = "".join(f"# {line}\n" for line in [f"commit {commit.strip()}", *remote.splitlines()])
    return header + (patch or "# nothing differs from this commit\n")


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True).stdout
