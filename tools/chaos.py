"""Kill and continue: python tools/chaos.py kills=30 [seed=0 scenarios=[data-tied,datafree-full] worlds=[2,3] key=value ...].

Trains tiny students on a data set of its own, kills ranks and the launcher with SIGKILL at random moments, also inside saves, and
compares every logged loss and gradient norm and the last weights with the same training left in peace. Exit code 0: no difference.
"""

import os
import sys

# Before torch is loaded: a process that is forked must have no threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from piflow_dist.cli import fail, run_tool  # noqa: E402
from piflow_dist.config import load_config  # noqa: E402
from piflow_dist.help import explain_keys  # noqa: E402
from piflow_dist.launch.chaos import Chaos, ChaosConfig, print_summary  # noqa: E402


def chaos(overrides: list[str]) -> None:
    tally = Chaos(load_config(overrides, ChaosConfig, "chaos")).run()
    print_summary(tally)
    if not tally.clean:
        fail("error: a training that was killed and continued is not the one that was left in peace.", 1)


if __name__ == "__main__":
    run_tool(chaos, sys.argv[1:], f"{__doc__}\nKeys and defaults:\n{explain_keys(ChaosConfig)}")
