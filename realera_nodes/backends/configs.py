"""Configurations of a single-file checkpoint's parts, read off its tensors' names and shapes.

Names are those of the original Stable Diffusion code, each part's without its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import ErasureError
from ..demo.clip_text import BOS, EOS
from ..formats.architecture import Kind

Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = 64  # of SD2's and SDXL's attention and of every CLIP
HEADS = 8  # of SD1's attention
#: what latents are divided by before they are decoded
LATENT_SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_TRANSFORMER = re.compile(r"(.+)\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight")


def shape_of(shapes: Shapes, name: str, part: str) -> tuple[int, ...]:
    """Raises ErasureError: the part lacks this tensor."""
    if name not in shapes:
        raise ErasureError(f"its {part} lacks {name}, so the file is incomplete: download it again.")
    return shapes[name]


def count(shapes: Shapes, pattern: str) -> int:
    """How many numbers ``pattern``'s group takes from 0 on."""
    found = {int(m[1]) for name in shapes if (m := re.match(pattern, name))}
    n = 0
    while n in found:
        n += 1
    return n


def unet_config(shapes: Shapes, kind: Kind) -> dict[str, Any]:
    """Of diffusers' UNet2DConditionModel, but for ``sample_size``.

    Raises:
        ErasureError: tensors are missing, or the network is built as diffusers' is not.
    """
    depths: dict[str, int] = {}
    for name in shapes:
        if match := _TRANSFORMER.fullmatch(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    levels: list[list[int]] = [[]]  # transformer depth of each residual block
    channels: list[int] = []
    for i in range(1, count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
            continue
        width = shape_of(shapes, f"input_blocks.{i}.0.out_layers.3.weight", "UNet")[0]
        if not levels[-1]:
            channels.append(width)
        levels[-1].append(depths.get(f"input_blocks.{i}.1", 0))
    blocks, outputs = len(levels[0]), [depths.get(f"output_blocks.{n}.1", 0) for n in range(sum(map(len, levels)) + len(levels))]
    if not blocks or any(len(level) != blocks for level in levels):
        raise ErasureError("its UNet's levels differ in their number of blocks, which diffusers cannot load: use another model.")
    up = [outputs[n : n + blocks + 1] for n in range(0, len(outputs), blocks + 1)]
    middle = depths.get("middle_block.1", 0)
    for level in [*levels, *up]:
        if 0 in level and any(level):
            raise ErasureError("its UNet has attention in a part of a level, which diffusers cannot load: use another model.")
    if middle and levels[-1][-1] not in (0, middle):
        raise ErasureError("its UNet's middle block is of another depth than its last level: use another model.")
    config: dict[str, Any] = {
        "in_channels": shape_of(shapes, "input_blocks.0.0.weight", "UNet")[1],
        "out_channels": shape_of(shapes, "out.2.weight", "UNet")[0],
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        **_depths(levels, up, middle),
        "cross_attention_dim": {"sd1": 768, "sd2": 1024, "sdxl": 2048}[kind],
        # diffusers' name is wrong: it is the number of heads
        "attention_head_dim": HEADS if kind == "sd1" else [max(1, c // HEAD_WIDTH) for c in channels],
        "use_linear_projection": any(len(shapes.get(f"{place}.proj_in.weight", ())) == 2 for place in depths),
        "upcast_attention": kind == "sd2",
    }
    label = shapes.get("label_emb.0.0.weight")
    if kind == "sdxl":
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                   "projection_class_embeddings_input_dim": shape_of(shapes, "label_emb.0.0.weight", "UNet")[1]}  # fmt: skip
    elif label is not None:
        raise ErasureError("its UNet wants a picture's embedding (SD2.1-unCLIP), which is not supported: use a text model.")
    return config


def _depths(levels: list[list[int]], up: list[list[int]], middle: int) -> dict[str, Any]:
    """Transformer depths in diffusers' two fields; the last one down is the middle's as well."""
    down = [level[0] or (middle if i == len(levels) - 1 else 0) or 1 for i, level in enumerate(levels)]
    plain = all(len(set(level)) == 1 for level in [*levels, *up])
    if plain and all(d[0] == u[0] for d, u in zip(levels, reversed(up), strict=True)):
        return {"transformer_layers_per_block": down}
    nested = [level if len(set(level)) > 1 else n for level, n in zip(levels, down, strict=True)]
    return {"transformer_layers_per_block": nested, "reverse_transformer_layers_per_block": [[n or 1 for n in lv] for lv in up]}


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """Of a CLIP text model in transformers' layout (without ``text_model.``), activation as in CLIP-L."""
    token, position = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    return _text_config(shapes, token, position, "encoder.layers", "mlp.fc1.weight") | {"hidden_act": "quick_gelu"}


def open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """Of a text model in OpenCLIP's layout."""
    token, position = "token_embedding.weight", "positional_embedding"
    config = _text_config(shapes, token, position, "transformer.resblocks", "mlp.c_fc.weight") | {"hidden_act": "gelu"}
    return config | {"projection_dim": shapes.get("text_projection", (0, config["hidden_size"]))[1]}


def _text_config(shapes: Shapes, token: str, position: str, layers: str, widened: str) -> dict[str, Any]:
    """What both layouts have, under their own names: embeddings, the stack of layers, the MLP's first matrix in each."""
    width = shape_of(shapes, token, "text encoder")[1]
    return {
        "vocab_size": shapes[token][0],
        "max_position_embeddings": shape_of(shapes, position, "text encoder")[0],
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{layers}.0.{widened}", "text encoder")[0],
        "num_hidden_layers": count(shapes, rf"{re.escape(layers)}\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "projection_dim": width,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": 1,
    }


def vae_config(shapes: Shapes, kind: Kind) -> dict[str, Any]:
    """Of diffusers' AutoencoderKL, but for ``sample_size``."""
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    channels = [shape_of(shapes, f"encoder.down.{i}.block.0.conv1.weight", "VAE")[0] for i in range(max(1, levels))]
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight", "VAE")[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight", "VAE")[0],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shape_of(shapes, "decoder.conv_in.weight", "VAE")[1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in shapes,
        "scaling_factor": LATENT_SCALE[kind],
    }
