"""tools/data.py, and Qwen-Image's own encoders through a whole preparation."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import settings, write_folder
from PIL import Image
from tiny_qwen import write_tiny_text_encoder, write_tiny_vae
from torch.testing import assert_close

from data_pipeline.buckets import crop_box
from data_pipeline.codec import QwenImageCodec, vae_fingerprint
from data_pipeline.decode import CropDecoder
from data_pipeline.description import load_description
from data_pipeline.inspection import rows, verify
from data_pipeline.parts import to_images
from data_pipeline.prepare import prepare
from data_pipeline.prompts import QwenPromptEncoder
from data_pipeline.writing import from_bfloat16_bits

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"), 18)


@pytest.fixture(scope="module")
def root(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several parts, so several shards a bucket."""
    out = tmp_path_factory.mktemp("one") / "set"
    (photos / "broken.jpg").write_bytes(b"")
    (photos / "broken.txt").write_text("a red flower")
    prepare(settings(out, photos), show_progress=False)
    return out


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "own"))


@pytest.fixture(scope="module")
def tool() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("data_tool", REPO / "tools" / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_ls_and_stats(tool: Callable, root: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool(["ls", str(root.parent)]) == 0
    assert "set: 18 train; 3 buckets; latents stored; block_dct, token_table" in capsys.readouterr().out
    assert tool(["stats", str(root)]) == 0
    said = capsys.readouterr().out
    assert "train 16x16: 6 samples (33.3 %), 3 shards" in said
    assert "left out: 1 (empty file)" in said
    assert "tokens: 4 to 7" in said
    assert tool(["ls", str(root / "train")]) == 2


def test_a_whole_set_is_whole(tool: Callable, root: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool(["verify", str(root)]) == 0
    assert "set: whole." in capsys.readouterr().out


def test_damage_is_named(tool: Callable, own: Path, capsys: pytest.CaptureFixture) -> None:
    shard = own / "train" / "16x16" / "shard.00001.mds.zstd"
    content = shard.read_bytes()
    shard.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    assert tool(["verify", str(own)]) == 1
    assert "16x16/shard.00001.mds.zstd is damaged (its xxh64" in capsys.readouterr().out
    shard.unlink()
    assert any("shard.00001.mds.zstd is missing" in problem for problem in verify(load_description(own)))


def test_numbers_and_keys_are_verified(own: Path) -> None:
    from data_sets import PROMPTS

    from data_pipeline.prompts import TokenTableEncoder, vocabulary
    from data_pipeline.source import RawSample
    from data_pipeline.writing import SplitWriter

    shutil.rmtree(own / "train" / "16x16")
    writer = SplitWriter(own / "train", TokenTableEncoder(vocabulary(PROMPTS), dim=4), 1 << 20, keep_images=True)
    samples = [RawSample("twice", PROMPTS[0], b"x"), RawSample("twice", PROMPTS[0], b"x")]
    writer.write(samples, torch.zeros(2, 48, 16, 16))
    writer.finish()
    said = "\n".join(verify(load_description(own)))
    assert "16x16/index.json does not list the shards" in said
    assert "sample twice: prompt embeddings of shape (4, 4), their width is 8" in said
    assert "key twice comes twice" in said


def test_a_contact_sheet_shows_every_bucket(tool: Callable, root: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    assert tool(["show", str(root), f"out={sheet}", "count=9"]) == 0
    with Image.open(sheet) as image:
        assert image.size == (4 * 192, 3 * 236)
        pixels = np.asarray(image)
    for number in range(9):
        top, left = number // 4 * 236, number % 4 * 192
        assert pixels[top : top + 192, left : left + 192].std() > 10  # a photograph
        assert (pixels[top + 192 : top + 236, left : left + 192] < 100).any()  # its caption
    assert (pixels[2 * 236 :, 192:] == 255).all()
    assert tool(["show", str(root), "count=none"]) == 2
    assert tool(["show", str(root), "cout=3"]) == 2


def test_merging(tool: Callable, root: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    for i, path in enumerate(sorted(photos.glob("*.jpg"))[:9]):
        (other / f"again-{i}.jpg").write_bytes(path.read_bytes())
        (other / f"again-{i}.txt").write_text("a red flower")
    prepare(settings(tmp_path / "two", other, like=str(root)), show_progress=False)
    assert tool(["merge", str(tmp_path / "both"), str(root), str(tmp_path / "two")]) == 0
    merged = load_description(tmp_path / "both")
    assert merged.splits == {"train": 26}
    assert verify(merged) == []
    (name,) = [bucket for bucket in merged.buckets("train") if bucket.name == "16x16"]
    keys = [row["key"] for row in rows(merged, "train", name)]
    firsts = [row["key"] for one in (root, tmp_path / "two") for row in rows_of(one, "16x16")]
    assert keys == firsts
    assert tool(["merge", str(tmp_path / "both2"), str(root), str(tmp_path / "both")]) == 2
    assert "share a shard" in capsys.readouterr().err
    prepare(settings(tmp_path / "unlike", other), show_progress=False)
    assert tool(["merge", str(tmp_path / "both2"), str(root), str(tmp_path / "unlike")]) == 2
    assert "differ in codec" in capsys.readouterr().err
    assert tool(["merge", str(tmp_path / "both"), str(root), str(tmp_path / "two")]) == 2


def rows_of(root: Path, name: str) -> list[dict]:
    description = load_description(root)
    return [
        row
        for bucket in description.buckets("train")
        if bucket.name == name
        for row in rows(description, "train", bucket)
    ]


def test_unknown_verbs(tool: Callable, capsys: pytest.CaptureFixture) -> None:
    assert tool(["lst", "x"]) == 2
    assert "Choose one of: ls, verify, stats, show, merge" in capsys.readouterr().err
    assert tool([]) == 2
    assert tool(["verify"]) == 2


def test_qwen_images_own_encoders(photos: Path, tmp_path: Path) -> None:
    """Latents and embeddings in the shards are those that the loaded models give, one image and prompt at a time."""
    folder = write_tiny_text_encoder(write_tiny_vae(tmp_path / "qwen"))
    models = {"codec": "qwen_image_vae", "prompt_encoder": "qwen2_5_vl", "model_path": str(folder)}
    description = prepare(settings(tmp_path / "set", photos, batch_size=3, **models), show_progress=False)
    assert json.loads(json.dumps(dict(description.codec))) == {
        "kind": "qwen_image_vae",
        "path": str(folder),
        "dtype": "float32",
        "weights": vae_fingerprint(folder / "vae"),
    }
    assert description.prompt_dim == 32
    codec, encoder, decoder = QwenImageCodec(folder), QwenPromptEncoder(folder), CropDecoder(3)
    count = 0
    for bucket in description.buckets("train"):
        assert bucket.latent_shape[0] == 4
        for row in list(rows(description, "train", bucket))[:2]:
            with Image.open(photos / row["key"]) as image:
                size = image.size[::-1]
            target = 2 * bucket.latent_shape[1], 2 * bucket.latent_shape[2]
            pixels_1hwc, _ = decoder.crop([row["image"]], [size], [crop_box(size, target)], target)
            (want_CHW,) = codec.encode(to_images(pixels_1hwc, "cpu"))
            assert_close(torch.from_numpy(row["latents"].copy()).float(), want_CHW, rtol=1e-3, atol=1e-3)
            got_LD, (want_LD,) = from_bfloat16_bits(row["prompt_embeds"]).float(), encoder.encode([row["prompt"]])
            assert got_LD.shape == want_LD.shape
            assert (got_LD - want_LD).abs().mean() < 0.02  # a bf16 model: its rounding depends on the batch
            count += 1
    assert count == 6
