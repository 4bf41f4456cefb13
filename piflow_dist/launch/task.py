"""A task of a batch job: piflow_dist.train, with signals held from the start.

python -m piflow_dist.launch.task CONFIG.yaml         from slurm/common.sh
python -m piflow_dist.launch.task --submitit FOLDER   from the scripts of tools/launch.py: what submitit has left there to be run
"""

import sys

from piflow_dist.launch.signals import hold


def main(*arguments: str) -> int:
    """The exit code of the training (launch/exits.py)."""
    # Before any import that takes time: a signal's default is to end the process, and a time limit's warning comes once.
    hold()
    if arguments[0] == "--submitit":
        from submitit.core.submission import submitit_main

        sys.argv = [sys.argv[0], *arguments[1:]]
        submitit_main()  # ends in launch.slurm.Training, which exits
    from piflow_dist.train import main as train

    return train(*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
