"""data_pipeline/codec.py: the block transform against scipy, the VAE's normalisation against diffusers' own formula."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from tiny_qwen import write_tiny_vae
from torch.testing import assert_close

from data_pipeline.codec import BlockCodec, QwenImageCodec, load_codec


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_block_codec_is_scipys_cosine_transform_of_each_block() -> None:
    images_Bchw = random_images(2, 1, 8, 12)
    latents_BCHW = BlockCodec(scale=0.5).encode(images_Bchw)
    assert latents_BCHW.shape == (2, 16, 2, 3)
    block = images_Bchw[1, 0, 4:8, 8:12].double().numpy()
    want = 0.5 * dctn(block, type=2, norm="ortho").reshape(16)
    assert_close(latents_BCHW[1, :, 1, 2].double(), torch.from_numpy(want), rtol=0, atol=1e-6)


def test_block_codec_is_orthogonal() -> None:
    images_Bchw = random_images(3, 2, 8, 8)
    latents_BCHW = BlockCodec(image_channels=2).encode(images_Bchw)
    assert latents_BCHW.shape == (3, 32, 2, 2)
    assert_close(latents_BCHW.square().sum(), images_Bchw.square().sum())
    gram = torch.einsum("aCHW,bCHW->ab", latents_BCHW, latents_BCHW)
    assert_close(gram, torch.einsum("achw,bchw->ab", images_Bchw, images_Bchw))


@pytest.mark.parametrize(("channels", "block"), [(1, 4), (3, 4), (1, 8), (1, 1)])
def test_block_codec_round_trip(channels: int, block: int) -> None:
    codec = BlockCodec(channels, block, scale=1.7)
    images_Bchw = random_images(2, channels, 16, 24)
    latents_BCHW = codec.encode(images_Bchw)
    assert latents_BCHW.shape == (2, codec.latent_channels, 16 // codec.downscale, 24 // codec.downscale)
    assert_close(codec.decode(latents_BCHW), images_Bchw, rtol=0, atol=1e-6)


def test_image_channels_do_not_mix() -> None:
    codec = BlockCodec(image_channels=3)
    images_Bchw = torch.zeros(1, 3, 4, 4)
    images_Bchw[:, 1] = 1.0
    latents_C = codec.encode(images_Bchw).flatten()
    assert_close(latents_C[16], torch.tensor(4.0))  # the second channel's mean, times the block edge
    assert latents_C.abs().sum() == latents_C[16]


def test_decode_clamps_to_the_range_of_images() -> None:
    assert BlockCodec().decode(torch.full((1, 16, 1, 1), 9.0)).abs().max() == 1.0


def test_descriptions_are_json_and_rebuild_the_codec() -> None:
    codec = BlockCodec(3, 4, scale=1.25)
    again = load_codec(json.loads(json.dumps(codec.describe())))
    images_Bchw = random_images(1, 3, 8, 8)
    assert torch.equal(codec.encode(images_Bchw), again.encode(images_Bchw))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="Unknown codec kind 'jpeg'"):
        load_codec({"kind": "jpeg"})
    with pytest.raises(ValueError, match="scale=0"):
        BlockCodec(scale=0)
    with pytest.raises(ValueError, match="10 x 8 pixels do not split into blocks of 4"):
        BlockCodec().encode(torch.zeros(1, 1, 10, 8))
    with pytest.raises(ValueError, match="1 channel"):
        BlockCodec().encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="16 latent channels, got 4"):
        BlockCodec().decode(torch.zeros(1, 4, 2, 2))


@pytest.fixture(scope="module")
def tiny_vae_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_vae(tmp_path_factory.mktemp("qwen_image")))


def test_qwen_codec_normalises_as_diffusers_does(tiny_vae_folder: str) -> None:
    codec = QwenImageCodec(tiny_vae_folder)
    images_Bchw = random_images(2, 3, 8, 16)
    latents_BCHW = codec.encode(images_Bchw)
    assert latents_BCHW.shape == (2, codec.latent_channels, 8 // codec.downscale, 16 // codec.downscale)
    assert latents_BCHW.dtype == torch.float32
    with torch.no_grad():
        raw_BCFHW = codec._vae.encode(images_Bchw[:, :, None]).latent_dist.mode()
    mean, std = np.array([0.1, -0.2, 0.3, 0.0]), np.array([2.0, 1.5, 0.5, 1.0])
    want = (raw_BCFHW[:, :, 0].double() - torch.from_numpy(mean)[:, None, None]) / torch.from_numpy(std)[:, None, None]
    assert_close(latents_BCHW.double(), want, rtol=1e-5, atol=1e-6)
    drawn_BCHW = codec.encode(images_Bchw, torch.ones_like(latents_BCHW))  # one standard deviation above the mode
    with torch.no_grad():
        width_BCHW = codec._vae.encode(images_Bchw[:, :, None]).latent_dist.std[:, :, 0]
    assert_close(drawn_BCHW - latents_BCHW, (width_BCHW / torch.from_numpy(std)[:, None, None]).float())
    decoded_Bchw = codec.decode(latents_BCHW)
    assert decoded_Bchw.shape == images_Bchw.shape
    with torch.no_grad():
        assert_close(decoded_Bchw, codec._vae.decode(raw_BCFHW).sample[:, :, 0].clamp(-1, 1), rtol=1e-4, atol=1e-5)
    again = load_codec(json.loads(json.dumps(codec.describe())))
    assert torch.equal(again.encode(images_Bchw), latents_BCHW)


def test_another_vae_in_the_same_place_is_refused(tiny_vae_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sampler's load, and before training where the teacher is a pipeline with a VAE of its own."""
    from types import SimpleNamespace

    from piflow_dist.config import ConfigError
    from piflow_dist.launch import preflight

    made_by = QwenImageCodec(tiny_vae_folder).describe()
    other = {**made_by, "weights": "0" * 64}
    with pytest.raises(ValueError, match="is not the one that made these latents .000000000000."):
        load_codec(other)
    config = SimpleNamespace(distill=SimpleNamespace(teacher=tiny_vae_folder), data=SimpleNamespace(root="set"))
    for codec, said in ((made_by, None), (other, "holds latents of another VAE"), ({"kind": "block_dct"}, "has a VAE")):
        monkeypatch.setattr(preflight, "load_description", lambda root, codec=codec: SimpleNamespace(codec=codec))
        if said is None:
            preflight.check_vae(config)
        else:
            with pytest.raises(ConfigError, match=said):
                preflight.check_vae(config)


def test_qwen_codec_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No VAE in .*config.json is missing"):
        QwenImageCodec(tmp_path)


def test_a_large_image_is_decoded_in_tiles(tiny_vae_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a small one is not, whatever was decoded before it."""
    codec = QwenImageCodec(tiny_vae_folder)
    small_BCHW = torch.randn(1, codec.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    want_Bchw = codec.decode(small_BCHW)
    monkeypatch.setattr("data_pipeline.codec.PIXELS_AT_ONCE", (2 * codec.downscale) ** 2)
    for name, pixels in (("min_height", 4), ("min_width", 4), ("stride_height", 3), ("stride_width", 3)):
        setattr(codec._vae, f"tile_sample_{name}", pixels * codec.downscale)
    tiled, whole = [], codec._vae.tiled_decode
    monkeypatch.setattr(codec._vae, "tiled_decode", lambda z, **rest: tiled.append(z.shape) or whole(z, **rest))
    large_Bchw = codec.decode(torch.randn(1, codec.latent_channels, 6, 6))
    assert large_Bchw.shape[2:] == (6 * codec.downscale,) * 2 and len(tiled) == 1
    assert torch.equal(codec.decode(small_BCHW), want_Bchw) and len(tiled) == 1
