"""Write a safetensors file tensor by tensor: whoever writes it holds one of them at a time.

The bytes are those of safetensors.torch.save_file: 8 bytes of header length, a JSON header padded with spaces to a multiple of
8, and the values; tensors in the order of falling alignment of their type, then of their names.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from piflow_dist.checkpoint.files import CheckpointError, sync_folder
from piflow_dist.config import require

TYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""By rising alignment, in safetensors' own order."""
NAMES = {dtype: name for name, dtype in TYPES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]


def byte_size(spec: Spec) -> int:
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


class TensorFile:
    """A safetensors file of known names, types and shapes, whose values are written in any order.

    The file has its full size from the start: what is not written is zero.
    """

    def __init__(self, path: Path, specs: dict[str, Spec], metadata: dict[str, str] | None = None):
        self.specs, order = specs, list(TYPES)
        header: dict = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name in sorted(specs, key=lambda name: (-order.index(NAMES[specs[name][0]]), name)):
            begin, end = end, end + byte_size(specs[name])
            dtype, shape = specs[name]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs}
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by close())
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(8 + len(text) + end)

    def write(self, name: str, value: Tensor) -> None:
        dtype, shape = self.specs[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, the file was laid out for {shape}.")
        self.file.seek(self.offsets[name])
        self.file.write(value.to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flush to disk. Raises OSError where it is full."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole; nothing of it is left where that fails."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        require(not final.exists(), f"{final} has appeared meanwhile. Choose another folder; nothing is overwritten.")
        os.rename(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
