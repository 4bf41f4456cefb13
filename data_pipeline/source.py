"""What a source of raw images and captions looks like to `prepare`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class RawSample:
    key: str
    """Names the sample in logs, errors and shards; unique within a source."""
    caption: str
    encoded: bytes
    """One image file: JPEG, PNG or whatever else DALI decodes."""


class Source(Protocol):
    splits: tuple[str, ...]
    """The first one is the split that statistics such as the latent scale are taken from."""

    def count(self, split: str) -> int: ...

    def samples(self, split: str) -> Iterator[RawSample]:
        """The split's samples, in the same order every time."""
        ...

    def captions(self) -> list[str]:
        """Every distinct caption of all splits, sorted."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where the samples come from, with a hash of their content; plain JSON."""
        ...
