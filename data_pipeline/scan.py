"""Sources on disk -> items, in an order that depends on names and rows alone. Nothing here opens an image."""

import csv
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.items import Item, Span
from data_pipeline.mds import read_shard_entries

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PROMPT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def scan(
    source: str,
    path: Path,
    image_root: Path | None,
    image_column: str,
    caption_column: str,
    captions: str = "beside",
) -> Iterator[Item]:
    """The items of a source of `prepare`. Raises DataError where the source itself (not a sample of it) is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"path={path} does not exist (source={source}).")
    match source:
        case "folder":
            return scan_classes(path) if captions == "folders" else scan_folder(path, caption_column)
        case "table":
            return scan_table(path, image_root or path.parent, image_column, caption_column)
        case "webdataset":
            return scan_webdataset(path, caption_column)
        case "mds":
            return scan_mds(path, image_column, caption_column)
        case "prompts":
            return scan_prompts(path, caption_column)
        case unknown:
            raise ValueError(f"source={unknown} cannot be scanned.")


def scan_folder(folder: Path, caption_field: str) -> Iterator[Item]:
    """Images below `folder`, each with NAME.txt, or NAME.json that has the field `caption_field`, beside it."""
    if not folder.is_dir():
        raise NotADirectoryError(f"path={folder} is not a folder. Use source=table for a list of images.")
    for path in _walk(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        text, record = path.with_suffix(".txt"), path.with_suffix(".json")
        caption_at, field = None, None
        if text.is_file():
            caption_at = Span(str(text))
        elif record.is_file():
            caption_at, field = Span(str(record)), caption_field
        key = path.relative_to(folder).as_posix()
        # The size is part of the plan's digest: a file that is replaced while a preparation goes on is noticed.
        yield Item(key, Span(str(path), size=path.stat().st_size), caption_at=caption_at, caption_field=field)


def scan_classes(folder: Path) -> Iterator[Item]:
    """Images in subfolders: the caption is the name of the one below `folder`. (ImageNet's train/n01440764/x.JPEG)"""
    if not folder.is_dir():
        raise NotADirectoryError(f"path={folder} is not a folder of class folders.")
    for path in _walk(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        key = path.relative_to(folder)
        if len(key.parts) == 1:
            raise DataError(
                f"{path} is in no class folder. With captions=folders every image is in one below {folder}."
            )
        yield Item(key.as_posix(), Span(str(path), size=path.stat().st_size), caption=key.parts[0])


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, a folder's own before its subfolders', by name; hidden ones and linked folders left out."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    yield from (path for path in entries if path.is_file())
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def scan_table(path: Path, image_root: Path, image_column: str, caption_column: str) -> Iterator[Item]:
    """Rows of a csv, tsv, jsonl or parquet file: a path below `image_root`, and a caption.

    A path that comes again (several captions of one image) has its number behind a # in the key.
    """
    seen: dict[str, int] = {}
    root = image_root.resolve()
    for number, row in read_table(path, (image_column, caption_column)):
        name = row[image_column]
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}, row {number}: column {image_column!r} holds {name!r}, not the path of an image.")
        if not (root / name).resolve().is_relative_to(root):
            raise DataError(
                f"{path}, row {number}: {name!r} lies outside of {image_root}. Set image_root to its folder."
            )
        seen[name] = seen.get(name, 0) + 1
        key = name if seen[name] == 1 else f"{name}#{seen[name]}"
        yield Item(key, Span(str(image_root / name)), caption=_text_or_none(row[caption_column]))


def scan_prompts(path: Path, caption_column: str) -> Iterator[Item]:
    """One prompt per line of a text file, or per row of a jsonl or parquet file. The key is the row's number."""
    match path.suffix.lower():
        case ".txt":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        prompt = line.decode("utf-8").strip()
                    except UnicodeDecodeError as error:
                        raise DataError(f"{path}, line {number}: is not UTF-8 ({error.reason}).") from error
                    if prompt:  # an empty line ends many a file; it is no prompt
                        yield Item(f"{number:09d}", caption=prompt)
        case ".jsonl" | ".parquet":
            for number, row in read_table(path, (caption_column,)):
                yield Item(f"{number:09d}", caption=_text_or_none(row[caption_column]))
        case suffix:
            raise ValueError(f"path={path}: prompts are read from {', '.join(PROMPT_SUFFIXES)}, not {suffix!r}.")


def read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, the named columns), one row at a time."""
    suffix = path.suffix.lower()
    match suffix:
        case ".csv" | ".tsv":
            csv.field_size_limit(1 << 24)
            with path.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
                _check_columns(path, reader.fieldnames or [], columns)
                try:
                    for number, row in enumerate(reader, start=1):
                        yield number, row
                except (csv.Error, UnicodeDecodeError) as error:
                    raise DataError(f"{path}, line {reader.line_num + 1}: cannot be read ({error}).") from error
        case ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{path}, line {number}: is not JSON ({error}).") from error
                    _check_columns(f"{path}, line {number}", row if isinstance(row, dict) else [], columns)
                    yield number, row
        case ".parquet":
            yield from _read_parquet(path, columns)
        case _:
            raise ValueError(f"path={path}: tables are read from {', '.join(TABLE_SUFFIXES)}, not {suffix!r}.")


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # imported here: no other source needs it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names, columns)
        number = 0
        for batch in table.iter_batches(batch_size=4096, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}).") from error


def scan_webdataset(path: Path, caption_field: str) -> Iterator[Item]:
    """Samples of one .tar, or of every .tar below a folder: members of one name up to the first dot of the file name.

    Members are read from their place in the archive later; nothing is ever extracted, so their names can do no harm.
    """
    tars = [path] if path.is_file() else [tar for tar in _walk(path) if tar.suffix.lower() == ".tar"]
    if not tars:
        raise FileNotFoundError(
            f"path={path} has no .tar file (compressed archives are not read: unpack them to .tar)."
        )
    for tar in tars:
        prefix = tar.name if path.is_file() else tar.relative_to(path).as_posix()
        name, parts = None, {}
        for member_name, suffix, span in _members(tar):
            if member_name != name:
                yield from _tar_sample(prefix, name, parts, caption_field)
                name, parts = member_name, {}
            parts.setdefault(suffix, span)
        yield from _tar_sample(prefix, name, parts, caption_field)


def _members(tar: Path) -> Iterator[tuple[str, str, Span]]:
    """(name, suffix, place) of the plain files in an archive, in its order."""
    try:
        with tarfile.open(tar, "r:") as archive:
            size = tar.stat().st_size
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{tar} is cut short inside {member.name!r}. Fetch the archive again.")
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                yield (
                    f"{folder}/{stem}" if folder else stem,
                    suffix.lower(),
                    Span(str(tar), member.offset_data, member.size),
                )
    except tarfile.TarError as error:
        raise DataError(f"{tar} cannot be read as a .tar ({error}). Fetch the archive again.") from error


def _tar_sample(prefix: str, name: str | None, parts: dict[str, Span], caption_field: str) -> Iterator[Item]:
    image = next((span for suffix, span in parts.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
    if name is None or image is None:
        return
    text = parts.get("txt") or parts.get("caption") or parts.get("cls")
    field = None if text or "json" not in parts else caption_field
    yield Item(f"{prefix}/{name}", image, caption_at=text or parts.get("json"), caption_field=field)


def scan_mds(folder: Path, image_column: str, caption_column: str) -> Iterator[Item]:
    """Rows of MDS shards whose columns `image_column` (encoded files) and `caption_column` exist.

    `folder` has an index.json, or subfolders that have one. Columns of pickles are not read, whatever they hold.
    """
    indices = [file for file in _walk(folder) if file.name == "index.json"]
    if not indices:
        raise FileNotFoundError(f"path={folder} has no index.json: it holds no MDS shards.")
    for index in indices:
        prefix = index.parent.relative_to(folder).as_posix()
        for shard in read_shard_entries(index):
            _check_columns(index, shard["column_names"], (image_column, caption_column))
            encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            if encodings[image_column] not in ("bytes", "jpeg", "png") or encodings[caption_column] != "str":
                raise DataError(
                    f"{index}: columns {image_column!r} and {caption_column!r} are of kinds {encodings[image_column]!r} and "
                    f"{encodings[caption_column]!r}, not an encoded image (bytes, jpeg, png) and a str."
                )
            file = str(index.parent / (shard["zip_data"] or shard["raw_data"])["basename"])
            stem = shard["raw_data"]["basename"].removesuffix(".mds")
            for row in range(shard["samples"]):
                span = Span(file, row=row)
                key = f"{stem}/{row:06d}" if prefix == "." else f"{prefix}/{stem}/{row:06d}"
                yield Item(key, span, caption_at=span)


def _check_columns(place: object, found: Any, wanted: tuple[str, ...]) -> None:
    for column in wanted:
        if column not in found:
            raise DataError(
                f"{place}: no column {column!r}; there are: {', '.join(map(str, found)) or 'none'}. "
                "Set image_column and caption_column."
            )


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
