"""Prompts -> token embeddings.  B batch  L text tokens  D width"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.class_labels import ClassLabelEncoder
from data_pipeline.compat import repair_torchvision
from data_pipeline.pretrained import loading
from data_pipeline.t5_clip import T5ClipEncoder
from data_pipeline.token_limit import describe_cut


class PromptEncoder(Protocol):
    dim: int
    pooled_dim: int | None
    """Of encoders that put a vector of the whole prompt into the first row: its width, the rest of that row being zeros."""

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One (L_i, D) float32 tensor per prompt, on the CPU. "" is the unconditional prompt."""
        ...

    def cut(self, prompt: str) -> str:
        """In words, what `encode` leaves out of a prompt that is longer than the encoder reads; "" where it reads all."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `load_prompt_encoder` needs to build this encoder again; plain JSON."""
        ...


class TokenTableEncoder:
    """A fixed table: a start token, then one random unit-variance vector per word. Stands in for a language model.

    Values are rounded to bfloat16, the precision in which shards hold embeddings: what is encoded at sampling time
    equals, to the bit, what training read.
    """

    pooled_dim = None

    def __init__(self, words: Sequence[str], dim: int = 64, seed: int = 0):
        self.dim = dim
        self._words = [word.casefold() for word in words]
        self._seed = seed
        if len(set(self._words)) != len(self._words):
            raise ValueError(f"TokenTableEncoder: the word list holds a word twice: {sorted(self._words)}")
        # RandomState's stream is frozen by numpy for all time, so the table never changes under an old checkpoint.
        table = np.random.RandomState(seed).standard_normal((1 + len(self._words), dim))
        self._table_VD = torch.from_numpy(table).bfloat16().float()
        self._row_of_word = {word: row for row, word in enumerate(self._words, start=1)}

    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [self._table_VD[self._rows(prompt)] for prompt in prompts]

    def cut(self, prompt: str) -> str:
        return ""

    def _rows(self, prompt: str) -> list[int]:
        rows = [0]
        for word in prompt.casefold().split():
            if word not in self._row_of_word:
                raise ValueError(
                    f"Prompt {prompt!r}: the word {word!r} is not in the token table. Known words: "
                    f"{', '.join(sorted(self._words))}."
                )
            rows.append(self._row_of_word[word])
        return rows

    def describe(self) -> dict[str, Any]:
        return {"kind": "token_table", "words": self._words, "dim": self.dim, "seed": self._seed}


QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_TEMPLATE_TOKENS = 34
"""Length of the template up to the prompt; those hidden states are the same for every prompt and are dropped."""


PROMPTS_AT_ONCE = 32


class QwenPromptEncoder:
    """Last hidden states of Qwen2.5-VL over Qwen-Image's prompt template, the first 34 dropped, at most 512 kept.

    `path` is a local Qwen-Image folder (its `tokenizer/` and `text_encoder/` are read).
    """

    pooled_dim = None

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        max_tokens: int = 512,
    ):
        for part in ("tokenizer", "text_encoder"):
            if not (Path(path) / part).is_dir():
                raise FileNotFoundError(f"{path} has no {part}/ folder. Give the path of a local Qwen-Image model.")
        repair_torchvision()
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        self._path, self._dtype, self._device, self._max_tokens = str(path), dtype, device, max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(Path(path) / "tokenizer", local_files_only=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            Path(path) / "text_encoder", **loading(dtype, device)
        )
        # The inner model ends at the hidden states: no 152k-wide vocabulary logits for every token.
        self._model = model.model.eval().requires_grad_(False)
        self.dim = model.config.get_text_config().hidden_size

    def encode(self, prompts: list[str]) -> list[Tensor]:
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        return [embed_LD for start in starts for embed_LD in self._encode(prompts[start : start + PROMPTS_AT_ONCE])]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        tokens = self._tokenizer(
            [QWEN_TEMPLATE.format(prompt) for prompt in prompts],
            max_length=self._max_tokens + QWEN_TEMPLATE_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        hidden_BLD = self._model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).last_hidden_state.float()
        return [
            hidden_LD[mask_L.bool()][QWEN_TEMPLATE_TOKENS:].cpu()
            for hidden_LD, mask_L in zip(hidden_BLD, tokens.attention_mask, strict=True)
        ]

    def cut(self, prompt: str) -> str:
        text, start = QWEN_TEMPLATE.format(prompt), QWEN_TEMPLATE.index("{}")
        offsets = self._tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
        places = [begin - start for begin, _ in offsets]
        beyond = [place for place in places[self._max_tokens + QWEN_TEMPLATE_TOKENS :] if place < len(prompt)]
        if not beyond:  # the template's own end may be: no word is lost with it
            return ""
        tokens = sum(0 <= place < len(prompt) for place in places)
        return describe_cut("Qwen2.5-VL", tokens, tokens - len(beyond), prompt[beyond[0] :])

    def describe(self) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return {"kind": "qwen2_5_vl", "path": self._path, "dtype": dtype, "max_tokens": self._max_tokens}


def load_prompt_encoder(description: Mapping[str, Any], device: str | torch.device = "cpu") -> PromptEncoder:
    """Build the encoder that `describe()` described, for example the "prompt_encoder" entry of a dataset.json."""
    match description.get("kind"):
        case "token_table":
            return TokenTableEncoder(description["words"], description["dim"], description["seed"])
        case "qwen2_5_vl":
            dtype = getattr(torch, description["dtype"])
            return QwenPromptEncoder(description["path"], dtype, device, description["max_tokens"])
        case "t5_clip":
            dtype = getattr(torch, description["dtype"])
            return T5ClipEncoder(description["path"], dtype, device, description["max_tokens"])
        case "class_labels":
            return ClassLabelEncoder(description["classes"], description["names"])
        case kind:
            known = '"token_table", "qwen2_5_vl", "t5_clip", "class_labels"'
            raise ValueError(f"Unknown prompt encoder kind {kind!r}. Known kinds: {known}.")


def pad_prompts(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """List of (L_i, D) -> (B, L, D) padded with zeros to the longest, and the mask (B, L): True where a token is."""
    if not embeds:
        raise ValueError("pad_prompts needs at least one prompt.")
    lengths_B = torch.tensor([len(embed_LD) for embed_LD in embeds], device=embeds[0].device)
    embeds_BLD = torch.nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
    return embeds_BLD, torch.arange(embeds_BLD.shape[1], device=embeds[0].device) < lengths_B.unsqueeze(1)


def vocabulary(prompts: Sequence[str]) -> list[str]:
    """Every word of the prompts once, sorted: the word list of a TokenTableEncoder."""
    return sorted({word for prompt in prompts for word in prompt.casefold().split()})
