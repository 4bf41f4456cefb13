"""Remote sets through a bounded, shared cache: an S3 store on this machine, damage, full disks, killed readers."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_sets import write_set
from filelock import FileLock

from data_pipeline import cache as cache_module
from data_pipeline import store
from data_pipeline.cache import ShardCache
from data_pipeline.description import load_description
from data_pipeline.errors import DataError
from data_pipeline.stream import LatentStream

REPO = Path(__file__).parents[2]
SHARD_BYTES = 4_096
"""Of a decompressed shard of the set below, at most."""


class S3(SimpleHTTPRequestHandler):
    """As much of S3 as downloads need: HEAD and GET of a path in a bucket. `requests` counts; `corrupt` spoils answers."""

    requests: list[str] = []
    corrupt: dict[str, int] = {}

    def do_GET(self) -> None:  # noqa: N802
        self.requests.append(self.path)
        for name in [name for name, times in self.corrupt.items() if name in self.path and times]:
            self.corrupt[name] -= 1
            content = bytes(Path(self.translate_path(self.path)).stat().st_size)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind s3://bucket; each test has a store, temporary folder and cache of its own."""
    folder = tmp_path / "store" / "bucket"
    write_set(folder / "set", train={(4, 4): 80, (2, 8): 24})
    S3.requests, S3.corrupt = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(S3, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "TMPDIR": str(tmp_path / "tmp"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(store, "_downloaders", {})
    monkeypatch.setattr(store, "time", SimpleNamespace(sleep=lambda seconds: None))
    yield folder
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def open_stream(root: str | Path, **arguments) -> LatentStream:
    return LatentStream(root, "train", **({"batch_size": 4, "seed": 0} | arguments))


def keys(stream: LatentStream, batches: int) -> list[list[str]]:
    return [stream.next()["keys"] for _ in range(batches)]


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.mds"))


def bytes_in(cache: Path) -> int:
    """Of all its shards at one moment: a stream's own threads fetch ahead and make room all the time."""
    with FileLock(cache / cache_module.SPACE_LOCK):
        return sum(path.stat().st_size for path in shards_in(cache))


EPOCH = 26


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_is_read_as_a_local_one(bucket: Path, tmp_path: Path, workers: int) -> None:
    want = keys(open_stream(bucket / "set", cache_dir=tmp_path / "local"), EPOCH + 5)
    stream = open_stream("s3://bucket/set", cache_dir=tmp_path / "cache", num_workers=workers)
    assert keys(stream, 10) == want[:10]
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()
    again = open_stream("s3://bucket/set/", cache_dir=tmp_path / "cache", num_workers=workers)
    again.load_state_dict(state)
    assert keys(again, EPOCH - 5) == want[10:]
    again.close()
    fetched = [path for path in S3.requests if path.endswith(".zstd")]
    assert len(fetched) == len(set(fetched)) == len(shards_in(tmp_path / "cache"))  # each shard once
    left = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert left == {".mds", ".json"}


def test_a_bounded_cache_cleans_itself_and_gives_the_same_samples(bucket: Path, tmp_path: Path) -> None:
    want = keys(open_stream(bucket / "set", cache_dir=tmp_path / "local"), 2 * EPOCH)
    assert len(shards_in(tmp_path / "local")) >= 6
    cache, limit = tmp_path / "cache", 4 * SHARD_BYTES
    stream = open_stream("s3://bucket/set", cache_dir=cache, cache_bytes=limit)
    stream._samples._kept = None  # such a small set would be kept in memory
    for batch in want:
        assert stream.next()["keys"] == batch
        assert bytes_in(cache) <= limit
    fetched = [path for path in S3.requests if path.endswith(".zstd")]
    assert len(fetched) > len(set(fetched))  # some had to make room and came again
    # What killed processes, and other sets, left in the folder makes room too.
    other = cache / "another" / "train" / "4x4"
    other.mkdir(parents=True)
    (other / "shard.00000.mds").write_bytes(bytes(3 * SHARD_BYTES))
    os.utime(other / "shard.00000.mds", (0, 0))
    (other / "shard.00001.mds.tmp").write_bytes(bytes(3 * SHARD_BYTES))
    with FileLock(cache / cache_module.SPACE_LOCK):  # the stream reads ahead
        for path in shards_in(cache):
            if path.parent != other:
                path.unlink()
    assert len(keys(stream, EPOCH)) == EPOCH
    assert not list(other.iterdir())


def test_a_shard_that_makes_room_while_it_is_checked_comes_again(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = keys(open_stream("s3://bucket/set", cache_dir=tmp_path / "cache"), EPOCH)
    read, gone = Path.read_bytes, []

    def read_late(path: Path) -> bytes:
        if path.suffix == ".mds" and path not in gone:
            gone.append(path)
            path.unlink()  # by another process, a moment before
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_late)
    assert keys(open_stream("s3://bucket/set", cache_dir=tmp_path / "cache"), EPOCH) == want
    assert len(gone) >= 6


def test_a_cache_that_is_too_small_is_refused(bucket: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"may hold .* GiB, fewer than 4 shards of .*Set a larger cache_gb"):
        open_stream("s3://bucket/set", cache_dir=tmp_path / "cache", cache_bytes=SHARD_BYTES)


def test_a_shard_that_comes_damaged_is_fetched_again(bucket: Path, tmp_path: Path, caplog) -> None:
    want = keys(open_stream(bucket / "set", cache_dir=tmp_path / "local"), EPOCH)
    S3.corrupt = {"4x4/shard.00001.mds.zstd": 1}
    assert keys(open_stream("s3://bucket/set", cache_dir=tmp_path / "cache"), EPOCH) == want
    assert "4x4/shard.00001.mds.zstd does not have the hash of the index; it is read again" in caplog.text


def test_a_shard_that_stays_damaged_is_named_with_its_row(bucket: Path, tmp_path: Path) -> None:
    S3.corrupt = {"4x4/shard.00001.mds.zstd": 99}
    stream = open_stream("s3://bucket/set", cache_dir=tmp_path / "cache", shuffle=False)
    message = r"s3://bucket/set/train/4x4/shard.00001.mds.zstd is damaged .*remote store.*\(Wanted: row \d+.\)"
    with pytest.raises(DataError, match=message):
        keys(stream, EPOCH)
    S3.corrupt = {}
    assert keys(stream, 2)  # the stream goes on once it is restored


def test_what_is_missing_or_unreachable_is_named(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="s3://bucket/nothing/dataset.json is missing, or may not be read"):
        load_description("s3://bucket/nothing")
    with pytest.raises(ValueError, match="no store of kind 's4' is known. Known: .*gs.*s3"):
        load_description("s4://bucket/set")
    (bucket / "set" / "train" / "4x4" / "shard.00001.mds.zstd").unlink()
    with pytest.raises(DataError, match="4x4/shard.00001.mds.zstd is missing.*Restore it in the remote store"):
        keys(open_stream("s3://bucket/set", cache_dir=tmp_path / "cache"), EPOCH)
    monkeypatch.setattr(store, "_downloaders", {})
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        OSError, match="s3://bucket/set/dataset.json cannot be fetched after 3 attempts.*S3_ENDPOINT_URL"
    ):
        load_description("s3://bucket/set")


def test_a_set_that_was_replaced_since_the_checkpoint_is_refused(bucket: Path, tmp_path: Path) -> None:
    stream = open_stream("s3://bucket/set", cache_dir=tmp_path / "cache")
    stream.next()
    state = stream.state_dict()
    shutil.rmtree(bucket / "set")
    write_set(bucket / "set", train=60)
    with pytest.raises(ValueError, match="saved data position has dataset="):
        open_stream("s3://bucket/set", cache_dir=tmp_path / "cache").load_state_dict(state)
    # An index of one set beside the description of another.
    write_set(tmp_path / "third", train=40)
    shutil.copy(tmp_path / "third" / "train" / "4x4" / "index.json", bucket / "set" / "train" / "4x4" / "index.json")
    with pytest.raises(DataError, match="files of two sets are mixed"):
        open_stream("s3://bucket/set", cache_dir=tmp_path / "cache2")


def test_a_full_cache_disk_is_named(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def no_space(path: Path, data: bytes) -> int:
        if path.name.endswith(".mds.tmp"):
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    stream = open_stream("s3://bucket/set", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    message = (
        r"Cannot decompress s3://.*mds.zstd into .*cache: No space left.* \d+ bytes are needed, \d+ are free.*cache_dir"
    )
    with pytest.raises(OSError, match=message):
        stream.next()
    assert not list((tmp_path / "cache").rglob("*.tmp"))  # the disk is not left fuller than it was
    monkeypatch.setattr(Path, "write_bytes", write)
    assert stream.next()


READER = """
import sys
from data_pipeline.stream import LatentStream
root, cache, limit, workers, skip = sys.argv[1:]
stream = LatentStream(root, "train", batch_size=4, seed=0, num_workers=int(workers), cache_dir=cache, cache_bytes=int(limit))
stream._samples._kept = None
print("ready", flush=True)
sys.stdin.readline()
for _ in range(52):
    print(*stream.next()["keys"], flush=True)
"""


def test_the_processes_of_a_machine_share_a_bounded_cache(bucket: Path, tmp_path: Path) -> None:
    """Two readers, one with workers, throw out each other's shards all the time; each still reads its own order."""
    want = [" ".join(batch) for batch in keys(open_stream(bucket / "set", cache_dir=tmp_path / "local"), 52)]
    arguments = ["s3://bucket/set", str(tmp_path / "cache"), str(4 * SHARD_BYTES)]
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *arguments, str(workers), "0"],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for workers in (0, 1)
    ]
    try:
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for reader in readers:
            reader.stdin.write("go\n")
            reader.stdin.flush()
        for reader in readers:
            assert reader.stdout.read().splitlines() == want
            assert reader.wait(timeout=60) == 0
    finally:
        for reader in readers:
            reader.kill()
            reader.stdin.close()
            reader.stdout.close()
            reader.wait(timeout=30)
    assert bytes_in(tmp_path / "cache") <= 4 * SHARD_BYTES


def test_downloads_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.mds.zstd.fetched.7.part").write_bytes(bytes(100))
    (tmp_path / "new.mds.zstd.fetched.8.part").write_bytes(bytes(100))
    os.utime(tmp_path / "old.mds.zstd.fetched.7.part", (0, 0))
    ShardCache(tmp_path, 1000)._make_room(10, tmp_path / "x.mds")
    assert [path.name for path in tmp_path.iterdir()] == ["new.mds.zstd.fetched.8.part"]
    assert cache_module.default_limit(tmp_path) > 0


def test_the_limit_of_a_cache_is_found_while_others_make_room(tmp_path: Path) -> None:
    (tmp_path / "shard.00000.mds").write_bytes(bytes(SHARD_BYTES))
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.append(cache_module.default_limit(tmp_path)))
    with FileLock(tmp_path / cache_module.SPACE_LOCK):
        reader.start()
        reader.join(timeout=0.2)
        assert not found  # it waits for the one that makes room
        (tmp_path / "shard.00000.mds").unlink()
    reader.join(timeout=30)
    assert found[0] > 0
