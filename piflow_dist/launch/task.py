"""A task of a batch job: `python -m piflow_dist.launch.task CONFIG.yaml` is piflow_dist.train, with signals held from the start."""

import sys

from piflow_dist.launch.signals import hold


def main(config_file: str) -> int:
    """A training; its exit code (launch/exits.py)."""
    hold()
    from piflow_dist.train import main as train

    return train(config_file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
