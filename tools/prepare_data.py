"""Write a data set that training streams from: images and captions -> latents and embeddings in MDS shards.

    python tools/prepare_data.py out=outputs/demo/data source=digits
    python tools/prepare_data.py out=data/mine source=folder path=photos resolution=1024 codec=qwen_image_vae ...
    torchrun --nproc_per_node 8 tools/prepare_data.py ...        (or srun: any number of processes share the work)

A second call with the same settings finds the finished set and returns at once; one after a kill goes on. docs/data.md.
"""

import os
import sys

from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.settings import list_settings, parse_settings
from piflow_dist.parallel.topology import LAUNCHER_PID, die_with_parent


def main(arguments: list[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(f"{__doc__}\nSettings and their defaults (data_pipeline/prepare_settings.py explains them):")
        print(list_settings(PrepareConfig))
        return 0
    try:
        config = parse_settings(PrepareConfig, arguments)
        description = prepare(config)
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: stopped; the same command goes on from the parts that are finished.", file=sys.stderr)
        return 130
    if description is None:
        print(f"{config.out}: this process has done its share; the one that finishes last publishes the set.")
        return 0
    counts = ", ".join(f"{samples:,} {split}" for split, samples in description.splits.items())
    print(f"{description.root}: {counts}")
    return 0


if __name__ == "__main__":
    if LAUNCHER_PID in os.environ:
        die_with_parent()  # started by another tool
    sys.exit(main(sys.argv[1:]))
