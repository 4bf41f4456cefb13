"""Qwen-Image's VAE and text encoder with random weights of a few thousand numbers, in the layout of the published folder."""

from pathlib import Path

import torch

from data_pipeline.compat import repair_torchvision
from data_pipeline.prompts import QWEN_TEMPLATE


def write_tiny_vae(folder: Path) -> Path:
    """4 latent channels, half the resolution."""
    repair_torchvision()
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 0.5, 1.0],
    )
    vae.save_pretrained(folder / "vae")
    return folder


def write_tiny_text_encoder(folder: Path) -> Path:
    """Qwen2.5-VL of width 32, and a tokenizer of single characters."""
    repair_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    characters = sorted(set(QWEN_TEMPLATE) | set("abcdefghijklmnopqrstuvwxyz ")) + ["<pad>"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    text = {
        "vocab_size": len(characters),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder / "text_encoder")
    return folder
