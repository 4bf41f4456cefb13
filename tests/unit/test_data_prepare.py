"""data_pipeline/prepare.py and tools/prepare_data.py: whole sets or none, finished sets found, bad input named."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import PROMPTS, RandomImages, png
from torch.testing import assert_close

from data_pipeline import prepare as prepare_module
from data_pipeline.codec import load_codec
from data_pipeline.decode import Decoder
from data_pipeline.description import DatasetDescription, load_description
from data_pipeline.errors import DataError
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.prompts import TokenTableEncoder, load_prompt_encoder, pad_prompts
from data_pipeline.source import RawSample
from data_pipeline.stream import read_all
from data_pipeline.writing import SplitWriter

REPO = Path(__file__).parents[2]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> RandomImages:
    images = RandomImages()
    monkeypatch.setattr(prepare_module, "_open_source", lambda config: images)
    return images


def run(out: Path, **settings) -> DatasetDescription:
    return prepare(PrepareConfig(out=str(out), **settings), show_progress=False)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_set_holds_what_went_in(source: RandomImages, tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    description = run(out)
    assert description.splits == {"train": 40, "test": 8}
    assert description.latent_shape == (16, 2, 2)
    assert description.latent_channels == 16
    assert description.prompts == tuple(sorted(PROMPTS))
    assert description == load_description(out)

    samples = read_all(out, "test")
    expected = list(source.samples("test"))
    assert samples["keys"] == [sample.key for sample in expected]
    assert samples["prompts"] == [sample.caption for sample in expected]
    assert samples["images"] == [sample.encoded for sample in expected]

    encoder = load_prompt_encoder(description.prompt_encoder)
    embeds_BLD, mask_BL = pad_prompts(encoder.encode(samples["prompts"]))
    assert encoder.dim == description.prompt_dim == 64
    assert torch.equal(samples["prompt_embeds"], embeds_BLD)
    assert torch.equal(samples["prompt_mask"], mask_BL)

    decoded_Bchw = load_codec(description.codec).decode(samples["latents"])
    pixels = Decoder(channels=1).decode(samples["images"], samples["keys"])
    pixels_Bchw = torch.stack([torch.from_numpy(image) for image in pixels]).permute(0, 3, 1, 2)
    assert torch.equal(((decoded_Bchw + 1) * 127.5).round().byte(), pixels_Bchw)


def test_training_latents_have_unit_variance(source: RandomImages, tmp_path: Path) -> None:
    run(tmp_path / "data")
    latents_BCHW = read_all(tmp_path / "data", "train")["latents"]
    assert_close(latents_BCHW.double().std(correction=0).item(), 1.0, rtol=1e-4, atol=0)


def test_a_finished_set_is_found(source: RandomImages, tmp_path: Path) -> None:
    first = run(tmp_path / "data")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    reads = source.reads
    assert run(tmp_path / "data", batch_size=7, threads=2) == first  # these do not change the content
    assert source.reads == reads
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == stamps


def test_content_does_not_depend_on_the_batch_size(source: RandomImages, tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two", batch_size=7)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    # The scale is a float64 sum over batches; equal to the last digits, so the float16 latents are equal bit by bit.
    assert {name: data for name, data in one.items() if name != "dataset.json"} == {
        name: data for name, data in two.items() if name != "dataset.json"
    }


def test_other_settings_in_the_same_place_are_an_error(source: RandomImages, tmp_path: Path) -> None:
    run(tmp_path / "data")
    with pytest.raises(ValueError, match=r"made with prompt_dim=64 \(now 32\).*overwrite=true"):
        run(tmp_path / "data", prompt_dim=32)
    assert run(tmp_path / "data", prompt_dim=32, overwrite=True).prompt_dim == 32
    assert os.listdir(tmp_path) == ["data"]


def test_a_folder_that_is_no_data_set_is_left_alone(source: RandomImages, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a data set"):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_damaged_finished_set_is_an_error(source: RandomImages, tmp_path: Path) -> None:
    run(tmp_path / "data")
    (shard,) = (tmp_path / "data" / "train").rglob("*.zstd")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"shard.00000.mds.zstd has \d+ bytes, dataset.json says"):
        run(tmp_path / "data")
    shard.unlink()
    with pytest.raises(DataError, match="shard.00000.mds.zstd is missing.*overwrite=true"):
        run(tmp_path / "data")
    run(tmp_path / "data", overwrite=True)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "spl', "damaged"),
        ('{"format": 99}', "format 99"),
        ("[]", "format None"),
        ('{"format": 1, "splits": {}}', "damaged: KeyError"),
    ],
)
def test_an_unreadable_description_is_named(source: RandomImages, tmp_path: Path, text: str, message: str) -> None:
    run(tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=f"dataset.json.*{message}"):
        run(tmp_path / "data")


def test_an_edited_description_is_noticed(source: RandomImages, tmp_path: Path) -> None:
    run(tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    content = json.loads(path.read_text())
    content["splits"]["test"][0]["samples"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="was edited"):
        load_description(tmp_path / "data")


def test_without_a_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No data set in .*prepare_data.py"):
        load_description(tmp_path)


def test_a_broken_image_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare_module, "_open_source", lambda config: RandomImages(broken="test-05"))
    with pytest.raises(DataError, match="Sample test-05"):
        run(tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_a_source_without_images_is_an_error(
    monkeypatch: pytest.MonkeyPatch, source: RandomImages, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "samples", lambda split: iter(()))
    with pytest.raises(DataError, match="the source has no images"):
        run(tmp_path / "data")


def test_ctrl_c_leaves_nothing(monkeypatch: pytest.MonkeyPatch, source: RandomImages, tmp_path: Path) -> None:
    samples = source.samples

    def interrupted(split: str) -> Iterator[RawSample]:
        if split == "test":
            raise KeyboardInterrupt
        return samples(split)

    monkeypatch.setattr(source, "samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_latents_outside_float16_are_an_error(source: RandomImages, tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path / "train", TokenTableEncoder(["a"]), 1 << 20, keep_images=False)
    latents_BCHW = torch.zeros(3, 1, 2, 2)
    latents_BCHW[1, 0, 1, 1] = 1e6
    with pytest.raises(DataError, match="Sample train-01: its latents are not finite numbers of float16 range"):
        writer.write(list(source.samples("train"))[:3], latents_BCHW)


def test_images_of_several_sizes_go_to_several_buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = RandomImages()
    samples = list(source.samples("train"))
    wide = [type(s)(f"wide-{s.key}", s.caption, png(np.full((8, 16), i, np.uint8))) for i, s in enumerate(samples)]
    source.samples = lambda split: iter(samples + wide)
    monkeypatch.setattr(prepare_module, "_open_source", lambda config: source)
    description = run(tmp_path / "data")
    buckets = [(bucket.name, bucket.samples, bucket.latent_shape) for bucket in description.buckets("train")]
    assert buckets == [("2x2", 40, (16, 2, 2)), ("2x4", 40, (16, 2, 4))]
    with pytest.raises(ValueError, match="has the buckets 2x2, 2x4"):
        read_all(tmp_path / "data", "train")


def test_a_place_that_cannot_be_written_is_named(source: RandomImages, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write .*file/data.*Choose another out="):
        run(tmp_path / "file" / "data")


KILLED = """
import sys
sys.path.insert(0, {unit!r})
from data_sets import RandomImages
from data_pipeline import prepare as prepare_module
class Slow(RandomImages):
    def samples(self, split):
        for i, sample in enumerate(super().samples(split)):
            if split == "test" and i == 4:
                print("in the middle", flush=True)
                __import__("time").sleep(60)
            yield sample
