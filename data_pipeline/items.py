"""Where a sample's image and caption lie, as one line of JSON: a preparation is planned in these and worked off in parts."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """A whole file, or bytes inside one."""

    path: str
    offset: int = 0
    size: int | None = None
    """None: up to the end of the file."""
    row: int | None = None
    """Of the MDS shard `path`, which may be compressed; offset and size then mean nothing."""


@dataclass(frozen=True)
class Item:
    """A sample before it is read."""

    key: str
    """Names the sample in logs, errors and shards; unique within a source."""
    image: Span | None = None
    """None in sets of prompts only."""
    caption: str | None = None
    caption_at: Span | None = None
    """Read instead of `caption` where given: a UTF-8 text, or a JSON object with the field `caption_field`."""
    caption_field: str | None = None


def write_items(path: Path, items: Iterable[Item]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for item in items:
            lines.write(json.dumps(asdict(item)) + "\n")  # ASCII: lone surrogates of strange file names survive


def read_items(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            for name in ("image", "caption_at"):
                if values[name] is not None:
                    values[name] = Span(**values[name])
            yield Item(**values)
