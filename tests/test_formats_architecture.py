"""Architectures and projections are found from tensor names and shapes, in either layout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realera_nodes.core.errors import ErasureError
from realera_nodes.demo import layout
from realera_nodes.formats.architecture import detect, ldm_attention_blocks

Shapes = dict[str, tuple[int, ...]]


def ldm_unet(res: tuple[int, ...], depth: tuple[int, ...], middle: int, width: int) -> Shapes:
    """Names and shapes of an LDM UNet: residual blocks and transformers per block for each level."""
    shapes: Shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3), "time_embed.0.weight": (1280, 320), "out.2.bias": (4,)}
    if width == 2048:
        shapes["label_emb.0.0.weight"] = (1280, 2816)

    def block(stem: str, count: int) -> None:
        shapes[f"{stem}.0.in_layers.0.weight"] = (320,)
        for t in range(count):
            for attn, d in (("attn1", 320), ("attn2", width)):
                for p in ("q", "k", "v"):
                    shapes[f"{stem}.1.transformer_blocks.{t}.{attn}.to_{p}.weight"] = (320, 320 if p == "q" else d)

    n = 1
    for level, count in enumerate(res):
        for _ in range(count):
            block(f"input_blocks.{n}", depth[level])
            n += 1
        if level < len(res) - 1:
            shapes[f"input_blocks.{n}.0.op.weight"] = (320, 320, 3, 3)
            n += 1
    block("middle_block", middle)
    n = 0
    for level in reversed(range(len(res))):
        for _ in range(res[level] + 1):
            block(f"output_blocks.{n}", depth[level])
            n += 1
    return shapes


STRUCTURES = {
    "sd1": ((2, 2, 2, 2), (1, 1, 1, 0), 1, 768),
    "sd2": ((2, 2, 2, 2), (1, 1, 1, 0), 1, 1024),
    "sdxl": ((2, 2, 2), (0, 2, 10), 10, 2048),
}
COUNTS = {"sd1": 32, "sd2": 32, "sdxl": 140}
DIFFUSERS = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
    },
}  # fmt: skip


def diffusers_shapes(kind: str) -> Shapes:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(**DIFFUSERS[kind])
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_ldm_names_become_diffusers_names(kind: str, prefix: str) -> None:
    unet = ldm_unet(*STRUCTURES[kind])
    shapes = {prefix + name: shape for name, shape in unet.items()} | {"first_stage_model.decoder.conv_in.weight": (1,)}
    if prefix == "":
        del shapes["first_stage_model.decoder.conv_in.weight"]
    found = detect(shapes)
    assert (found.kind, found.layout, found.context_width) == (kind, "ldm", STRUCTURES[kind][3])
    assert len(found.projections) == COUNTS[kind]
    names = layout.unet_to_diffusers([n for n in unet if "attn2.to_k" in n or "attn2.to_v" in n], STRUCTURES[kind][0])
    assert found.projections == {new.removesuffix(".weight"): prefix + old for old, new in names.items()}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_both_layouts_give_the_names_that_diffusers_has(kind: str) -> None:
    shapes = diffusers_shapes(kind)
    found = detect(shapes)
    assert (found.kind, found.layout) == (kind, "diffusers")
    assert found.projections == {name: name + ".weight" for name in found.projections}
    assert list(found.projections) == list(detect(ldm_unet(*STRUCTURES[kind])).projections)
    prefixed = detect({f"unet.{name}": shape for name, shape in shapes.items()})
    assert prefixed.projections == {name: f"unet.{name}.weight" for name in found.projections}


def test_known_places() -> None:
    sd1 = ldm_attention_blocks(ldm_unet(*STRUCTURES["sd1"]))
    known = {"input_blocks.1.1": "down_blocks.0.attentions.0", "input_blocks.2.1": "down_blocks.0.attentions.1",
             "input_blocks.4.1": "down_blocks.1.attentions.0", "input_blocks.8.1": "down_blocks.2.attentions.1",
             "middle_block.1": "mid_block.attentions.0", "output_blocks.3.1": "up_blocks.1.attentions.0",
             "output_blocks.8.1": "up_blocks.2.attentions.2", "output_blocks.11.1": "up_blocks.3.attentions.2"}  # fmt: skip
    assert {place: sd1[place] for place in known} == known
    sdxl = ldm_attention_blocks(ldm_unet(*STRUCTURES["sdxl"]))
    known = {"input_blocks.4.1": "down_blocks.1.attentions.0", "input_blocks.8.1": "down_blocks.2.attentions.1",
             "middle_block.1": "mid_block.attentions.0", "output_blocks.0.1": "up_blocks.0.attentions.0",
             "output_blocks.5.1": "up_blocks.1.attentions.2"}  # fmt: skip
    assert {place: sdxl[place] for place in known} == known


def test_the_embedded_models_places() -> None:
    """Two levels of one block, attention in the second and in the middle."""
    found = detect({f"model.diffusion_model.{n}": s for n, s in ldm_unet((1, 1), (0, 1), 1, 768).items()})
    places = {new.split(".transformer")[0]: old.split(".transformer")[0] for new, old in found.projections.items()}
    assert places == {"down_blocks.1.attentions.0": "model.diffusion_model.input_blocks.3.1",
                      "mid_block.attentions.0": "model.diffusion_model.middle_block.1",
                      "up_blocks.0.attentions.0": "model.diffusion_model.output_blocks.0.1",
                      "up_blocks.0.attentions.1": "model.diffusion_model.output_blocks.1.1"}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=5), st.integers(1, 2))
def test_any_number_of_levels_blocks_and_transformers(levels: list[tuple[int, int]], middle: int) -> None:
    res = tuple(r for r, _ in levels)
    unet = ldm_unet(res, tuple(d for _, d in levels), middle, 768)
    names = layout.unet_to_diffusers([n for n in unet if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))], res)
    assert detect(unet).projections == {new.removesuffix(".weight"): old for old, new in names.items()}


def test_order_is_from_the_first_block_to_the_last() -> None:
    names = list(detect(dict(reversed(ldm_unet(*STRUCTURES["sdxl"]).items()))).projections)
    assert names[:3] == [
        f"down_blocks.1.attentions.0.transformer_blocks.{t}.attn2.to_{p}" for t, p in ((0, "k"), (0, "v"), (1, "k"))
    ]
    assert names.index("down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k") > names.index(
        "down_blocks.2.attentions.0.transformer_blocks.2.attn2.to_k"
    )
    assert names[-1] == "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v"


def test_inpainting_and_averaged_weights_are_fine() -> None:
    unet = ldm_unet(*STRUCTURES["sd1"])
    unet["input_blocks.0.0.weight"] = (320, 9, 3, 3)
    shapes = {f"model.diffusion_model.{n}": s for n, s in unet.items()}
    shapes |= {"model_ema." + n.replace(".", ""): s for n, s in shapes.items()}
    assert len(detect(shapes).projections) == 32


SD1 = ldm_unet(*STRUCTURES["sd1"])
K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
XL_WITHOUT_SIZES = {n: s for n, s in ldm_unet(*STRUCTURES["sdxl"]).items() if "label_emb" not in n}
REFUSED = {
    "is a LoRA, not a checkpoint": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"],
    "is a LoRA": ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"],
    "a LoRA": ["unet.down_blocks.0.attentions.0.attn2.processor.to_k_lora.down.weight"],
    "Flux or SD3": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "such as Flux or SD3": ["joint_blocks.0.x_block.attn.qkv.weight"],
    "a transformer model": ["transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.0.attn2.to_v.weight"],
    "a video model": [*SD1, "input_blocks.1.1.time_stack.0.attn2.to_k.weight"],
    "a ControlNet": ["controlnet_cond_embedding.conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"],
    "Kolors": [*SD1, "encoder_hid_proj.weight"],
    "only a VAE, without a UNet": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"],
    "only a VAE": ["first_stage_model.decoder.conv_in.weight"],
    "only a text encoder, without a UNet": ["text_model.encoder.layers.0.self_attn.k_proj.weight"],
    "only a VAE and a text encoder": ["cond_stage_model.transformer.text_model.a", "first_stage_model.decoder.a"],
    "no cross-attention": ["some.other.weight"],
    "no cross-attention .* was found": [],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_other_models_are_named_for_what_they_are(message: str) -> None:
    with pytest.raises(ErasureError, match=message) as caught:
        detect(dict.fromkeys(REFUSED[message], (320, 768)))
    assert "SD1.x, SD2.x and SDXL are supported" in str(caught.value)


@pytest.mark.parametrize(("shapes", "message"), [
    (ldm_unet((2, 2), (1, 1), 1, 1280), r"unknown width, 1280 \(the SDXL refiner has 1280\): SD1\.x, SD2\.x and SDXL"),
    (ldm_unet((2, 2), (1, 1), 1, 512), r"unknown width, 512: SD1\.x, SD2\.x and SDXL"),
    (SD1 | {K: (320, 1024)}, "unknown width, 768 and 1024"),
    (XL_WITHOUT_SIZES, r"lacks SDXL's size embedding.*SD1\.x, SD2\.x and SDXL"),
    ({n: s for n, s in SD1.items() if n != K}, r"has down_blocks\.0\.\S+to_v but not \S+to_k: the file is incomplete"),
    ({n: s for n, s in SD1.items() if not n.startswith("output_blocks.4.")}, "do not fit: the file is incomplete"),
    ({n: s for n, s in SD1.items() if not n.startswith("input_blocks.6.")}, "do not fit: the file is incomplete"),
    (SD1 | {f"input_blocks.1.2.transformer_blocks.0.attn2.to_{p}.weight": (320, 768) for p in "kv"}, "is not where"),
])  # fmt: skip
def test_unets_that_cannot_be_edited(shapes: Shapes, message: str) -> None:
    with pytest.raises(ErasureError, match=message):
        detect(shapes)
