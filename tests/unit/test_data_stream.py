"""data_pipeline/stream.py: exact resume, one order for all ranks, damage named, killed and parallel runs."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import islice
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import PROMPTS, write_set

from data_pipeline import stream as stream_module
from data_pipeline.description import load_description
from data_pipeline.errors import DataError
from data_pipeline.inspection import rows
from data_pipeline.prompts import TokenTableEncoder, vocabulary
from data_pipeline.stream import LatentStream, read_all

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training samples in three shards."""
    root = tmp_path_factory.mktemp("set")
    description = write_set(root)
    assert len(description.buckets("train")[0].shards) >= 3
    return root


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    """A copy to damage, without decompressed shards."""
    own = tmp_path / "own"
    shutil.copytree(root, own, ignore=lambda folder, names: [name for name in names if name.endswith(".mds")])
    return own


def open_stream(root: Path, **arguments) -> LatentStream:
    return LatentStream(root, "train", **({"batch_size": 4, "seed": 0} | arguments))


def keys(stream: LatentStream, batches: int) -> list[list[str]]:
    return [stream.next()["keys"] for _ in range(batches)]


def test_a_batch(root: Path) -> None:
    batch = open_stream(root).next()
    assert batch["latents"].shape == (4, 4, 4, 4) and batch["latents"].dtype == torch.float32
    encoder = TokenTableEncoder(vocabulary(PROMPTS), dim=8)
    for i, prompt in enumerate(batch["prompts"]):
        (embed_LD,) = encoder.encode([prompt])
        assert torch.equal(batch["prompt_embeds"][i][batch["prompt_mask"][i]], embed_LD)
        assert not batch["prompt_embeds"][i][~batch["prompt_mask"][i]].any()
    stored = read_all(root, "train")
    rows = [stored["keys"].index(key) for key in batch["keys"]]
    assert torch.equal(batch["latents"], stored["latents"][rows])


def test_epochs_are_different_passes_without_repeats(root: Path) -> None:
    stream = open_stream(root)
    assert stream.samples_per_epoch == 48
    epochs = [sum(keys(stream, 12), []) for _ in range(3)]
    for seen in epochs:
        assert len(set(seen)) == 48
    assert len({tuple(seen) for seen in epochs}) == 3
    assert len(set().union(*epochs)) > 48  # the rest that is left out is another one in each epoch
    assert stream.state_dict()["epoch"] == 3


def test_seeds_give_other_orders_and_equal_seeds_the_same(root: Path) -> None:
    orders = [keys(open_stream(root, seed=seed), 24) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][12:] != orders[2][:12]  # the second epoch of one seed is not the first of the next


def test_without_shuffling_the_stored_order(root: Path) -> None:
    assert sum(keys(open_stream(root, shuffle=False), 12), []) == read_all(root, "train")["keys"][:48]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [0, 5, 12, 19])
def test_resume_is_exact(root: Path, after: int, workers: int) -> None:
    whole = open_stream(root)
    want = keys(whole, after + 15)[after:]
    first = open_stream(root, num_workers=workers)
    keys(first, after)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    resumed = open_stream(root, num_workers=workers)
    resumed.load_state_dict(state)
    assert keys(resumed, 15) == want
    assert resumed.state_dict() == whole.state_dict()
    resumed.load_state_dict(state)  # also in a stream that is running
    assert keys(resumed, 3) == want[:3]
    resumed.close()


def test_all_world_sizes_see_the_same_global_batches(root: Path) -> None:
    """48 of 50 samples in global batches of 16, over 1, 2 and 4 ranks, with and without accumulation."""

    def steps(dp_size: int, batch_size: int, count: int, state: dict | None = None) -> tuple[list[set[str]], dict]:
        streams = [
            open_stream(root, batch_size=batch_size, dp_rank=rank, dp_size=dp_size, global_batch=16)
            for rank in range(dp_size)
        ]
        for stream in streams if state else []:
            stream.load_state_dict(state)
        micro_batches = 16 // (batch_size * dp_size)
        seen = [[sum(keys(stream, micro_batches), []) for stream in streams] for _ in range(count)]
        for step in seen:
            assert len(set().union(*step)) == 16  # nothing twice among ranks
        assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)
        return [set().union(*step) for step in seen], streams[0].state_dict()

    want, _ = steps(1, 16, 7)
    for dp_size, batch_size in ((1, 4), (2, 8), (2, 2), (4, 4)):
        assert steps(dp_size, batch_size, 7)[0] == want
    # A run that changes its number of ranks twice, in the middle of epochs.
    first, state = steps(4, 4, 2)
    second, state = steps(1, 8, 2, state)
    third, _ = steps(2, 8, 3, state)
    assert first + second + third == want


