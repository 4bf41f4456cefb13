"""What a save is doing, told and stretched for tools that kill processes inside it; an ordinary run does neither.

PIFLOW_SAVE_PHASES=FOLDER: each rank keeps "PID STEP PHASE" in FOLDER/rank_N.
PIFLOW_SAVE_DELAY=SECONDS: each phase lasts so much longer, in the middle of what it does where it has one.
"""

import os
import time
from pathlib import Path

PHASES = ("snapshot", "write", "fsync", "manifest", "rename", "latest", "retention")
FOLDER_VARIABLE, DELAY_VARIABLE = "PIFLOW_SAVE_PHASES", "PIFLOW_SAVE_DELAY"


def enter(phase: str, step: int, rank: int) -> None:
    if folder := os.environ.get(FOLDER_VARIABLE):
        Path(folder, f"rank_{rank}").write_text(f"{os.getpid()} {step} {phase}")
    if delay := os.environ.get(DELAY_VARIABLE):
        time.sleep(float(delay))
