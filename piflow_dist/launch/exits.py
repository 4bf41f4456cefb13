"""Exit codes of training processes and their launchers."""

FINISHED = 0
FAILED = 1
"""A process raised, was killed, or lost another one."""
REFUSED = 2
"""The request cannot work; trying again would not help."""
HUNG = 70
"""The watchdog ended a process that made no progress."""
STOPPED = 75
"""Stopped by a signal, with a checkpoint of the last step: to be continued."""
STOPPED_AT_ONCE = 76
"""Stopped by a second signal or for lack of time: to be continued from the newest checkpoint."""
GAVE_UP = 78
"""Failed at the same step too often."""
INTERRUPTED = 130

CONTINUED = (STOPPED, STOPPED_AT_ONCE)
