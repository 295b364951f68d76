"""From the assets' compact tensors to the weights of a standard SD1.x checkpoint and diffusers folder.

Exact arithmetic only (int8 times scale, zero-padding), so that expansion gives the same bytes everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADS = 8


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales (out,) of a weight (out, ...), one scale per output channel."""
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    codes = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))


def pad(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``value`` inside zeros of ``shape``: the same network with more, idle channels.

    Three axes are not simply cut: concatenated inputs are two halves, attention's inner axis is
    eight heads, and GEGLU's output is value and gate.
    """
    if tuple(value.shape) == tuple(shape):
        return value
    index = [_positions(name, axis, n, full) for axis, (n, full) in enumerate(zip(value.shape, shape, strict=True))]
    out = torch.zeros(shape, dtype=value.dtype)
    out[torch.meshgrid(*index, indexing="ij")] = value
    return out


def _positions(name: str, axis: int, n: int, full: int) -> Tensor:
    """Where the ``n`` trained entries of an axis sit among the ``full`` ones."""
    parts = 1
    if n == full:
        parts = 1
    elif "in_layers.0." in name or (axis == 1 and ("in_layers.2." in name or "skip_connection" in name)):
        parts = 2 if name.startswith("output_blocks.") else 1  # the block's input and its skip
    elif ".ff.net.0.proj." in name and axis == 0:
        parts = 2
    elif (axis == 0 and any(f".{k}." in name for k in ("to_q", "to_k", "to_v"))) or (axis == 1 and ".to_out.0.weight" in name):
        parts = HEADS
    within = torch.arange(n // parts)
    return torch.cat([within + part * (full // parts) for part in range(parts)])


def unet_to_diffusers(names: list[str], res_blocks: tuple[int, ...]) -> dict[str, str]:
    """LDM UNet weight name -> diffusers' name, for levels with ``res_blocks`` blocks each."""
    blocks = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
              "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
              "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
              "middle_block.2": "mid_block.resnets.1"}  # fmt: skip
    n = 1
    for level, count in enumerate(res_blocks):
        for j in range(count):
            blocks[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{j}"
            blocks[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{j}"
            n += 1
        blocks[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        n += 1
    n = 0
    for up, count in enumerate(reversed(res_blocks)):
        for j in range(count + 1):
            blocks[f"output_blocks.{n}.0"] = f"up_blocks.{up}.resnets.{j}"
            blocks[f"output_blocks.{n}.1"] = f"up_blocks.{up}.attentions.{j}"
            for place in (1, 2):  # after the transformer, or in its place where the level has none
                blocks[f"output_blocks.{n}.{place}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            n += 1
    parts = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
             "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
    result = {}
    for name in names:
        block = max((b for b in blocks if name.startswith(b + ".")), key=len)
        rest = name[len(block) + 1 :]
        part = next((p for p in parts if rest.startswith(p + ".")), None)
        result[name] = f"{blocks[block]}.{parts[part] + rest[len(part) :] if part else rest}"
    return result


def vae_to_diffusers(name: str) -> str:
    """TAESD weight name -> AutoencoderTiny's: its decoder keeps the clamp outside the list of layers."""
    side, index, rest = name.split(".", 2)
    if side == "taesd_encoder":
        return f"encoder.layers.{index}.{rest}"
    return f"decoder.layers.{int(index) - 1}.{rest}"
