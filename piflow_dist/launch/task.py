"""A task of a batch job: piflow_dist.train, with signals held from the start.

python -m piflow_dist.launch.task CONFIG.yaml         from slurm/common.sh
python -m piflow_dist.launch.task --submitit FOLDER   from the scripts of tools/launch.py: what submitit has left there to be run
"""

import os
import sys
from typing import NoReturn

from piflow_dist.launch.signals import hold


def main(*arguments: str) -> None:
    """Ends with the exit code of the training (launch/exits.py)."""
    # Before any import that takes time: a signal's default is to end the process, and a time limit's warning comes once.
    hold()
    if arguments[0] == "--submitit":
        from submitit.core.submission import submitit_main

        sys.argv = [sys.argv[0], *arguments[1:]]
        submitit_main()  # calls launch.slurm.Training
    else:
        train(*arguments)


def train(config_file: str) -> NoReturn:
    from piflow_dist.train import main

    code = main(config_file)
    sys.stdout.flush()
    sys.stderr.flush()
    # The first task that ends with a code makes srun send SIGTERM to the others, and an interpreter that is being taken down dies
    # of it: a stop with a checkpoint would then look like a failure.
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
