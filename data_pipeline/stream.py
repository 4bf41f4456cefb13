"""Prepared shards -> batches for training, in an order that resumes exactly.

B batch  C latent channels  H W latent size  L text tokens  D width
"""

import gc
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_pipeline.description import load_description
from data_pipeline.online import OnlineEncoder
from data_pipeline.prompts import pad_prompts
from data_pipeline.shards import ShardSet
from data_pipeline.writing import from_bfloat16_bits

STATE_VERSION = 1
MEMORY_LIMIT_BYTES = 512 << 20
"""Splits whose compressed shards are smaller than this are kept in memory, sample by sample, as they are read."""


class Batch(TypedDict):
    latents: Tensor
    """(B,C,H,W) float32; zeros in sets of prompts only, which know no more than the shape"""
    prompt_embeds: Tensor
    """(B,L,D) float32, zeros where there is no token"""
    prompt_mask: Tensor
    """(B,L) bool, True where a token is"""
    prompts: list[str]
    keys: list[str]


class LatentStream:
    """Endless batches of one split, epoch after epoch.

    Every epoch is one shuffled pass. Its order is a function of (seed, epoch, global_batch, data set) alone: rank and
    micro-batch pick their rows from a global batch, so that another `dp_size` or micro-batch size with the same
    `global_batch` trains on the same samples in every step. Samples that do not fill a global batch at an epoch's end
    are left out (others in each epoch, if shuffled). A batch holds one bucket, so one latent shape.

    batch_size: samples per `next()`, that is per rank and micro-batch.
    global_batch: samples per optimizer step over all ranks and micro-batches; by default batch_size * dp_size.
    num_workers: processes that read ahead; with 0 a thread reads one batch ahead, enough for sets that fit into memory.
    cache_dir: where shards are decompressed; by default beside the compressed ones, or below the temporary folder
        where the set is remote or read-only. All processes of a machine share it.
    cache_bytes: limit of cache_dir; by default none, and for a remote set 80 % of what is free.
    device: where batches are wanted, and where images are decoded and encoded in sets made with latents=online. To a GPU
        they go as 16 bits from pinned memory, and become float32 there.
    augment: random crops and mirroring, for the same sets.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_workers: int = 0,
        global_batch: int | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        device: str | torch.device = "cpu",
        augment: bool = False,
    ):
        self.description = load_description(root)
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self.global_batch = batch_size * dp_size if global_batch is None else global_batch
        self._num_workers, self._device = num_workers, torch.device(device)
        if self._device == torch.device("cuda"):
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._check_arguments(split, seed)
        self._identity = {
            "version": STATE_VERSION,
            "dataset": self.description.fingerprint,
            "split": split,
            "seed": seed,
            "shuffle": shuffle,
            "global_batch": self.global_batch,
        } | ({"augment": augment} if self.description.latents == "online" else {})
        self._shards = ShardSet(
            self.description,
            split,
            seed=seed,
            shuffle=shuffle,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            smallest_bucket=self.global_batch,
        )
        self._online = None
        if self.description.latents == "online":
            self._online = OnlineEncoder(
                self.description, seed=seed, batch_size=batch_size, device=self._device, augment=augment
            )
        elif augment:
            raise ValueError(f"augment=true changes pixels, but {root} holds latents. Prepare it with latents=online.")
        stored = sum(shard.bytes for bucket in self.description.buckets(split) for shard in bucket.shards)
        self._samples = _Samples(self._shards, keep=num_workers == 0 and stored < MEMORY_LIMIT_BYTES)
        self._orders: dict[int, np.ndarray] = {}
        self.samples_per_epoch = self._order(0).size
        """Over all ranks, without the rest that is left out."""
        self.epoch, self._consumed = 0, 0
        self._batches: Iterator[Mapping[str, Any]] | None = None

    def next(self) -> Batch:
        """The next batch of this rank. Raises DataError naming the file where a shard is missing or damaged."""
        if self._batches is None:
            self._batches = self._start(self.epoch, self._consumed)
        try:
            batch = widen(next(self._batches), self._device)
        except BaseException:
            self._batches = None  # a generator that has raised is at its end; the next call tries this batch again
            raise
        self.epoch, self._consumed = self._after(self.epoch, self._consumed)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: epoch, and samples consumed in it over all ranks. Plain JSON, equal on all ranks."""
        return self._identity | {"epoch": self.epoch, "samples": self._consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch that the saved stream gave, also on another number of ranks.

        Raises ValueError where the state belongs to another data set, split, seed or global batch.
        """
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"The saved data position has {name}={state.get(name)!r}, this stream has {name}={mine!r}: it "
                    "would not see the samples that follow. Restore the setting, or start the data anew."
                )
        epoch, samples = state["epoch"], state["samples"]
        if samples % (self.batch_size * self.dp_size) or not 0 <= samples < self.samples_per_epoch or epoch < 0:
            raise ValueError(
                f"The saved data position (epoch {epoch}, sample {samples}) is not at the edge of a batch of "
                f"{self.batch_size} x {self.dp_size} ranks. Save after whole optimizer steps."
            )
        self.close()
        self.epoch, self._consumed = epoch, samples

    def close(self) -> None:
        """End the worker processes; `next()` starts them again."""
        self._batches = None

    def _check_arguments(self, split: str, seed: int) -> None:
        if self.batch_size < 1 or self.dp_size < 1 or not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(
                f"batch_size={self.batch_size}, dp_rank={self.dp_rank}, dp_size={self.dp_size}: "
                "need batch_size >= 1 and 0 <= dp_rank < dp_size."
            )
        if self._num_workers < 0 or seed < 0:
            raise ValueError(f"num_workers={self._num_workers}, seed={seed}: neither may be negative.")
        if self.global_batch < 1 or self.global_batch % (self.batch_size * self.dp_size):
            raise ValueError(
                f"global_batch={self.global_batch} is not a multiple of batch_size={self.batch_size} x "
                f"dp_size={self.dp_size}. Choose a batch_size that splits it into whole micro-batches."
            )
        largest = max(self.description.buckets(split), key=lambda bucket: bucket.samples)
        if largest.samples < self.global_batch:
            raise ValueError(
                f"global_batch={self.global_batch} is more than the {largest.samples} samples of bucket {largest.name}, "
                f"the largest in split {split!r} of {self.description.location}. Use a smaller batch, or more data."
            )

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Two at most: this one, and the one that workers read ahead into.
            self._orders = {kept: order for kept, order in self._orders.items() if abs(kept - epoch) == 1}
            self._orders[epoch] = self._shards.epoch_order(epoch, self.global_batch)
        return self._orders[epoch]

    def _ids(self, epoch: int, consumed: int) -> list[int]:
        """The sample numbers of this rank's batch at a position."""
        step, within = divmod(consumed, self.global_batch)
        start = within + self.dp_rank * self.batch_size
        return self._order(epoch)[step, start : start + self.batch_size].tolist()

    def _after(self, epoch: int, consumed: int) -> tuple[int, int]:
        consumed += self.batch_size * self.dp_size
        return (epoch + 1, 0) if consumed == self.samples_per_epoch else (epoch, consumed)

    def _id_lists(self, epoch: int, consumed: int) -> Iterator[list[int]]:
        while True:
            yield self._ids(epoch, consumed)
            epoch, consumed = self._after(epoch, consumed)

    def _start(self, epoch: int, consumed: int) -> Iterator[dict[str, Any]]:
        batches = self._read(self._id_lists(epoch, consumed))
        return batches if self._online is None else self._encoded(batches, epoch, consumed)

    def _read(self, id_lists: Iterator[list[int]]) -> Iterator[dict[str, Any]]:
        if self._num_workers == 0:
            return self._read_ahead(id_lists)
        loader = DataLoader(
            self._samples,
            batch_sampler=id_lists,
            num_workers=self._num_workers,
            collate_fn=collate,
            multiprocessing_context="fork",  # the shards' shared memory has no name to attach to
            generator=torch.Generator(),  # the loader draws a seed: not from the training's generator
            pin_memory=self._device.type == "cuda",
        )
        # A DALI pipeline that is garbage here must not be collected in a worker: its end waits for threads that were not
        # forked. Frozen objects stay out of the collector's sight; the worker keeps them so.
        gc.freeze()
        try:
            return iter(loader)
        finally:
            gc.unfreeze()

    def _read_ahead(self, id_lists: Iterator[list[int]]) -> Iterator[dict[str, Any]]:
        """The next batch is read by a thread while this one is trained on."""
        # Pinned memory belongs to a GPU's context, and every new thread starts on the first GPU.
        first = (torch.cuda.set_device, (self._device,)) if self._device.type == "cuda" else (None, ())
        with ThreadPoolExecutor(1, initializer=first[0], initargs=first[1]) as reader:
            reading = reader.submit(self._read_batch, next(id_lists))
            for ids in id_lists:
                following = reader.submit(self._read_batch, ids)
                yield reading.result()
                reading = following

    def _read_batch(self, ids: list[int]) -> dict[str, Any]:
        batch = collate([self._samples[i] for i in ids])
        if self._device.type == "cuda":
            return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return batch if self._online else dict(widen(batch, self._device))  # here it costs the training no time

    def _encoded(self, batches: Iterator[dict[str, Any]], epoch: int, consumed: int) -> Iterator[dict[str, Any]]:
        """Batches with latents from their images; the next one is decoded while this one is trained on."""
        with ThreadPoolExecutor(1) as decoder:
            waiting: deque[tuple[dict[str, Any], Future[Tensor]]] = deque()
            for batch in batches:
                images, shape = batch.pop("images"), batch["latent_shape"]
                decoding = decoder.submit(self._online.decode, images, batch["keys"], epoch, shape)
                epoch, consumed = self._after(epoch, consumed)
                waiting.append((batch, decoding))
                if len(waiting) == 2:
                    yield self._finish(*waiting.popleft())

    def _finish(self, batch: dict[str, Any], decoding: "Future[Tensor]") -> dict[str, Any]:
        return batch | {"latents": self._online.encode(decoding.result())}


class _Samples(Dataset):
    """Shards as a map-style dataset, kept in memory after the first read where `keep` says so."""

    def __init__(self, shards: ShardSet, keep: bool):
        self._shards = shards
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        if self._kept is None:
            return self._read(sample_id)
        sample = self._kept.get(sample_id)
        if sample is None:
            sample = self._kept[sample_id] = self._read(sample_id)
        return sample

    def _read(self, sample_id: int) -> dict[str, Any]:
        return self._shards[sample_id] | {"latent_shape": self._shards.latent_shape(sample_id)}


def read_all(root: str | Path, split: str, *, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """A whole split in stored order: a Batch of all its samples, and "images" (the encoded files) where they are kept.

    For small sets of one bucket; raises ValueError where latents have several shapes.
    """
    description = load_description(root)
    if description.latents != "stored":
        raise ValueError(f"read_all gives stored latents; {root} was made with latents={description.latents}.")
    if len(description.buckets(split)) > 1:
        names = ", ".join(bucket.name for bucket in description.buckets(split))
        raise ValueError(f"read_all gives one tensor of latents; split {split!r} of {root} has the buckets {names}.")
    shards = ShardSet(description, split, cache_dir=cache_dir)
    samples = [shards[i] for i in range(shards.size)]
    batch: dict[str, Any] = dict(widen(collate(samples), torch.device("cpu")))
    if samples and "image" in samples[0]:
        batch["images"] = [sample["image"] for sample in samples]
    return batch


def first_prompts(
    root: str | Path, split: str, count: int, *, cache_dir: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """(count,L,D) embeddings and (count,L) mask of a split's first samples in stored order, again and again where it has fewer.

    Opens the set anew: worker processes of a stream must not share open shards with their parent.
    """
    shards = ShardSet(load_description(root), split, cache_dir=cache_dir)
    rows = [shards[i % shards.size]["prompt_embeds"] for i in range(count)]
    return pad_prompts([from_bfloat16_bits(row).float() for row in rows])


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of one bucket -> a batch in the 16 bits of the shards; `widen` makes a Batch of it.

    "images" and "latent_shape" are in it where latents have still to be made, "latent_shape" alone in sets of prompts.
    """
    embeds = [sample["prompt_embeds"] for sample in samples]
    lengths = [len(embed_LD) for embed_LD in embeds]
    embeds_BLD = _empty((len(samples), max(lengths), embeds[0].shape[1]), torch.int16)
    for row_LD, embed_LD in zip(embeds_BLD.numpy(), embeds, strict=True):
        row_LD[: len(embed_LD)] = embed_LD.view(np.int16)
        row_LD[len(embed_LD) :] = 0
    batch = {
        "prompt_embeds": embeds_BLD.view(torch.bfloat16),
        "prompt_mask": torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1),
        "prompts": [sample["prompt"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
    }
    if "latents" in samples[0]:
        batch["latents"] = _empty((len(samples), *samples[0]["latents"].shape), torch.float16)
        np.stack([sample["latents"] for sample in samples], out=batch["latents"].numpy())
    else:
        batch["latent_shape"] = samples[0]["latent_shape"]
        if "image" in samples[0]:
            batch["images"] = [sample["image"] for sample in samples]
    return batch


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """In a worker in memory that the training process sees too: the batch is written once, not written and copied."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as torch's own collate does
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))


def widen(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch on the device, in float32: 16 bits travel, also to a GPU (without waiting where they are pinned)."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)}
    if "latents" not in moved:
        moved["latents"] = torch.zeros(len(batch["keys"]), *batch["latent_shape"], device=device)
    return Batch(
        latents=moved["latents"].float(),
        prompt_embeds=moved["prompt_embeds"].float(),
        prompt_mask=moved["prompt_mask"],
        prompts=batch["prompts"],
        keys=batch["keys"],
    )
