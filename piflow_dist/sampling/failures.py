"""Images that cannot be made: each rank keeps a list of its own, which the finished folder joins as failures.jsonl."""

import json
from pathlib import Path
from typing import Any

from piflow_dist.sampling.images import ImageRequest

FOLDER = "failures"


class FailureLog:
    """One JSON line per image, in a file that no other rank writes."""

    def __init__(self, out: Path, rank: int):
        self.path = out / FOLDER / f"rank_{rank:05d}.jsonl"

    def add(self, images: list[ImageRequest], reason: str) -> None:
        with open(self.path, "a") as file:
            for image in images:
                line = {
                    "index": image.index,
                    "prompt_index": image.prompt_index,
                    "seed": image.seed,
                    "prompt": image.prompt,
                }
                file.write(json.dumps({**line, "reason": reason}) + "\n")


def read_failures(out: Path) -> list[dict[str, Any]]:
    """Of all ranks, in the order of images. A tensor-parallel group's ranks say the same thing once: rank 0 of it writes."""
    lines = [line for path in (out / FOLDER).glob("rank_*.jsonl") for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda line: line["index"])
