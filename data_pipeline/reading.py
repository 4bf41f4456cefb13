"""Items -> screened samples: bytes from files, archives and MDS rows, without extracting or unpickling anything."""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.items import Item, Span
from data_pipeline.mds import read_shard, read_shard_entries, row_columns, stored_file
from data_pipeline.screen import Limits, Unusable, screen_caption, screen_image

SHARDS_IN_MEMORY = 2
CAPTION_BYTES = 1 << 20
"""Of a caption file; a caption is cut to far less."""


@dataclass(frozen=True)
class ReadSample:
    key: str
    caption: str
    encoded: bytes
    """One image file that DALI decodes; empty in sets of prompts only."""
    size: tuple[int, int] | None
    """(h, w) of the upright image"""
    notes: tuple[str, ...]
    """What had to be changed."""


class SampleReader:
    """May be used by several threads at once."""

    def __init__(self, limits: Limits, image_column: str, caption_column: str):
        self._limits = limits
        self._image_column, self._caption_column = image_column, caption_column
        self._shards = _ShardRows()

    def read(self, item: Item) -> ReadSample | Unusable:
        try:
            caption, note = screen_caption(self._caption(item), self._limits)
            if item.image is None:
                return ReadSample(item.key, caption, b"", None, (note,) if note else ())
            image = screen_image(self._bytes(item.image, self._image_column), self._limits)
            notes = tuple(name for name in (note, image.note) if name)
            return ReadSample(item.key, caption, image.encoded, image.size, notes)
        except Unusable as fault:
            return fault

    def read_caption(self, item: Item) -> str | None:
        """The caption as `read` gives it, or None where it is not usable."""
        try:
            return screen_caption(self._caption(item), self._limits)[0]
        except Unusable:
            return None

    def _caption(self, item: Item) -> str | bytes | None:
        if item.caption_at is None:
            return item.caption
        data = self._bytes(item.caption_at, self._caption_column, limit=CAPTION_BYTES)
        if item.caption_field is None:
            return data
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unusable("caption file is not JSON", str(error)) from error
        caption = value.get(item.caption_field) if isinstance(value, dict) else None
        if not isinstance(caption, str):
            raise Unusable("no caption", f"no text in field {item.caption_field!r}")
        return caption

    def _bytes(self, span: Span, column: str, limit: int | None = None) -> bytes:
        if span.row is not None:
            return self._shards.column(Path(span.path), span.row, column)
        limit = self._limits.max_file_bytes + 1 if limit is None else limit
        try:
            with open(span.path, "rb") as file:
                file.seek(span.offset)
                return file.read(limit if span.size is None else min(span.size, limit))
        except OSError as error:
            raise Unusable("file cannot be read", error.strerror or str(error)) from error


class _ShardRows:
    """Columns of MDS rows as stored bytes; the last shards stay in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[Path, dict[str, Any]] = {}
        self._loaded: OrderedDict[Path, bytes] = OrderedDict()

    def column(self, path: Path, row: int, column: str) -> bytes:
        with self._lock:
            entry, shard = self._open(path)
        try:
            return row_columns(shard, row, entry)[column]
        except ValueError as error:
            raise DataError(f"{path}, row {row}: cannot be read ({error}). Restore the shard.") from error

    def _open(self, path: Path) -> tuple[dict[str, Any], bytes]:
        if path not in self._entries:
            self._entries |= {
                stored_file(path.parent, entry): entry for entry in read_shard_entries(path.parent / "index.json")
            }
        if path in self._loaded:
            self._loaded.move_to_end(path)
        else:
            self._loaded[path] = read_shard(path, self._entries[path])
            while len(self._loaded) > SHARDS_IN_MEMORY:
                self._loaded.popitem(last=False)
        return self._entries[path], self._loaded[path]
