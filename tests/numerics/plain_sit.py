"""SiT as its paper and DiT's describe it, in plain tensor operations on a checkpoint's tensors by SiT's own names."""

import math

import torch
from torch import Tensor


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


def position(place: int, count: int) -> list[float]:
    """`count` numbers: sines, then cosines."""
    angles = [place / 10_000 ** (i / (count // 2)) for i in range(count // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def fixed_positions(rows: int, columns: int, width: int) -> Tensor:
    table = [position(j, width // 2) + position(i, width // 2) for i in range(rows) for j in range(columns)]
    return torch.tensor(table, dtype=torch.float64)


def plain_sit(weights: dict[str, Tensor], x_BCHW: Tensor, time_B: Tensor, label_B: list[int], heads: int) -> Tensor:
    """What the checkpoint's network predicts: all its output channels, (B,C',H,W)."""
    B, C, H, W = x_BCHW.shape
    kernel = weights["x_embedder.proj.weight"]
    width, rows, columns = len(kernel), H // 2, W // 2
    tokens = torch.nn.functional.conv2d(x_BCHW, kernel, weights["x_embedder.proj.bias"], stride=2)
    x = tokens.flatten(2).transpose(1, 2) + fixed_positions(rows, columns, width)
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = time_B[:, None] * frequencies
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    time = linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", waves)))
    c = silu(time + weights["y_embedder.embedding_table.weight"][label_B])
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for index in range(depth):
        block = f"blocks.{index}"
        mod = linear(weights, f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        h = linear(weights, f"{block}.attn.qkv", normalised(x, mod[0], mod[1]))
        q, k, v = h.reshape(B, rows * columns, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), dim=-1) @ v
        x = x + mod[2][:, None] * linear(weights, f"{block}.attn.proj", attention.transpose(1, 2).reshape(x.shape))
        h = gelu(linear(weights, f"{block}.mlp.fc1", normalised(x, mod[3], mod[4])))
        x = x + mod[5][:, None] * linear(weights, f"{block}.mlp.fc2", h)
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    patches = linear(weights, "final_layer.linear", normalised(x, shift, scale))
    channels = patches.shape[-1] // 4
    image = torch.zeros(B, channels, H, W, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            patch = patches[:, i * columns + j].reshape(B, 2, 2, channels)
            image[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch.permute(0, 3, 1, 2)
    return image


def random_sit(width: int, depth: int, channels: int, classes: int, outputs: int) -> dict[str, Tensor]:
    """A checkpoint of SiT's names with random weights, for latents of 8 x 8; outputs: channels that it predicts."""
    shapes = {
        "x_embedder.proj": (width, channels, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (4 * outputs, width),
    }
    for index in range(depth):
        shapes |= {
            f"blocks.{index}.attn.qkv": (3 * width, width),
            f"blocks.{index}.attn.proj": (width, width),
            f"blocks.{index}.mlp.fc1": (4 * width, width),
            f"blocks.{index}.mlp.fc2": (width, 4 * width),
            f"blocks.{index}.adaLN_modulation.1": (6 * width, width),
        }
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
        weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator, dtype=torch.float64)
    weights["y_embedder.embedding_table.weight"] = torch.randn(
        classes + 1, width, generator=generator, dtype=torch.float64
    )
    weights["pos_embed"] = fixed_positions(4, 4, width)[None]
    return weights
