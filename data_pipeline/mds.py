"""Shards of mosaicml-streaming's MDS format as bytes in memory: for reading once through, without its data set or a cache.

A shard: number of rows, then where each row begins and the last one ends (uint32), a header, the rows. A row: the sizes
of its columns of variable size (uint32), then all columns.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.compat import repair_torchvision
from data_pipeline.errors import DataError


def read_shard_entries(index: Path) -> list[dict[str, Any]]:
    """The shards that an index.json lists. Raises DataError where it cannot be read, or lists another format."""
    try:
        shards = json.loads(index.read_text())["shards"]
        for shard in shards:
            if shard["format"] != "mds" or shard["version"] != 2:
                raise DataError(
                    f"{index} lists {shard['format']} shards of version {shard['version']}; mds, 2 is read."
                )
            _ = shard["raw_data"]["basename"], shard["zip_data"], shard["samples"], shard["column_sizes"]
        return shards
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{index} is damaged ({error!r}).") from error


def stored_file(folder: Path, entry: dict[str, Any]) -> Path:
    return folder / (entry["zip_data"] or entry["raw_data"])["basename"]


def read_shard(path: Path, entry: dict[str, Any]) -> bytes:
    """The decompressed shard, after a check of every hash that its index has. Raises DataError naming the file."""
    repair_torchvision()
    from streaming.base.compression import decompress

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Restore the shard.") from error
    _check_hashes(path, data, (entry["zip_data"] or entry["raw_data"])["hashes"])
    if entry["zip_data"]:
        data = decompress(entry["compression"], data)
        _check_hashes(path, data, entry["raw_data"]["hashes"])
    return data


def _check_hashes(path: Path, data: bytes, hashes: dict[str, str]) -> None:
    from streaming.base.hashing import get_hash

    for name, value in hashes.items():
        if get_hash(name, data) != value:
            raise DataError(f"{path} is damaged (its {name} is not the index's). Restore the shard.")


def row_columns(shard: bytes, row: int, entry: dict[str, Any]) -> dict[str, bytes]:
    """The columns of a row as they are stored. Raises ValueError where the row is not whole."""
    at, end = np.frombuffer(shard, np.uint32, count=2, offset=4 * (1 + row)).tolist()
    sizes = []
    for fixed in entry["column_sizes"]:
        if not fixed:
            (fixed,) = np.frombuffer(shard, np.uint32, count=1, offset=at).tolist()
            at += 4
        sizes.append(fixed)
    if at + sum(sizes) != end or end > len(shard):
        raise ValueError("its columns do not fill it")
    columns = {}
    for name, size in zip(entry["column_names"], sizes, strict=True):
        columns[name] = shard[at : at + size]
        at += size
    return columns


def decode_row(shard: bytes, row: int, entry: dict[str, Any]) -> dict[str, Any]:
    """The values of a row. Raises ValueError where it cannot be decoded, or has a column of pickles."""
    repair_torchvision()
    from streaming.base.format.mds.encodings import is_mds_encoding_safe, mds_decode

    columns = row_columns(shard, row, entry)
    values = {}
    for name, encoding in zip(entry["column_names"], entry["column_encodings"], strict=True):
        if not is_mds_encoding_safe(encoding):
            raise ValueError(f"column {name!r} is of kind {encoding!r}, which is not read from files of others")
        values[name] = mds_decode(encoding, columns[name])
    return values
