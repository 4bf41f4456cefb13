"""Encoders of FLUX.1 and ImageNet models: against diffusers' own pipelines on tiny parts, and through the tool."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import photo_list, settings, write_folder
from tiny_flux import write_tiny_flux, write_tiny_kl
from tiny_qwen import write_tiny_text_encoder, write_tiny_vae
from torch.testing import assert_close

from data_pipeline.class_labels import ClassLabelEncoder, in_label_order, read_labels
from data_pipeline.codec import AutoencoderKLCodec, BlockCodec, QwenImageCodec, downscale_of, load_codec, vae_downscale
from data_pipeline.compat import repair_torchvision
from data_pipeline.description import load_description
from data_pipeline.empty_prompt import read_empty_prompt
from data_pipeline.errors import DataError
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.prompts import QwenPromptEncoder, TokenTableEncoder, load_prompt_encoder
from data_pipeline.shared import pretrained_codec
from data_pipeline.stream import LatentStream, read_all
from data_pipeline.synthetic import write_random_set
from data_pipeline.t5_clip import T5ClipEncoder
from piflow_dist.config import ConfigError, load_config
from piflow_dist.launch.preflight import check_data
from piflow_dist.sampling.settings import load_dataset

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def sd_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_kl(tmp_path_factory.mktemp("sd_vae"))


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_t5_clip_matches_diffusers_pipeline(flux: Path) -> None:
    repair_torchvision()
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(flux / "text_encoder").eval(),
        tokenizer=CLIPTokenizer.from_pretrained(flux / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(flux / "text_encoder_2").eval(),
        tokenizer_2=T5TokenizerFast.from_pretrained(flux / "tokenizer_2"),
    )
    prompts = ["a cat", "", "A Café, 12 cats", "a prompt longer than both limits " * 3]
    with torch.no_grad():
        tokens_BLD, pooled_BD, _ = pipeline.encode_prompt(prompts, device="cpu", max_sequence_length=40)
    encoder = T5ClipEncoder(flux, dtype=torch.float32, max_tokens=40)
    assert (encoder.dim, encoder.pooled_dim) == (24, 16)
    got_BLD = torch.stack(encoder.encode(prompts))
    assert got_BLD.shape == (4, 41, 24)
    assert_close(got_BLD[:, 1:], tokens_BLD, rtol=1e-4, atol=1e-5)
    assert_close(got_BLD[:, 0, :16], pooled_BD, rtol=1e-4, atol=1e-5)
    assert not got_BLD[:, 0, 16:].any()
    again = load_prompt_encoder(json.loads(json.dumps(encoder.describe())))
    assert torch.equal(torch.stack(again.encode(prompts)), got_BLD)
    assert [encoder.cut(prompt) for prompt in prompts[:3]] == ["", "", ""]
    t5, clip = encoder.cut(prompts[3]).split("; ")
    assert t5 == f"T5 reads 39 of its 99 tokens, and nothing from '{prompts[3][39:79].lstrip()}...' on"
    assert clip.startswith("CLIP reads 18 of its 81 tokens, and nothing from ") and encoder.cut("a " * 19)[:4] == "CLIP"


def test_models_are_read_to_their_device_at_once(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the size of a VAE's latents is known before it is."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    read, device = [], torch.device("cpu")
    for base in (ModelMixin, PreTrainedModel):

        def spy(cls, *arguments, _whole=base.from_pretrained.__func__, **options):
            read.append((cls.__name__, options["device_map"]))
            return _whole(cls, *arguments, **options)

        monkeypatch.setattr(base, "from_pretrained", classmethod(spy))
    qwen = write_tiny_text_encoder(write_tiny_vae(tmp_path))
    codecs = [AutoencoderKLCodec(flux, device=device), QwenImageCodec(qwen, device=device)]
    assert [downscale_of(codec.describe()) for codec in codecs] == [codec.downscale for codec in codecs] == [2, 2]
    T5ClipEncoder(flux, device=device)
    QwenPromptEncoder(qwen, device=device)
    vaes, encoders = ["AutoencoderKL", "AutoencoderKLQwenImage"], ["CLIPTextModel", "T5EncoderModel"]
    assert read == [(name, {"": device}) for name in (*vaes, *encoders, "Qwen2_5_VLForConditionalGeneration")]
    shutil.rmtree(qwen / "vae")
    vae_downscale.cache_clear()
    with pytest.raises(FileNotFoundError, match="No VAE in"):
        downscale_of(codecs[1].describe())


def test_t5_clip_without_weights(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(FileNotFoundError, match="has no text_encoder/ folder.*local FLUX.1 model"):
        T5ClipEncoder(tmp_path)


def test_pickled_weights_are_not_read(flux: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(flux / "vae").save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert list((tmp_path / "vae").glob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderKLCodec(tmp_path)


def test_flux_vae_matches_diffusers_pipeline(flux: Path) -> None:
    repair_torchvision()
    from diffusers import AutoencoderKL, FluxKontextPipeline

    vae = AutoencoderKL.from_pretrained(flux / "vae").eval()
    none = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"))
    images_Bchw = random_images(2, 3, 8, 16)
    with torch.no_grad():
        want_BCHW = FluxKontextPipeline(vae=vae, **none)._encode_vae_image(images_Bchw, generator=None)
        whole_Bchw = vae.decode(vae.encode(images_Bchw).latent_dist.mode()).sample.clamp(-1, 1)
    codec = AutoencoderKLCodec(flux)
    assert (codec.latent_channels, codec.image_channels, codec.downscale) == (16, 3, 2)
    got_BCHW = codec.encode(images_Bchw)
    assert got_BCHW.shape == (2, 16, 4, 8) and got_BCHW.dtype == torch.float32
    assert_close(got_BCHW, want_BCHW, rtol=1e-4, atol=1e-5)
    assert_close(codec.decode(got_BCHW), whole_Bchw, rtol=1e-3, atol=1e-5)
    again = load_codec(json.loads(json.dumps(codec.describe())))
    assert torch.equal(again.encode(images_Bchw), got_BCHW)


def test_sd_vae_is_scaled_and_not_shifted(sd_vae: Path) -> None:
    from diffusers import AutoencoderKL

    images_Bchw = random_images(2, 3, 8, 8)
    with torch.no_grad():
        mode_BCHW = AutoencoderKL.from_pretrained(sd_vae).eval().encode(images_Bchw).latent_dist.mode()
    got_BCHW = AutoencoderKLCodec(sd_vae).encode(images_Bchw)
    assert got_BCHW.shape == (2, 4, 4, 4)
    assert_close(got_BCHW, 0.18215 * mode_BCHW, rtol=1e-4, atol=1e-6)


def test_latents_may_be_drawn_from_the_posterior(sd_vae: Path, tmp_path: Path) -> None:
    """By each image's key: the same in batches and parts of any size, of the posterior's mean and width; and not the modes."""
    from diffusers import AutoencoderKL

    photos = write_folder(tmp_path / "photos", 12)
    made = {}
    for name, posterior, parts in (("one", "sample", 8), ("other", "sample", 3), ("modes", "mode", 8)):
        config = settings(
            tmp_path / name, photos, codec="autoencoder_kl", model_path=str(sd_vae), posterior=posterior,
            samples_per_part=parts, batch_size=parts, resolution=32, bucket_step=16, max_aspect=1,
        )  # fmt: skip
        prepare(config, show_progress=False)
        rows = read_all(tmp_path / name, "train")
        made[name] = dict(zip(rows["keys"], rows["latents"], strict=True))
    images = dict(zip(rows["keys"], rows["images"], strict=True))
    vae, draws = AutoencoderKL.from_pretrained(sd_vae).eval(), []
    for key, latents_CHW in made["one"].items():
        assert_close(made["other"][key], latents_CHW, rtol=0, atol=1e-3)  # a network rounds otherwise in other batches
        with torch.no_grad():
            posterior = vae.encode(_resized(images[key])).latent_dist
        draws.append((latents_CHW - made["modes"][key]) / (0.18215 * posterior.std[0]))
    draws = torch.stack(draws)
    assert abs(draws.mean()) < 0.1 and 0.9 < draws.std() < 1.1
    assert (draws[0] - draws[1]).abs().max() > 0.5, "every image has a noise of its own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "digits"}, "posterior=sample draws latents as they are stored, not with source=digits"),
        (
            {"source": "folder", "path": "x", "resolution": 64, "latents": "online"},
            "not with source=folder and latents=online",
        ),
        ({"source": "folder", "path": "x", "resolution": 64}, "codec=block_dct has no posterior"),
        ({"source": "folder", "path": "x", "resolution": 64, "posterior": "mean"}, "posterior=mean is not known"),
    ],
)
def test_where_there_is_no_posterior(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PrepareConfig(out="x", **{"posterior": "sample", **changes})
    with pytest.raises(ValueError, match="no posterior to draw from"):
        BlockCodec().encode(torch.zeros(1, 1, 8, 8), torch.zeros(1, 16, 2, 2))


def test_another_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No VAE in .*config.json is missing"):
        AutoencoderKLCodec(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLQwenImage"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKLQwenImage, not an AutoencoderKL"):
        AutoencoderKLCodec(tmp_path)


def test_class_labels_are_one_hot() -> None:
    encoder = ClassLabelEncoder(["n2", "n1", "n3"], ["crane", "tench", "crane"])
    rows = torch.stack(encoder.encode(["n2", "n3", "tench", ""]))
    assert rows.shape == (4, 1, 4) and rows.dtype == torch.float32
    assert rows[:, 0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert encoder.dim == 4 and encoder.encode([]) == []
    again = load_prompt_encoder(json.loads(json.dumps(encoder.describe())))
    assert torch.equal(torch.stack(again.encode(["n2", "n3", "tench", ""])), rows)
    with pytest.raises(ValueError, match="'crane' is the name of several classes. Write one of: n2, n3"):
        encoder.encode(["crane"])
    with pytest.raises(ValueError, match=r"'cat' is none of the 3 classes \(n2, n1, n3\)"):
        encoder.encode(["n1", "cat"])
    with pytest.raises(ValueError, match="each with a name of its own"):
        ClassLabelEncoder(["a", "a"])


def test_files_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "synsets.txt"
    path.write_text("n02 goldfish, Carassius auratus\n\nn01  tench\n")
    encoder = read_labels(path)
    assert encoder.classes == ["n02", "n01"] and encoder.names == ["goldfish, Carassius auratus", "tench"]
    path.write_text("great white\ta shark\nold  cat\t a cat\n")
    assert read_labels(path).classes == ["great white", "old  cat"] and read_labels(path).names == ["a shark", "a cat"]
    path.write_text("n02\nn01\n")
    assert read_labels(path).names == []
    for text, message in (("n02 a\nn01\n", "line 2: has no name"), ("a\na\n", "of its own"), ("", "needs classes")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"labels=.*{message}"):
            read_labels(path)
    assert in_label_order({"10", "9", "b", "a"}) == ["9", "10", "a", "b"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in folders of classes, one of them a folder deeper."""
    root = tmp_path_factory.mktemp("classes")
    for name, _, encoded in photo_list(12):
        folder = root / {"flower": "n01", "officer": "n02/part", "temple": "n03"}[name.split("-")[0]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.JPEG").write_bytes(encoded)
    return root


def test_class_folders_to_latents_from_the_command_line(classes: Path, sd_vae: Path, tmp_path: Path) -> None:
    """ImageNet's recipe at its smallest, to a batch of training and to what the sampler asks for."""
    (tmp_path / "labels.txt").write_text("n03 temple\nn00 nothing\nn01 flower\nn02 officer\n")
    done = subprocess.run(
        [
            *(sys.executable, "tools/prepare_data.py", f"out={tmp_path / 'set'}", "source=folder", f"path={classes}"),
            *("captions=folders", "codec=autoencoder_kl", f"model_path={sd_vae}", "prompt_encoder=class_labels"),
            *(f"labels={tmp_path / 'labels.txt'}", "resolution=32", "bucket_step=16", "max_aspect=1"),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'set'}: 12 train\n"
    description = load_description(tmp_path / "set")
    assert description.latent_shape == (4, 16, 16) and description.prompt_dim == 5
    assert description.prompts == ("n01", "n02", "n03")
    rows = read_all(tmp_path / "set", "train")
    assert set(zip(rows["prompts"], [key.split("/")[-1].split("-")[0] for key in rows["keys"]], strict=True)) == {
        ("n01", "flower"),
        ("n02", "officer"),
        ("n03", "temple"),
    }
    encoder = load_prompt_encoder(description.prompt_encoder)
    assert torch.equal(rows["prompt_embeds"], torch.stack(encoder.encode(rows["prompts"])))
    assert encoder.encode(["temple"])[0].tolist() == [[1, 0, 0, 0, 0]]
    batch = LatentStream(tmp_path / "set", "train", batch_size=4, seed=0).next()
    assert batch["prompt_embeds"].shape == (4, 1, 5) and batch["prompt_mask"].all()
    # Latents are the VAE's, of the pixels that the shard keeps.
    decoded = AutoencoderKLCodec(sd_vae).encode(_resized(rows["images"][0]))
    assert_close(rows["latents"][:1], decoded, rtol=0, atol=0.1)


def _resized(encoded: bytes) -> torch.Tensor:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    w, h = image.size
    side = min(w, h)
    box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
    pixels = np.asarray(image.resize((32, 32), Image.BICUBIC, box=box), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def test_a_model_of_another_pooled_width_is_refused(tmp_path: Path) -> None:
    """By training and by sampling, before a process is started; a set that does not say its width is taken."""
    encoder = TokenTableEncoder(["red"], dim=64)
    encoder.pooled_dim = 16
    write_random_set(tmp_path / "set", prompts=("red",), encoder=encoder)
    write_random_set(tmp_path / "older", prompts=("red",), dim=64)
    run = (
        "model=flux_tiny",
        "run_dir=run",
        "distill.teacher=teacher",
        "distill.guidance.scale=3.5",
        "train.batch_size=4",
    )
    said = r"holds pooled prompts of width 16, the model wants (model.pooled_projection_dim=)?24"
    config = load_config([*run, f"data.root={tmp_path / 'set'}"])
    for check in (check_data, load_dataset):
        with pytest.raises(ConfigError, match=said):
            check(config)
        check(load_config([*run, f"data.root={tmp_path / 'set'}", "model.pooled_projection_dim=16"]))
        check(load_config([*run, f"data.root={tmp_path / 'older'}"]))


def test_flux_from_captions(flux: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "set",
        write_folder(tmp_path / "photos", 6),
        codec="autoencoder_kl",
        prompt_encoder="t5_clip",
        model_path=str(flux),
        max_tokens=24,
    )
    description = prepare(config, show_progress=False)
    assert description.latent_channels == 16 and description.prompt_dim == 24
    assert description.pooled_dim == load_description(tmp_path / "set").pooled_dim == 16
    assert description.changed == {"caption cut at the text encoder's tokens": 2}  # the two of the temple
    batch = LatentStream(tmp_path / "set", "train", batch_size=1, seed=0).next()
    assert batch["prompt_embeds"].shape == (1, 25, 24) and batch["prompt_mask"].all()
    (want_LD,) = load_prompt_encoder(description.prompt_encoder).encode(batch["prompts"])
    assert torch.equal(batch["prompt_embeds"][0], want_LD.bfloat16().float())
    # Training asks for "" alone, and needs no encoder for it.
    (empty_LD,) = load_prompt_encoder(description.prompt_encoder).encode([""])
    without = replace(description, prompt_encoder={"kind": "moved away"})
    assert torch.equal(read_empty_prompt(without), empty_LD.bfloat16().float())
    older = replace(description, empty_prompt=None)
    assert torch.equal(read_empty_prompt(older), empty_LD)
    file = tmp_path / "set" / "empty_prompt.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="empty_prompt.safetensors is damaged"):
        read_empty_prompt(description)
    file.unlink()
    with pytest.raises(DataError, match="empty_prompt.safetensors is missing"):
        prepare(config, show_progress=False)


def test_classes_of_digits_and_what_is_refused(classes: Path, tmp_path: Path) -> None:
    run = {"show_progress": False}
    plain = settings(tmp_path / "a", classes, captions="folders", prompt_encoder="class_labels", latents="online")
    assert prepare(plain, **run).prompt_encoder["classes"] == ["n01", "n02", "n03"]
    (tmp_path / "labels.txt").write_text("n01\nn02\n")
    with pytest.raises(DataError, match=r"labels.txt does not fit to path=.*'n03' is none of the 2 classes"):
        labels = str(tmp_path / "labels.txt")
        prepare(
            settings(tmp_path / "b", classes, captions="folders", prompt_encoder="class_labels", labels=labels), **run
        )
    with pytest.raises(DataError, match="is in no class folder. With captions=folders"):
        prepare(settings(tmp_path / "c", classes / "n01", captions="folders"), **run)
    for wrong, message in (
        ({"captions": "folders", "source": "webdataset"}, "captions=folders needs source=folder"),
        ({"labels": "x"}, "labels=x is read by prompt_encoder=class_labels alone"),
        ({"prompt_encoder": "t5_clip"}, "prompt_encoder=t5_clip reads pretrained weights"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tmp_path / "d", classes, **wrong)
    # A wrong folder is named as such, and leaves no plan that the right one would have to be removed for.
    wrong = settings(tmp_path / "e", classes, captions="folders", codec="autoencoder_kl", model_path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="^No VAE in"):
        prepare(wrong, **run)
    assert not (tmp_path / ".e.parts" / "plan.json").exists()
    assert prepare(settings(tmp_path / "e", classes, captions="folders"), **run).splits == {"train": 12}
    assert pretrained_codec(PrepareConfig(out="x", codec="autoencoder_kl", model_path="vae"))["path"] == str(
        Path.cwd() / "vae"
    )
    with pytest.raises(FileNotFoundError, match="^path=nowhere does not exist"):
        prepare(settings(tmp_path / "f", Path("nowhere")), **run)
    assert PrepareConfig(out="x", prompt_encoder="class_labels").labels is None
