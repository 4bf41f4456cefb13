"""A rank's shards in host memory, as the bytes of the safetensors file that they become, and their way to the disk.

The buffer is kept from save to save (page-locked where the shards are on a GPU), so that taking a snapshot is a copy and
nothing else, and a save needs no memory beside it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

# safetensors' names of the types that optimizers and weights come in.
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 32 << 20


class Snapshot:
    def __init__(self, page_locked: bool):
        """page_locked: for shards on a GPU, which then copies beside its other work."""
        self.page_locked = page_locked
        self.layout: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self.header, self.buffer = b"", torch.empty(0, dtype=torch.uint8)
        self.views: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.buffer.numel()

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy the values that the tensors have now: later changes do not reach the snapshot.

        From a GPU the copies are queued on the current stream, before whatever changes the tensors next; `write` waits for
        them, the caller need not.
        """
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if layout != self.layout:
            self._lay_out(layout)
        for name, tensor in tensors.items():
            self.views[name].copy_(tensor.detach(), non_blocking=self.page_locked)
        if self.page_locked:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def write(self, path: Path, pause: Callable[[str], None] = lambda phase: None) -> str:
        """Write the file and flush it to disk; its SHA-256. pause(phase): called within each phase.

        Hashed by a second thread meanwhile: both let go of the interpreter, and the slower one (mostly the disk) decides.
        """
        if self.copied is not None:
            self.copied.synchronize()
        content = memoryview(self.buffer.numpy())
        with ThreadPoolExecutor(1, "checkpoint-hash") as hasher, open(path, "wb", buffering=0) as file:
            digest = hasher.submit(sha256, self.header, content)
            write_all(file.fileno(), self.header)
            pause("write")
            for start in range(0, len(content), CHUNK):
                write_all(file.fileno(), content[start : start + CHUNK])
            pause("fsync")
            os.fsync(file.fileno())
            return digest.result()

    def _lay_out(self, layout: dict[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Wide types first, so that every value lies at a multiple of its size, without gaps (safetensors forbids them)."""
        names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
        entries, end = {}, 0
        for name in names:
            dtype, shape = layout[name]
            begin, end = end, end + shape.numel() * dtype.itemsize
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        # The old buffer first: two at once might not fit.
        self.views, self.buffer = {}, torch.empty(0, dtype=torch.uint8)
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self.page_locked)
        for name in names:
            dtype, shape = layout[name]
            begin, stop = entries[name]["data_offsets"]
            self.views[name] = self.buffer[begin:stop].view(dtype).view(shape)
        self.layout = layout


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """os.write may take a part only, as it does on a disk that fills up."""
    content = memoryview(content)
    while len(content):
        content = content[os.write(descriptor, content) :]


def sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