def test_workers_read_what_the_process_itself_reads(root: Path) -> None:
    alone, helped = open_stream(root), open_stream(root, num_workers=2)
    for one, two in islice(zip(iter(alone.next, None), iter(helped.next, None), strict=True), 15):
        assert one["keys"] == two["keys"]
        assert torch.equal(one["latents"], two["latents"])
    helped.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_16_bits_become_the_same_float32(root: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's conversions of the rows; from workers in shared memory, in the shards' own width."""
    came = []
    plain = stream_module.widen
    monkeypatch.setattr(stream_module, "widen", lambda batch, device: came.append(dict(batch)) or plain(batch, device))
    description = load_description(root)
    stored = {row["key"]: row for row in rows(description, "train", description.buckets("train")[0])}
    stream = open_stream(root, num_workers=workers)
    batches = [stream.next() for _ in range(15)]
    stream.close()
    for batch in batches:
        lengths = []
        for i, key in enumerate(batch["keys"]):
            bits_LD = stored[key]["prompt_embeds"]
            lengths.append(len(bits_LD))
            want_LD = (bits_LD.astype(np.uint32) << 16).view(np.float32)
            assert np.array_equal(batch["prompt_embeds"][i, : len(bits_LD)].numpy(), want_LD)
            assert not batch["prompt_embeds"][i, len(bits_LD) :].any()
            assert np.array_equal(batch["latents"][i].numpy(), stored[key]["latents"].astype(np.float32))
        assert batch["prompt_mask"].sum(dim=1).tolist() == lengths and batch["prompt_mask"].shape[1] == max(lengths)
        assert batch["prompt_embeds"].dtype == batch["latents"].dtype == torch.float32
    narrow = [batch for batch in came if batch["latents"].dtype == torch.float16]
    assert len(narrow) >= 15  # without workers a thread reads one further
    for batch in narrow:
        assert batch["prompt_embeds"].dtype == torch.bfloat16
        assert all(batch[name].is_shared() == (workers > 0) for name in ("latents", "prompt_embeds", "prompt_mask"))


class PretendedGpu:
    """What a stream does with tensors that are wanted on cuda:1, seen without one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.contexts, self.pinned, self.loaders, self.copies = [], [], [], []
        self.plain_loader, self.plain_to = stream_module.DataLoader, torch.Tensor.to
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: self.to(tensor, *where, **how))
        monkeypatch.setattr(stream_module, "DataLoader", self.loader)

    def set_device(self, device: torch.device) -> None:
        self.contexts.append((threading.get_ident(), device))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.contexts[-1] == (threading.get_ident(), torch.device("cuda:1"))
        self.pinned.append(tensor.data_ptr())
        return tensor

    def loader(self, *arguments, pin_memory: bool, **others):
        self.loaders.append(pin_memory)
        return self.plain_loader(*arguments, pin_memory=False, **others)

    def to(self, tensor: torch.Tensor, *where, **how) -> torch.Tensor:
        if where != (torch.device("cuda:1"),):
            return self.plain_to(tensor, *where, **how)
        self.copies.append((tensor.data_ptr(), tensor.dtype, how))
        return tensor


