"""How diffusers' and transformers' models are opened."""

from typing import Any

import torch


def loading(dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained: from safetensors to the device, without a copy of the whole in the host's memory."""
    return {"torch_dtype": dtype, "device_map": {"": device}, "local_files_only": True, "use_safetensors": True}
