"""Names of a UNet's parameters, LDM's (single files, ComfyUI) and diffusers', for any number of levels and blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..core.errors import ErasureError

_FIXED = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1",
}  # fmt: skip
_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
           "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
_PLACE = re.compile(r"input_blocks\.\d+\.\d(\.op)?|output_blocks\.\d+\.\d(\.conv(?=\.))?|middle_block\.\d|out\.\d"
                    r"|time_embed\.\d|label_emb\.0\.\d")  # fmt: skip
#: first parts of the names in diffusers
TOPS = ("conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding", "class_embedding", "down_blocks", "mid_block",
        "up_blocks")  # fmt: skip


def ldm_parameters(names: Iterable[str], sdxl: bool) -> dict[str, str]:
    """diffusers name -> LDM name of each parameter; names that are not a UNet's are left out.

    The translation is that of diffusers' LDM conversion.

    Args:
        names: LDM names of the UNet, without a prefix
        sdxl: whether ``label_emb`` is SDXL's embedding of text and sizes, or that of a class

    Raises:
        ErasureError: blocks are missing.
    """
    names = list(names)
    blocks = ldm_blocks(names)
    label = "add_embedding" if sdxl else "class_embedding"
    blocks |= {"label_emb.0.0": f"{label}.linear_1", "label_emb.0.2": f"{label}.linear_2"}
    found = {}
    for name in names:
        place = _PLACE.match(name)
        if place is None or place[0] not in blocks:
            continue
        block, rest = blocks[place[0]], name[place.end() + 1 :]
        if ".resnets." in block:
            part, _, leaf = rest.rpartition(".")
            if part not in _RESNET:
                continue
            rest = f"{_RESNET[part]}.{leaf}"
        found[f"{block}.{rest}"] = name
    return found


def ldm_attention_blocks(names: Iterable[str]) -> dict[str, str]:
    """LDM place of a transformer -> diffusers', e.g. ``input_blocks.4.1`` -> ``down_blocks.1.attentions.0``.

    Raises:
        ErasureError: see ``ldm_blocks``.
    """
    return {place: block for place, block in ldm_blocks(names).items() if ".attentions." in block}


def ldm_blocks(names: Iterable[str]) -> dict[str, str]:
    """LDM place of a layer or block that can be there -> diffusers', e.g. ``input_blocks.4.0`` -> ``down_blocks.1.resnets.0``.

    Args:
        names: all keys of the UNet, without a prefix. A block ``input_blocks.i.0.op`` ends a level; going up, the levels
            come in reverse with one more block each.

    Raises:
        ErasureError: blocks are missing.
    """
    names = list(names)
    inputs, outputs = _block_numbers(names, "input_blocks"), _block_numbers(names, "output_blocks")
    ends = {int(name.split(".")[1]) for name in names if re.match(r"input_blocks\.\d+\.0\.op\.", name)}
    blocks, level, j = dict(_FIXED), 0, 0
    counts = []
    for i in range(1, max(inputs, default=0) + 1):
        if i in ends:
            blocks[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            counts.append(j)
            level, j = level + 1, 0
        else:
            blocks[f"input_blocks.{i}.0"] = f"down_blocks.{level}.resnets.{j}"
            blocks[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{j}"
            j += 1
    counts.append(j)
    n = 0
    for up, count in enumerate(reversed(counts)):
        for j in range(count + 1):
            blocks[f"output_blocks.{n}.0"] = f"up_blocks.{up}.resnets.{j}"
            blocks[f"output_blocks.{n}.1"] = f"up_blocks.{up}.attentions.{j}"
            for place in (1, 2):  # after the transformer, or in its place where the level has none
                blocks[f"output_blocks.{n}.{place}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            n += 1
    if inputs != set(range(max(inputs, default=0) + 1)) or outputs != set(range(n)):
        raise ErasureError("the UNet's input_blocks and output_blocks do not fit: the file is incomplete, download it again.")
    return blocks


def _block_numbers(names: Iterable[str], stem: str) -> set[int]:
    return {int(m[1]) for name in names if (m := re.match(rf"{stem}\.(\d+)\.", name))}
