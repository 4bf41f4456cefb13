"""FLUX.1's prompts: T5 for the tokens, CLIP for one vector of the whole prompt.  B batch  L text tokens  D width"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.compat import repair_torchvision
from data_pipeline.pretrained import loading
from data_pipeline.token_limit import describe_cut

PROMPTS_AT_ONCE = 16


class T5ClipEncoder:
    """One tensor (1 + max_tokens, D) a prompt, D being T5's width: row 0 is CLIP's pooled vector, padded with zeros; the
    others are T5's last hidden states over the prompt padded to max_tokens.

    As in the published pipeline T5 gets no mask, so the states of the padding belong to the embedding: every prompt has
    all rows. `path` is a local FLUX.1 folder (its `tokenizer/`, `text_encoder/`, `tokenizer_2/` and `text_encoder_2/`
    are read). `pooled_dim` numbers of row 0 are CLIP's.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        max_tokens: int = 512,
    ):
        for part in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
            if not (Path(path) / part).is_dir():
                raise FileNotFoundError(f"{path} has no {part}/ folder. Give the path of a local FLUX.1 model.")
        repair_torchvision()
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        self._path, self._dtype, self._device, self._max_tokens = str(path), dtype, device, max_tokens
        # The pipeline's own classes: AutoTokenizer would take CLIP's fast tokenizer, which splits some texts otherwise.
        self._clip_tokenizer = CLIPTokenizer.from_pretrained(Path(path) / "tokenizer", local_files_only=True)
        self._t5_tokenizer = T5TokenizerFast.from_pretrained(Path(path) / "tokenizer_2", local_files_only=True)
        clip = CLIPTextModel.from_pretrained(Path(path) / "text_encoder", **loading(dtype, device))
        t5 = T5EncoderModel.from_pretrained(Path(path) / "text_encoder_2", **loading(dtype, device))
        self._clip = clip.eval().requires_grad_(False)
        self._t5 = t5.eval().requires_grad_(False)
        self.dim, self.pooled_dim = t5.config.d_model, clip.config.hidden_size
        if self.pooled_dim > self.dim:
            raise ValueError(
                f"{path}: CLIP's vector of {self.pooled_dim} numbers does not fit into a row of T5's width {self.dim}."
            )

    def encode(self, prompts: list[str]) -> list[Tensor]:
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        return [embed_LD for start in starts for embed_LD in self._encode(prompts[start : start + PROMPTS_AT_ONCE])]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        pooled_BD = self._clip(self._tokens(self._clip_tokenizer, prompts, self._clip_tokenizer.model_max_length))
        hidden_BLD = self._t5(self._tokens(self._t5_tokenizer, prompts, self._max_tokens)).last_hidden_state
        row_B1D = F.pad(pooled_BD.pooler_output, (0, self.dim - self.pooled_dim)).unsqueeze(1)
        return list(torch.cat([row_B1D, hidden_BLD], dim=1).float().cpu())

    def _tokens(self, tokenizer: Any, prompts: list[str], length: int) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self._device)

    def cut(self, prompt: str) -> str:
        found = self._t5_tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        tokens, limit, reasons = len(found.input_ids) - 1, self._max_tokens - 1, []  # without the mark of the end
        if tokens > limit:
            reasons.append(describe_cut("T5", tokens, limit, prompt[found.offset_mapping[limit][0] :]))
        ids = self._clip_tokenizer(prompt, verbose=False).input_ids[1:-1]
        limit = self._clip_tokenizer.model_max_length - 2
        if len(ids) > limit:  # this tokenizer knows no places
            reasons.append(describe_cut("CLIP", len(ids), limit, self._clip_tokenizer.decode(ids[limit:])))
        return "; ".join(reasons)

    def describe(self) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return {"kind": "t5_clip", "path": self._path, "dtype": dtype, "max_tokens": self._max_tokens}
