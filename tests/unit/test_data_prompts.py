"""data_pipeline/prompts.py: the token table, padding, and Qwen's encoder against diffusers' own pipeline code."""

import json
from pathlib import Path

import pytest
import torch
from tiny_qwen import write_tiny_text_encoder
from torch.testing import assert_close

from data_pipeline.prompts import (
    QWEN_TEMPLATE,
    QWEN_TEMPLATE_TOKENS,
    QwenPromptEncoder,
    TokenTableEncoder,
    load_prompt_encoder,
    pad_prompts,
    vocabulary,
)

WORDS = ["a", "handwritten", "three"]


def test_one_row_per_word_after_a_start_token() -> None:
    encoder = TokenTableEncoder(WORDS, dim=16)
    whole, empty, swapped = encoder.encode(["a handwritten three", "", "three A"])
    assert whole.shape == (4, 16) and whole.dtype == torch.float32
    assert empty.shape == (1, 16)
    assert torch.equal(empty[0], whole[0])
    assert torch.equal(swapped, whole[[0, 3, 1]])


def test_table_values_never_change() -> None:
    """Old checkpoints were trained on these numbers."""
    (embed_LD,) = TokenTableEncoder(WORDS, dim=3, seed=0).encode(["a"])
    assert_close(embed_LD, torch.tensor([[1.765625, 0.400390625, 0.98046875], [2.234375, 1.8671875, -0.9765625]]))
    assert not torch.equal(embed_LD, TokenTableEncoder(WORDS, dim=3, seed=1).encode(["a"])[0])


def test_table_has_unit_variance_and_survives_bfloat16() -> None:
    words = [f"w{i}" for i in range(200)]
    (embed_LD,) = TokenTableEncoder(words, dim=64).encode([" ".join(words)])
    assert abs(embed_LD.var().item() - 1) < 0.03
    assert torch.equal(embed_LD, embed_LD.bfloat16().float())


def test_unknown_words_are_named() -> None:
    with pytest.raises(ValueError, match="the word 'four' is not in the token table. Known words: a, handw"):
        TokenTableEncoder(WORDS).encode(["a three", "a four"])
    with pytest.raises(ValueError, match="twice"):
        TokenTableEncoder(["a", "A"])


def test_descriptions_are_json_and_rebuild_the_encoder() -> None:
    encoder = TokenTableEncoder(WORDS, dim=8, seed=3)
    again = load_prompt_encoder(json.loads(json.dumps(encoder.describe())))
    assert torch.equal(encoder.encode(["a three"])[0], again.encode(["a three"])[0])
    with pytest.raises(ValueError, match="Unknown prompt encoder kind None"):
        load_prompt_encoder({})


def test_padding() -> None:
    embeds_BLD, mask_BL = pad_prompts([torch.ones(1, 2), torch.full((3, 2), 2.0)])
    assert embeds_BLD.tolist() == [[[1, 1], [0, 0], [0, 0]], [[2, 2], [2, 2], [2, 2]]]
    assert mask_BL.tolist() == [[True, False, False], [True, True, True]]
    assert mask_BL.dtype == torch.bool
    with pytest.raises(ValueError, match="at least one"):
        pad_prompts([])


def test_vocabulary() -> None:
    assert vocabulary(["a Red  square", "a blue square"]) == ["a", "blue", "red", "square"]


@pytest.fixture(scope="module")
def tiny_qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_encoder(tmp_path_factory.mktemp("qwen_image"))


def test_qwen_encoder_matches_diffusers_pipeline(tiny_qwen_folder: Path) -> None:
    from diffusers import QwenImagePipeline
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    encoder = QwenPromptEncoder(tiny_qwen_folder, dtype=torch.float32)
    prompts = ["a cat", "", "a much longer prompt about a cat"]
    got = encoder.encode(prompts)
    assert encoder.dim == 32

    pipeline = QwenImagePipeline(
        scheduler=None,
        vae=None,
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_qwen_folder / "text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(tiny_qwen_folder / "tokenizer"),
        transformer=None,
    )
    assert pipeline.prompt_template_encode == QWEN_TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == QWEN_TEMPLATE_TOKENS
    with torch.no_grad():
        want_BLD, mask_BL = pipeline._get_qwen_prompt_embeds(prompts, "cpu", torch.float32)
    got_BLD, got_mask_BL = pad_prompts(got)
    assert torch.equal(got_mask_BL, mask_BL.bool())
    assert_close(got_BLD, want_BLD, rtol=1e-4, atol=1e-5)

    short = QwenPromptEncoder(tiny_qwen_folder, dtype=torch.float32, max_tokens=200).encode([prompts[2] * 10])
    whole = encoder.encode([prompts[2] * 10])
    assert short[0].shape == (200, 32)
    assert_close(short[0], whole[0][:200], rtol=1e-4, atol=1e-5)  # causal: what follows does not matter


def test_what_qwen_does_not_read_is_named(tiny_qwen_folder: Path) -> None:
    """A token a character here. The template's end counts too, but no word is lost with it."""
    template = len(QWEN_TEMPLATE) - len("{}")
    encoder = QwenPromptEncoder(tiny_qwen_folder, dtype=torch.float32, max_tokens=template)
    read = template + QWEN_TEMPLATE_TOKENS - QWEN_TEMPLATE.index("{}")
    assert encoder.cut("") == encoder.cut("a cat") == encoder.cut("a" * read) == ""
    words = f"Qwen2.5-VL reads {read} of its {read + 50} tokens, and nothing from '{'b' * 40}...' on"
    assert encoder.cut("a" * read + "b" * 50) == words
    (longest_LD,) = encoder.encode(["a" * read + "b" * 50])
    assert torch.equal(longest_LD, encoder.encode(["a" * read + "c" * 9])[0])
    assert TokenTableEncoder(["a"]).cut("a " * 1000) == ""


def test_qwen_encoder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no tokenizer/ folder"):
        QwenPromptEncoder(tmp_path)