prepare_module._open_source = lambda config: Slow()
prepare_module.prepare(prepare_module.PrepareConfig(out={out!r}, batch_size=2), show_progress=False)
"""


def test_killed_in_the_middle_never_counts_as_whole(source: RandomImages, tmp_path: Path) -> None:
    out = tmp_path / "data"
    code = KILLED.format(unit=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout.readline() == "in the middle\n"
        assert not out.exists()
        (partial,) = tmp_path.iterdir()
        # A call beside it neither takes it for a set, nor for abandoned.
        run(tmp_path / "other")
        assert partial.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.stdout.close()
    assert not out.exists()
    with pytest.raises(FileNotFoundError):
        load_description(out)
    run(out)
    assert sorted(os.listdir(tmp_path)) == ["data", "other"]  # what was left behind is gone
    assert read_all(out, "test")["latents"].shape == (8, 16, 2, 2)


def test_the_faster_of_two_calls_wins(source: RandomImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both start on a free place; the second finds a finished set when it wants to publish its own."""
    out = tmp_path / "data"
    write_set = prepare_module._write_set

    def overtaken(folder: Path, config: PrepareConfig, show_progress: bool) -> None:
        write_set(folder, config, show_progress)
        monkeypatch.setattr(prepare_module, "_write_set", write_set)
        run(out)

    monkeypatch.setattr(prepare_module, "_write_set", overtaken)
    assert run(out).splits == {"train": 40, "test": 8}
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "cats"}, "source=cats is not known. Choose one of: digits"),
        ({"codec": "jpeg"}, "codec=jpeg is not known"),
        ({"prompt_encoder": "bert"}, "prompt_encoder=bert is not known"),
        ({"decode_device": "tpu"}, "decode_device=tpu is not known"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"shard_mb": 5000}, "shard_mb=5000 is too large"),
        ({"codec": "qwen_image_vae"}, "codec=qwen_image_vae reads pretrained weights: give model_path"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(out="x", **settings)


@pytest.fixture(scope="module")
def tool() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("prepare_data", REPO / "tools" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x", "sorce=digits"], "Unknown key 'sorce'. Keys: out, source, path"),
        (["out=x", "threads=many"], "threads=many"),
        (["out=x", "source=cats"], "source=cats is not known"),
        (["out"], "'out' is not of the form key=value"),
        ([], "out=... is needed"),
        (["out=/proc/self/data"], "Cannot write /proc/self/data"),
    ],
)
def test_the_tool_reports_bad_input_in_one_line(
    tool: Callable[[list[str]], int], capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert tool(arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


def test_the_tool_prepares_the_digits(
    tool: Callable[[list[str]], int], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    start = time.monotonic()
    assert tool([f"out={tmp_path / 'data'}", "source=digits"]) == 0
    took = time.monotonic() - start
    captured = capsys.readouterr()
    assert "4,500 train, 500 test" in captured.out
    assert "4500/4500" in captured.err  # the progress bar
    description = load_description(tmp_path / "data")
    assert description.latent_shape == (16, 8, 8)
    assert len(description.prompts) == 10
    start = time.monotonic()
    assert tool([f"out={tmp_path / 'data'}", "source=digits"]) == 0
    assert time.monotonic() - start < took / 5


def test_the_tools_help_names_every_setting(tool: Callable[[list[str]], int], capsys: pytest.CaptureFixture) -> None:
    assert tool(["--help"]) == 0
    assert "keep_images=True" in capsys.readouterr().out
