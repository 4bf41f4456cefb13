"""Which checkpoint came from which: RUN/tracking/lineage.json, also of those that retention has removed since."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from piflow_dist.checkpoint.files import (
    MANIFEST,
    STATE,
    CheckpointError,
    read_json,
    step_name,
    steps_on_disk,
    write_atomic,
)
from piflow_dist.tracking.journal import TRACKING, post_artifact


def write_lineage(run_dir: Path) -> None:
    """Bring the file up to what is on disk, and post it where something has changed."""
    path, folder = run_dir / TRACKING / "lineage.json", run_dir / "checkpoints"
    before = json.loads(path.read_text()) if path.exists() else []
    known = {(entry["path"], entry["written"]): entry for entry in before}
    found = {}
    for step in steps_on_disk(folder):
        entry = describe(folder / step_name(step))
        if entry is not None:
            found[entry["path"], entry["written"]] = entry
    removed = {key: entry | {"on_disk": False} for key, entry in known.items() if key not in found}
    entries = sorted((removed | found).values(), key=lambda entry: (entry["written"], entry["step"]))
    if entries != before:
        write_atomic(path, json.dumps(entries, indent=1) + "\n")
        post_artifact(run_dir, path)


def describe(checkpoint: Path) -> dict[str, Any] | None:
    """None for one that is being removed, or damaged."""
    try:
        state = read_json(checkpoint / STATE)
        written = datetime.fromtimestamp((checkpoint / MANIFEST).stat().st_mtime, UTC).isoformat(
            timespec="milliseconds"
        )
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
    except (CheckpointError, OSError):
        return None
    return {
        "step": state["step"],
        "path": str(checkpoint.resolve()),
        "on_disk": True,
        "written": written,
        "bytes": size,
        "processes": f"dp {state['dp_size']} x tp {state['tp']}",
        "parent": state.get("parent"),
        "started_from": state.get("started_from"),
        "code": state.get("code"),
        "metrics": state.get("metrics", {}),
    }