@pytest.mark.parametrize("workers", [0, 1])
def test_copies_to_a_gpu_are_pinned_narrow_and_do_not_wait(
    root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = open_stream(root).next()
    gpu = PretendedGpu(monkeypatch)
    stream = open_stream(root, num_workers=workers, device="cuda:1")
    batch = stream.next()
    stream.close()
    assert torch.equal(batch["latents"], want["latents"]) and batch["latents"].dtype == torch.float32
    assert sorted(str(dtype) for _, dtype, _ in gpu.copies) == ["torch.bfloat16", "torch.bool", "torch.float16"]
    assert all(how == {"non_blocking": True} for _, _, how in gpu.copies)
    assert gpu.loaders == [True] * workers  # torch's loader pins what its workers send
    if not workers:
        assert {place for place, _, _ in gpu.copies} <= set(gpu.pinned)


def test_batches_are_given_on_the_device(root: Path) -> None:
    batch = open_stream(root, device="meta").next()
    for name in ("latents", "prompt_embeds", "prompt_mask"):
        assert batch[name].device.type == "meta"


def test_the_stream_leaves_the_global_generator_alone(root: Path) -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    stream = open_stream(root, num_workers=1)
    stream.next()
    stream.close()
    assert torch.equal(torch.rand(3), want)


def test_batches_of_several_buckets_have_one_shape_each(tmp_path: Path) -> None:
    write_set(tmp_path, train={(4, 4): 40, (2, 8): 24})
    streams = [open_stream(tmp_path, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert streams[0].samples_per_epoch == 64
    seen, shapes = set(), []
    for _ in range(8):
        batches = [stream.next() for stream in streams]
        assert batches[0]["latents"].shape == batches[1]["latents"].shape
        shapes.append(tuple(batches[0]["latents"].shape[2:]))
        seen |= {key for batch in batches for key in batch["keys"]}
    assert len(seen) == 64
    assert sorted(shapes) == [(2, 8)] * 3 + [(4, 4)] * 5
    with pytest.raises(ValueError, match="several shapes"):
        _ = streams[0].description.latent_shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank=2, dp_size=2"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"global_batch": 6}, "global_batch=6 is not a multiple of batch_size=4 x dp_size=1"),
        ({"batch_size": 51}, "global_batch=51 is more than the 50 samples of bucket 4x4"),
    ],
)
def test_bad_arguments(root: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(root, **arguments)


def test_a_split_that_is_not_there(root: Path) -> None:
    with pytest.raises(ValueError, match="no split 'val'. Its splits: train, test"):
        LatentStream(root, "val", batch_size=1, seed=0)


@pytest.mark.parametrize("other", [{"seed": 1}, {"shuffle": False}, {"batch_size": 8}])
def test_a_position_of_another_order_is_refused(root: Path, other: dict) -> None:
    state = open_stream(root).state_dict()
    with pytest.raises(
        ValueError, match=f"saved data position has {next(iter(other)).replace('batch_size', 'global')}"
    ):
        open_stream(root, **other).load_state_dict(state)


def test_a_position_in_another_set_or_inside_a_batch_is_refused(root: Path, tmp_path: Path) -> None:
    stream = open_stream(root, batch_size=2, global_batch=8)
    stream.next()
    with pytest.raises(ValueError, match=r"sample 2\) is not at the edge of a batch of 4 x 1 ranks"):
        open_stream(root, global_batch=8).load_state_dict(stream.state_dict())
    write_set(tmp_path, train=30)
    with pytest.raises(ValueError, match="saved data position has dataset="):
        open_stream(tmp_path).load_state_dict(open_stream(root).state_dict())


def a_shard(root: Path) -> Path:
    return root / "train" / "4x4" / "shard.00001.mds.zstd"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_and_can_be_restored(
    own_root: Path, tmp_path: Path, cached: bool, workers: int
) -> None:
    whole = a_shard(own_root).read_bytes()
    a_shard(own_root).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    cache = {"cache_dir": tmp_path / "cache"} if cached else {}
    stream = open_stream(own_root, shuffle=False, num_workers=workers, **cache)
    for _ in range(2):  # the second try must not hang on the failed first one
        with pytest.raises(DataError, match=r"train/4x4/shard.00001.mds.zstd is damaged"):
            keys(stream, 12)
    a_shard(own_root).write_bytes(whole)
    state = stream.state_dict()
    assert keys(stream, 2) == keys_from(own_root, state, 2)
    stream.close()


def keys_from(root: Path, state: dict, batches: int) -> list[list[str]]:
    stream = open_stream(root, shuffle=False)
    stream.load_state_dict(state)
    return keys(stream, batches)


def test_a_missing_shard_is_named(own_root: Path) -> None:
    a_shard(own_root).unlink()
    with pytest.raises(DataError, match=r"train/4x4/shard.00001.mds.zstd is missing. Restore it"):
        keys(open_stream(own_root), 12)


@pytest.mark.parametrize("name", ["index.json", "../../dataset.json"])
def test_a_missing_index_is_named(own_root: Path, name: str) -> None:
    (own_root / "train" / "4x4" / name).unlink()
    with pytest.raises((DataError, FileNotFoundError), match=f"{Path(name).name} is missing"):
        open_stream(own_root)


@pytest.mark.parametrize("content", ['{"version": 2, "sh', "{}", '{"version": 2, "shards": []}'])
def test_a_broken_index_is_named(own_root: Path, content: str) -> None:
    (own_root / "train" / "4x4" / "index.json").write_text(content)
    with pytest.raises(DataError, match="train/4x4/index.json"):
        open_stream(own_root)


def test_files_of_two_sets_are_not_mixed(own_root: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", train=30)
    shutil.rmtree(own_root / "train")
    shutil.copytree(tmp_path / "other" / "train", own_root / "train")
    with pytest.raises(DataError, match="files of two sets are mixed"):
        open_stream(own_root)


def test_leavings_of_a_killed_decompression_are_not_read(own_root: Path) -> None:
    want = keys(open_stream(own_root), 12)
    raw = own_root / "train" / "4x4" / "shard.00001.mds"
    good = raw.read_bytes()
    raw.write_bytes(good[: len(good) // 2])  # as after a power cut
    raw.with_name(raw.name + ".tmp").write_bytes(good[:10])
    assert keys(open_stream(own_root), 12) == want
    assert raw.read_bytes() == good


def test_a_cache_keeps_the_set_itself_untouched(own_root: Path, tmp_path: Path) -> None:
    before = sorted(own_root.rglob("*"))
    want = keys(open_stream(own_root, cache_dir=tmp_path / "cache"), 12)
    assert sorted(own_root.rglob("*")) == before
    assert keys(open_stream(own_root), 12) == want
    assert keys(open_stream(own_root, cache_dir=tmp_path / "cache"), 12) == want  # from the decompressed copies
    assert not list((tmp_path / "cache").rglob("*.zstd"))


def test_a_read_only_set_is_decompressed_elsewhere(
    own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    with caplog.at_level(logging.INFO, logger="data_pipeline.shards"):
        assert len(keys(open_stream(own_root), 12)) == 12
    assert "is read-only" in caplog.text
    assert not list(own_root.rglob("*.mds"))
    assert list((tmp_path / "tmp").rglob("*.mds"))


def test_a_full_disk_is_named(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", no_space)
    with pytest.raises(OSError, match=r"Cannot decompress .*mds.zstd into .*No space left.*set cache_dir"):
        open_stream(own_root).next()


def shared_memory_names() -> set[str]:
    """Of mosaicml-streaming's kind."""
    return {
        name
        for name in os.listdir("/dev/shm")
        if name.endswith(("_locals", "_barrier", "_next_epoch", "_cache_usage", "_states", "_times"))
    }


def test_no_name_in_shared_memory_is_used(root: Path) -> None:
    """Segments that a killed StreamingDataset of another program left are neither an obstacle nor touched."""
    stale = []
    for name in ("000000_locals", "000000_barrier", "000000_next_epoch", "000001_locals"):
        if name not in shared_memory_names():
            stale.append(SharedMemory(name, create=True, size=64))
    try:
        before = shared_memory_names()
        stream = open_stream(root, num_workers=1)
        assert len(keys(stream, 12)) == 12
        assert shared_memory_names() == before
        stream.close()
    finally:
        for memory in stale:
            memory.close()
            memory.unlink()


READER = """
import sys
from data_pipeline.stream import LatentStream
stream = LatentStream(sys.argv[1], "train", batch_size=4, seed=0, num_workers=int(sys.argv[2]))
for line in sys.stdin:
    print(*stream.next()["keys"], flush=True)
"""


def test_two_runs_at_once_and_a_killed_one(own_root: Path) -> None:
    """Two programs start together on a set that is not yet decompressed; one is killed; the other and a third go on."""
    want = keys(open_stream(own_root, cache_dir=own_root.parent / "elsewhere"), 3)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(own_root), str(workers)],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for workers in (0, 1)
    ]

    def ask() -> list[list[str]]:
        living = [reader for reader in readers if reader.poll() is None]
        for reader in living:
            reader.stdin.write("next\n")
            reader.stdin.flush()
        return [reader.stdout.readline().split() for reader in living]

    try:
        assert ask() == [want[0], want[0]]
        assert ask() == [want[1], want[1]]
        readers[1].send_signal(signal.SIGKILL)
        readers[1].wait(timeout=30)
        assert ask() == [want[2]]
        assert keys(open_stream(own_root), 3) == want
    finally:
        for reader in readers:
            reader.kill()
            reader.stdin.close()
            reader.stdout.close()
            reader.wait(timeout=30)
