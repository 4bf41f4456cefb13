"""Sources of tools/prepare_data.py: the same photographs from folders, tables, archives and shards; hostile files named."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from photos import (
    CAPTIONS,
    cut,
    hostile_files,
    photo_bytes,
    photo_list,
    save,
    settings,
    write_csv,
    write_folder,
    write_mds,
    write_tars,
)
from PIL import Image

from data_pipeline.buckets import crop_box, make_buckets, nearest_bucket
from data_pipeline.codec import load_codec
from data_pipeline.decode import CropDecoder
from data_pipeline.description import DatasetDescription, load_description
from data_pipeline.errors import DataError
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.scan import scan
from data_pipeline.screen import Limits, Unusable, screen_caption, screen_image
from data_pipeline.shards import ShardSet

COUNT = 20
SIZE_OF_SIDES = {(200, 300): "12x20", (300, 200): "20x12", (240, 240): "16x16"}


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, str, bytes]]:
    return photo_list(COUNT)


def run(config) -> DatasetDescription:
    return prepare(config, show_progress=False)


def rows(description: DatasetDescription, split: str = "train") -> dict[str, dict]:
    shards = ShardSet(description, split)
    return {row["key"]: row for row in (shards[i] for i in range(shards.size))}


def test_a_folder_holds_what_went_in(tmp_path: Path, photos: list[tuple[str, str, bytes]]) -> None:
    description = run(settings(tmp_path / "set", write_folder(tmp_path / "photos", COUNT)))
    assert description.splits == {"train": COUNT}
    assert description.left_out == description.changed == {}
    assert description.prompts == tuple(sorted(CAPTIONS.values()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "set"]  # the parts are gone
    got, codec = rows(description), load_codec(description.codec)
    buckets = Counter()
    for name, caption, encoded in photos:
        row = got[f"{name}.jpg"]
        assert (row["prompt"], row["image"]) == (caption, encoded)
        image = Image.open(io.BytesIO(encoded))
        h, w = (4 * side for side in row["latents"].shape[1:])
        buckets[f"{h // 4}x{w // 4}"] += 1
        assert f"{h // 4}x{w // 4}" == SIZE_OF_SIDES[image.size[::-1]]
        top, left, bottom, right = crop_box(image.size[::-1], (h, w))
        want = image.resize((w, h), Image.BICUBIC, box=(left, top, right, bottom))
        decoded_1chw = codec.decode(torch.from_numpy(row["latents"].copy())[None].float())
        pixels_hwc = ((decoded_1chw[0] + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(pixels_hwc - np.asarray(want)).mean() < 1.0  # of 255: other decoders, float16
    assert {bucket.name: bucket.samples for bucket in description.buckets("train")} == buckets
    order = list(got)  # bucket by bucket, each in the order of the source
    at = 0
    for bucket in description.buckets("train"):
        assert order[at : at + bucket.samples] == sorted(order[at : at + bucket.samples])
        at += bucket.samples


def table_of(photos: list[tuple[str, str, bytes]]) -> list[dict]:
    return [{"image": f"{name}.jpg", "caption": caption} for name, caption, _ in photos]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_name_the_same_samples(tmp_path: Path, photos: list[tuple[str, str, bytes]], suffix: str) -> None:
    write_folder(tmp_path / "photos", 0)
    table = tmp_path / f"list.{suffix}"
    lines = table_of(photos)
    match suffix:
        case "jsonl":
            table.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), table)
        case _:
            sign = "\t" if suffix == "tsv" else ","
            table.write_text("".join(sign.join(row) + "\n" for row in [lines[0].keys(), *(r.values() for r in lines)]))
    items = list(scan("table", table, tmp_path / "photos", "image", "caption"))
    assert [(item.key, item.caption) for item in items] == [(f"{name}.jpg", caption) for name, caption, _ in photos]
    assert items[3].image.path == str(tmp_path / "photos" / f"{photos[3][0]}.jpg")
    with pytest.raises(DataError, match="no column 'text'; there are: image, caption. Set image_column and caption"):
        list(scan("table", table, None, "image", "text"))


def test_several_captions_of_one_image_are_several_samples(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n' * 2)
    assert [item.key for item in scan("table", tmp_path / "list.jsonl", None, "image", "caption")] == [
        "a.jpg",
        "a.jpg#2",
    ]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd"])
def test_a_table_cannot_point_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    with pytest.raises(DataError, match="row 1: .* lies outside of .* Set image_root"):
        list(scan("table", tmp_path / "list.jsonl", None, "image", "caption"))


def without_keys(description: DatasetDescription) -> list[tuple]:
    return sorted((row["prompt"], row["image"], row["latents"].tobytes()) for row in rows(description).values())


def test_archives_and_shards_give_the_same_rows(tmp_path: Path) -> None:
    """One scale for all: each takes codec and prompt encoder over from the first."""
    first = run(settings(tmp_path / "first", write_csv(tmp_path / "photos", COUNT), source="table"))
    want, like = without_keys(first), str(tmp_path / "first")
    tars = run(settings(tmp_path / "b", write_tars(tmp_path / "tars", COUNT), source="webdataset", like=like))
    assert without_keys(tars) == want
    assert "00001.tar/flower-006" in rows(tars)
    zipped = write_mds(tmp_path / "mds", COUNT, "zstd:3")
    shards = run(settings(tmp_path / "c", zipped, source="mds", like=like))
    assert without_keys(shards) == want
    assert len(list(zipped.glob("*.zstd"))) > 2
    plain = write_mds(tmp_path / "plain", COUNT, None)
    assert run(settings(tmp_path / "d", plain, source="mds", like=like)).splits == {"train": COUNT}


def test_a_damaged_archive_or_shard_stops_with_its_name(tmp_path: Path) -> None:
    tar = sorted(write_tars(tmp_path / "tars", 10).glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"00001.tar is cut short inside .*Fetch the archive again"):
        run(settings(tmp_path / "set", tmp_path / "tars", source="webdataset"))
    tar.write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"00001.tar cannot be read as a .tar"):
        run(settings(tmp_path / "set", tmp_path / "tars", source="webdataset"))
    shard = sorted(write_mds(tmp_path / "mds", 10, "zstd:3").glob("*.zstd"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match=r"shard.00000.mds.zstd is damaged \(its xxh64"):
        run(settings(tmp_path / "set2", tmp_path / "mds", source="mds"))


def test_pickles_in_shards_are_never_read(tmp_path: Path) -> None:
    from streaming import MDSWriter

    columns = {"image": "pkl", "caption": "str"}
    with MDSWriter(out=str(tmp_path / "mds"), columns=columns) as writer:
        writer.write({"image": b"x", "caption": "x"})
    with pytest.raises(DataError, match="of kinds 'pkl' and 'str', not an encoded image"):
        list(scan("mds", tmp_path / "mds", None, "image", "caption"))


def test_members_of_archives_are_read_in_place(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("../../a.jpg", b"image"), ("../../a.json", b'{"caption": "x"}'), ("b.txt", b"no image")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (item,) = scan("webdataset", tmp_path / "x.tar", None, "image", "caption")
    assert item.key == "x.tar/../../a" and item.image.path == str(tmp_path / "x.tar")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_prompts_alone(tmp_path: Path, suffix: str) -> None:
    prompts = [f"a prompt of number {i}" for i in range(11)]
    path = tmp_path / f"prompts.{suffix}"
    match suffix:
        case "txt":
            path.write_text("\n".join(prompts) + "\n\n")
        case "jsonl":
            path.write_text("".join(json.dumps({"caption": prompt}) + "\n" for prompt in prompts))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"caption": prompts}), path)
    description = run(settings(tmp_path / "set", path, source="prompts", resolution=64))
    assert (description.latents, description.splits, description.latent_shape) == ("none", {"train": 11}, (48, 16, 16))
    got = rows(description)
    assert [row["prompt"] for row in got.values()] == prompts
    assert set(got["000000001"]) == {"key", "prompt", "prompt_embeds"}


OUTCOMES = {
    "empty.jpg": "empty file",
    "text.jpg": "not an image",
    "cut.jpg": "damaged image",
    "cut.png": "damaged image",
    "head.png": "not an image",
    "bomb.png": "too many pixels",
    "animated.gif": "animated",
    "animated.webp": "animated",
    "tiny.png": "too small",
    "float.tiff": "pixels of an unknown kind",
}
CHANGES = {
    "cmyk.jpg": "CMYK converted",
    "sixteen.png": "I;16 converted",
    "alpha.png": "alpha laid on white",
    "palette.gif": "P converted",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("hostile") / "photos", 6)
    for name, content in hostile_files().items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a red flower")
    (folder / "alone.jpg").write_bytes(photo_bytes("flower"))  # no caption
    for name, caption in (("latin", "caf\xe9".encode("latin-1")), ("blank", b" \n\x00\x07"), ("list", None)):
        (folder / f"{name}.jpg").write_bytes(photo_bytes("flower"))
        if caption is None:
            (folder / f"{name}.json").write_text("[1, 2")
        else:
            (folder / f"{name}.txt").write_bytes(caption)
    (folder / "bell.jpg").write_bytes(photo_bytes("flower"))
    (folder / "bell.txt").write_bytes("a \x07red\x00\u202e flower".encode())
    (folder / "long.jpg").write_bytes(photo_bytes("flower"))
    (folder / "long.txt").write_text("word " * 20_000)
    return folder


def test_hostile_files_are_left_out_counted_and_named(hostile: Path, tmp_path: Path, caplog) -> None:
    description = run(settings(tmp_path / "set", hostile, min_side=16, max_pixels=10_000_000))
    wanted = Counter(OUTCOMES.values()) + Counter(
        ["no caption", "no caption", "caption is not UTF-8", "caption file is not JSON"]
    )
    assert description.left_out == dict(sorted(wanted.items()))
    notes = Counter(CHANGES.values()) + Counter(["control characters removed", "caption shortened"])
    assert description.changed == dict(sorted(notes.items()))
    named = [json.loads(line) for line in (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"] for entry in named if entry["key"] in OUTCOMES} == OUTCOMES
    assert "left out: 2 of" in caplog.text and "(damaged image)" in caplog.text
    got = rows(description)
    assert len(got) == description.splits["train"] == 6 + len(CHANGES) + 1 + 2
    assert got["bell.jpg"]["prompt"] == "a red flower"
    assert len(got["long.jpg"]["prompt"]) == 3999 and got["long.jpg"]["prompt"].endswith("word")
    decoded = load_codec(description.codec).decode(torch.from_numpy(got["alpha.png"]["latents"].copy())[None].float())
    assert decoded.min() > 0.98  # a transparent image is white
    decoded = load_codec(description.codec).decode(torch.from_numpy(got["sixteen.png"]["latents"].copy())[None].float())
    assert abs((decoded.mean() + 1) / 2 - 40_000 / 65_535) < 0.01
    assert load_description(tmp_path / "set").left_out == description.left_out


def test_broken_files_may_stop_the_preparation(hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Sample \S+: .*Repair or remove it, or set broken=drop"):
        run(settings(tmp_path / "set", hostile, broken="stop", max_pixels=10_000_000))
    assert not (tmp_path / "set").exists()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 1)
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match="None of the 1 samples of .* can be used: 1 x no caption"):
        run(settings(tmp_path / "set", folder))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing has no samples for source=folder"):
        run(settings(tmp_path / "set2", tmp_path / "nothing"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_is_applied_before_the_crop(format: str, orientation: int) -> None:
    image = cut("officer", 0, 120, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    screened = screen_image(save(image, format, exif=exif), Limits())
    upright = image.rotate({3: 180, 6: -90, 8: 90}[orientation], expand=True)
    assert screened.size == upright.size[::-1]
    bucket = nearest_bucket(screened.size, make_buckets(64, 16, 2.0))
    box = crop_box(screened.size, bucket)
    pixels, faults = CropDecoder(3).crop([screened.encoded], [screened.size], [box], bucket)
    want = upright.resize(bucket[::-1], Image.BICUBIC, box=(box[1], box[0], box[3], box[2]))
    assert not faults
    assert np.abs(pixels[0].numpy().astype(float) - np.asarray(want)).mean() < 4  # lossy formats


def test_files_that_do_not_decode_are_told_apart() -> None:
    good, bad = photo_bytes("flower"), photo_bytes("flower")[:30_000]
    decoder, bucket = CropDecoder(3, batch_size=2), (64, 64)
    files, box = [good, bad, bad, good, good], crop_box((427, 640), bucket)
    pixels, faults = decoder.crop(files, [(427, 640)] * 5, [box] * 5, bucket, [False, False, False, True, False])
    assert pixels.shape == (3, 64, 64, 3) and sorted(faults) == [1, 2]
    assert torch.equal(pixels[0], pixels[2]) and torch.equal(pixels[0], pixels[1].flip(1))


def test_buckets() -> None:
    buckets = make_buckets(1024, 64, 2.0)
    assert (1024, 1024) in buckets and (768, 1344) in buckets and (1344, 768) in buckets
    for h, w in buckets:
        assert h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w) and abs(h * w / 1024**2 - 1) < 0.04
    assert nearest_bucket((300, 299), buckets) == (1024, 1024)
    assert nearest_bucket((100, 5000), buckets) == (768, 1344)
    assert nearest_bucket((427, 640), buckets) == (832, 1280)
    assert make_buckets(64, 64, 2.0) == ((64, 64),)
    assert crop_box((427, 640), (64, 64)) == (0, 106.5, 427, 533.5)
    assert crop_box((640, 427), (64, 64), (0.0, 0.5)) == (0, 0, 427, 427)


def test_captions() -> None:
    limits = Limits(max_caption=20)
    assert screen_caption("two\r\n lines\tand  blanks ", limits) == ("two lines and blanks", None)
    assert screen_caption("\ufeffmark".encode(), limits) == ("mark", None)
    assert screen_caption("a\x00b\x9fc", limits) == ("a b c", "control characters removed")
    assert screen_caption("a\u202eb \ud800c", limits) == ("a b c", "control characters removed")
    assert screen_caption("family \U0001f468\u200d\U0001f469", limits)[1] is None  # joiners belong to emoji
    assert screen_caption("word " * 20_000, limits) == ("word word word word", "caption shortened")
    assert screen_caption("x" * 100_000, limits) == ("x" * 20, "caption shortened")
    assert screen_caption(("\u00e9" * 100_000).encode(), limits) == ("\u00e9" * 20, "caption shortened")
    for nothing in (None, "", b"", " \n", "\x00"):
        with pytest.raises(Unusable, match="no caption"):
            screen_caption(nothing, limits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "source=folder needs path="),
        ({"resolution": None}, "source=folder needs resolution="),
        ({"resolution": 8}, "resolution=8 is smaller than bucket_step=16"),
        ({"max_aspect": 0.5}, "max_aspect=0.5 must be at least 1"),
        ({"test_share": 1.0}, r"test_share=1.0 must lie in \[0, 1\)"),
        ({"latents": "online", "keep_images": False}, "keep_images=false leaves nothing"),
        ({"source": "digits"}, "source=digits takes no path"),
        ({"broken": "repair"}, "broken=repair is not known"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(out="x", **{"source": "folder", "path": "y", "resolution": 64, "bucket_step": 16} | changes)


def test_a_step_that_does_not_fit_the_codec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bucket_step=20 is not a multiple of 8 .*Use bucket_step=16"):
        run(settings(tmp_path / "set", write_folder(tmp_path / "photos", 1), bucket_step=20))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="path=.*nowhere does not exist"):
        run(settings(tmp_path / "set", tmp_path / "nowhere"))
