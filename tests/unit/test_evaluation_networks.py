"""Networks from local weights: the libraries' own answers, and plain words for files that are missing or are something else.

Weights are random and written by the tests, in the layout that the libraries' own have.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from data_pipeline.compat import repair_torchvision
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.networks import INCEPTION_SIZE, Clip, Inception, Lpips, Reward, as_rgb, read_weights

CPU = torch.device("cpu")


def images(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory):
    """(the library's network with random weights, its weights' file)"""
    repair_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as library

    class Empty(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: object, **options: object) -> None:
            """Random weights do."""

    before, library.load_state_dict_from_url = library.load_state_dict_from_url, lambda url, progress: {}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Empty("inception-v3-compat", ["2048", "logits_unbiased"])
    finally:
        library.load_state_dict_from_url = before
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(net.state_dict(), path)
    return net, path


def test_inception_is_the_library_s(inception) -> None:
    net, path = inception
    found = Inception(path, CPU)
    batch = images(1, 320, 310)
    features, logits = found.describe(batch)
    want_features, want_logits = net(batch)
    assert_close(features, want_features, rtol=0, atol=0)
    assert_close(logits, want_logits, rtol=0, atol=0)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    patch = found.describe_patch(batch)
    middle = batch[:, :, 10 : 10 + INCEPTION_SIZE, 5 : 5 + INCEPTION_SIZE]
    assert_close(patch, net(middle)[0], rtol=0, atol=0)
    assert (patch - features).abs().max() > 0.01 * features.max()
    assert found.describe_patch(images(1, 298, 400)) is None


def test_grey_images_are_shown_in_three_channels() -> None:
    assert as_rgb(images(2, 4, 5, channels=1)).shape == (2, 3, 4, 5)


def test_other_weights_are_refused(tmp_path: Path, inception) -> None:
    with pytest.raises(NotMeasurable, match="inception=.*none.safetensors does not exist"):
        Inception(tmp_path / "none.safetensors", CPU)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(NotMeasurable, match="other weights than torch-fidelity's InceptionV3"):
        Inception(other, CPU)
    with pytest.raises(NotMeasurable, match="no weights of torchmetrics' LPIPS"):
        Lpips(other, CPU)
    with pytest.raises(NotMeasurable, match="clip=.*none has no config.json"):
        Clip(tmp_path / "none", CPU)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"trap": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(NotMeasurable, match="no safetensors file .* as they can run code"):
        read_weights(tmp_path / "weights.pth", "inception")
    assert not (tmp_path / "sprung").exists()


def test_lpips_is_the_library_s(tmp_path: Path) -> None:
    repair_torchvision()
    from torchmetrics.functional.image.lpips import _LPIPS

    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = _LPIPS(pretrained=False, net="alex", pnet_rand=True)
    path = tmp_path / "lpips.safetensors"
    save_file({key: value for key, value in net.state_dict().items() if not key.startswith("lins.")}, path)
    found = Lpips(path, CPU)
    a, b = images(2, 64, 64), images(2, 64, 64).flip(3)
    want = net(a.float() / 255, b.float() / 255, normalize=True).flatten()
    assert found.kind == "alex"
    assert_close(found.distance(a, b), want, rtol=1e-6, atol=0)
    assert (found.distance(a, a) == 0).all()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repair_torchvision()
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(folder / "vocab.json", folder / "merges.txt")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": len(words) - 1}
    vision = small | {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=32), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_a_hundred_cosines(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    batch, prompts = images(4, 40, 48), ["a b", "red", "green disc", "z"]
    found = Clip(clip_folder, CPU).score(list(batch), prompts)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(
        text=prompts, images=[np.asarray(image.permute(1, 2, 0)) for image in batch], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        out = model(**inputs)
    want = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds)
    assert_close(found, want.clamp(min=0), rtol=1e-4, atol=1e-4)
    assert len(set(found.tolist())) > 1


def test_scores_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def bright(images, prompts):\n"
        "    assert images[0].mode == 'RGB' and len(images) == len(prompts)\n"
        "    return [image.getpixel((0, 0))[0] for image in images]\n"
        "def broken(images, prompts):\n    raise FileNotFoundError('hps.safetensors')\n"
        "def short(images, prompts):\n    return [1.0]\n"
        "def nothing(images, prompts):\n    pass\n"
        "def ragged(images, prompts):\n    return [[1.0], [1.0, 2.0], 3.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    batch = images(3, 4, 4, channels=1)
    assert Reward.load("my_rewards:bright").score(list(batch), ["a", "b", "c"]).tolist() == batch[:, 0, 0, 0].tolist()
    with pytest.raises(NotMeasurable, match="broken failed: FileNotFoundError: hps.safetensors"):
        Reward.load("my_rewards:broken").score(list(batch), ["a", "b", "c"])
    with pytest.raises(NotMeasurable, match="short gave 1 scores for 3 images"):
        Reward.load("my_rewards:short").score(list(batch), ["a", "b", "c"])
    for name in ("nothing", "ragged"):
        with pytest.raises(NotMeasurable, match=f"{name} gave no number an image: "):
            Reward.load(f"my_rewards:{name}").score(list(batch), ["a", "b", "c"])
    with pytest.raises(NotMeasurable, match="rewards=my_rewards:none cannot be loaded"):
        Reward.load("my_rewards:none")
    sys.modules.pop("my_rewards", None)
