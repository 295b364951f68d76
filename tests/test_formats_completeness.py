"""A UNet that lacks a part is refused, whatever the part is; every network that people have is not."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.architecture import detect
from realera_nodes.formats.checkpoint import open_checkpoint
from realera_nodes.formats.stream import SafetensorsFile
from tests.test_formats_architecture import DIFFUSERS, diffusers_shapes
from tests.tiny import KINDS, tiny_files

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."


def shapes_of(kind: str, layout: str) -> Shapes:
    folder, single = tiny_files(kind)
    return SafetensorsFile.open(single if layout == "ldm" else folder / "unet" / "diffusion_pytorch_model.safetensors").shapes


def transformers(shapes: Shapes) -> list[str]:
    """Each transformer block's name, as stored."""
    found = {m[0] for name in shapes if (m := re.match(r".+\.transformer_blocks\.\d+", name)) and "cond_stage" not in name}
    return sorted(found)


def both_projections(name: str, block: str) -> bool:
    return name in (f"{block}.attn2.to_k.weight", f"{block}.attn2.to_v.weight")


LACKS: dict[str, Callable[[str, str], bool]] = {
    "K and V": both_projections,
    "K": lambda name, block: name == f"{block}.attn2.to_k.weight",
    "V": lambda name, block: name == f"{block}.attn2.to_v.weight",
    "the cross-attention": lambda name, block: name.startswith(f"{block}.attn2."),
    "all but to_out": lambda name, block: name.startswith(f"{block}.") and "attn2.to_out" not in name,
    "all but attn1": lambda name, block: name.startswith(f"{block}.") and ".attn1." not in name,
    "all but the norms": lambda name, block: name.startswith(f"{block}.") and ".norm" not in name,
    "the block": lambda name, block: name.startswith(f"{block}."),
}


@functools.cache
def sdxl() -> Shapes:
    """SDXL's own, in diffusers' layout: levels of two blocks, transformers up to ten deep."""
    return diffusers_shapes("sdxl")


@pytest.mark.parametrize("source", [*(f"{k} {x}" for k in KINDS for x in ("ldm", "diffusers")), "real"])
@pytest.mark.parametrize("lacks", LACKS)
def test_every_transformer_block_must_be_whole(source: str, lacks: str) -> None:
    shapes = sdxl() if source == "real" else shapes_of(*source.split())
    detect(shapes)
    blocks = transformers(shapes)
    for block in blocks[:: 1 if source != "real" else 7]:
        if lacks == "the block" and source.startswith("sdxl") and block.endswith(".1") and ("input" in block or "mid" in block
                                                                                         or "down" in block):  # fmt: skip
            continue  # a level of one block: loading compares it with the middle
        left = {n: s for n, s in shapes.items() if not LACKS[lacks](n, block)}
        with pytest.raises(ErasureError, match=r"the UNet has .* but not .*: the file is incomplete, download it again"):
            detect(left)


@pytest.mark.parametrize("place", ["down_blocks.2.attentions.0", "down_blocks.1.attentions.1", "up_blocks.0.attentions.2",
                                   "up_blocks.1.attentions.0"])  # fmt: skip
def test_the_last_block_of_a_deep_transformer(place: str) -> None:
    shapes = sdxl()
    last = f"{place}.transformer_blocks.{9 if place.startswith(('down_blocks.2', 'up_blocks.0')) else 1}."
    assert any(n.startswith(last) for n in shapes)
    with pytest.raises(ErasureError, match=f"but not {re.escape(last[:-1])}"):
        detect({n: s for n, s in shapes.items() if not n.startswith(last)})


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_that_is_missing_altogether(kind: str, layout: str) -> None:
    """With its norm and projections, so that nothing of it is left."""
    shapes = shapes_of(kind, layout)
    places = {block.split(".transformer_blocks")[0] for block in transformers(shapes)}
    for place in places:
        if "mid" in place:
            continue  # distilled models have none there
        with pytest.raises(ErasureError, match="the file is incomplete, download it again"):
            detect({n: s for n, s in shapes.items() if not n.startswith(f"{place}.")})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [r"down_blocks\.0\.", r"up_blocks\.0\.", r"down_blocks\.1\.resnets\.0\."])
def test_holes_in_the_numbers(kind: str, block: str) -> None:
    shapes = shapes_of(kind, "diffusers")
    if kind != "sd2" and "resnets" in block:
        pytest.skip("one block a level")
    with pytest.raises(ErasureError, match="the file is incomplete"):
        detect({n: s for n, s in shapes.items() if not re.match(block, n)})


def test_the_file_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    _, single = tiny_files("sd2")
    state = load_file(single)
    block = transformers(shapes_of("sd2", "ldm"))[0]
    save_file({n: v for n, v in state.items() if not both_projections(n, block)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ErasureError, match=r"a\.safetensors: the UNet has .* but not attn2\.to_k\.weight and attn2\.to_v\.weight"
    ):
        open_checkpoint(tmp_path / "a.safetensors")


DISTILLED = {
    "BK-SDM-Base": {"cross_attention_dim": 768, "layers_per_block": 1},
    "BK-SDM-Small": {"cross_attention_dim": 768, "layers_per_block": 1, "mid_block_type": None},
    "BK-SDM-Tiny": {
        "cross_attention_dim": 768, "layers_per_block": 1, "mid_block_type": None, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "SSD-1B": DIFFUSERS["sdxl"] | {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Vega": DIFFUSERS["sdxl"] | {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DISTILLED)
def test_networks_that_are_whole_as_they_are(name: str) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(**DISTILLED[name])
    found = detect({n: tuple(v.shape) for n, v in net.state_dict().items()})
    assert found.kind == ("sdxl" if name in ("SSD-1B", "Vega") else "sd1")
    assert len(found.projections) == sum(n.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for n in net.state_dict())
