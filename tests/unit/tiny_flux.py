"""FLUX.1's VAE and text encoders with random weights of a few thousand numbers, in the layout of the published folder."""

import json
import string
from pathlib import Path

import torch

from data_pipeline.compat import repair_torchvision


def write_tiny_kl(folder: Path, channels: int = 4, shift: float | None = None, scale: float = 0.18215) -> Path:
    """An AutoencoderKL of half the resolution: SD's layout, or FLUX's (a shift, no quantising convolutions)."""
    repair_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )
    vae.save_pretrained(folder)
    return folder


def write_tiny_clip(folder: Path) -> None:
    """Width 16; a tokenizer of bytes, without merges."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = characters + [f"{c}</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    source = folder / "tokenizer"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(source, model_max_length=20).save_pretrained(source)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def write_tiny_t5(folder: Path) -> None:
    """Width 24; a tokenizer of single characters that ends each prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, " ", ","]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(folder / "tokenizer_2")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokens), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")


def write_tiny_flux(folder: Path) -> Path:
    write_tiny_kl(folder / "vae", channels=16, shift=0.1159, scale=0.3611)
    write_tiny_clip(folder)
    write_tiny_t5(folder)
    return folder
