"""Which Stable Diffusion a set of tensors is, and where its cross-attention projections and its other parameters are.

Projections are found by suffix and LDM block numbers are translated from the keys themselves (``unet_names``), so any
number of levels, blocks and transformers works.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import ErasureError
from .completeness import require_whole
from .unet_names import TOPS, ldm_attention_blocks, ldm_parameters

Kind = Literal["sd1", "sd2", "sdxl"]
KINDS: dict[int, Kind] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by context width
PREDICTIONS = ("epsilon", "v_prediction")  # what such a model predicts
SUPPORTED = "SD1.x, SD2.x and SDXL are supported"
_PROJECTION = re.compile(r"\.transformer_blocks\.\d+\.attn2\.to_[kv]\.weight$")
_LDM_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_DIFFUSERS_PREFIXES = ("", "unet.")
_LORA = re.compile(r"[._](lora_(up|down|A|B|mid)|lora\.(up|down)|hada_w1_a|lokr_w1|lora_magnitude_vector)(\.|$)")
# families by a part of their keys, for an error that says what the file is
_FAMILIES = (
    (("double_blocks.", "joint_blocks.", "single_transformer_blocks."), "a transformer model such as Flux or SD3"),
    (("motion_modules.", "time_stack.", "temporal_transformer_blocks."), "a video model"),
    (("controlnet_cond_embedding.", "input_hint_block.", "control_model.", "controlnet_"), "a ControlNet"),
    (("encoder_hid_proj.",), "Kolors or another model with its own text encoder"),
)
_VAE = ("first_stage_model.", "encoder.down_blocks.", "encoder.down.", "encoder.mid", "decoder.", "post_quant_conv.", "vae.")
_TEXT = ("text_model.", "cond_stage_model.", "conditioner.", "text_encoder", "encoder.block.", "transformer.text_model.", "te.")


@dataclass(frozen=True)
class Architecture:
    """What ``detect`` found.

    Attributes:
        kind: "sd1", "sd2" or "sdxl".
        layout: how the keys are named: "ldm" (single-file checkpoints, ComfyUI) or "diffusers".
        context_width: width d of the text embeddings: 768, 1024 or 2048.
        projections: canonical name -> stored key of each attn2.to_k and attn2.to_v, from the first block to the last.
        parameters: diffusers' name -> stored key of each of the UNet's parameters, the projections' (with .weight) among them.
    """

    kind: Kind
    layout: Literal["ldm", "diffusers"]
    context_width: int
    projections: dict[str, str]
    parameters: dict[str, str] = field(default_factory=dict)


def detect(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The architecture of a model from its tensors' names and shapes.

    Raises:
        ErasureError: a LoRA, a model of another family, a part of a model without a UNet, an incomplete UNet.
    """
    _refuse_other_families(shapes)
    layout, prefix, projections = _projections(shapes)
    if not projections:
        raise ErasureError(_what_instead(shapes))
    for name in projections:
        other = name[:-1] + ("v" if name.endswith("k") else "k")
        if other not in projections:
            raise ErasureError(f"the UNet has {name} but not {other}: the file is incomplete, download it again.")
    widths = {shapes[key][1] if len(shapes[key]) == 2 else 0 for key in projections.values()}
    width = widths.pop()
    if widths or width not in KINDS:
        found = " and ".join(str(w) for w in sorted({width, *widths}))
        hint = " (the SDXL refiner has 1280)" if width == 1280 else ""
        raise ErasureError(f"the model's text embeddings have an unknown width, {found}{hint}: {SUPPORTED} (768, 1024, 2048).")
    if KINDS[width] == "sdxl" and not any("label_emb." in key or "add_embedding." in key for key in shapes):
        raise ErasureError(f"the UNet is 2048 wide but lacks SDXL's size embedding, so its family is unknown: {SUPPORTED}.")
    ordered = {name: projections[name] for name in sorted(projections, key=_order)}
    parameters = _parameters(shapes, layout, prefix, width)
    require_whole([name[len(prefix) :] for name in shapes if name.startswith(prefix)], parameters)
    return Architecture(KINDS[width], layout, width, ordered, parameters)


def _parameters(names: Iterable[str], layout: str, prefix: str, width: int) -> dict[str, str]:
    """diffusers' name -> stored key of all of the UNet's parameters under a prefix."""
    mine = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    if layout == "diffusers":
        return {name: prefix + name for name in mine if name.split(".", 1)[0] in TOPS}
    return {name: prefix + stored for name, stored in ldm_parameters(mine, KINDS[width] == "sdxl").items()}


def _refuse_other_families(names: Iterable[str]) -> None:
    names = list(names)
    if any(_LORA.search(name) for name in names):
        raise ErasureError(f"this is a LoRA, not a checkpoint: choose the checkpoint it belongs to ({SUPPORTED}).")
    for parts, family in _FAMILIES:
        if any(name.startswith(part) or f".{part}" in name for name in names for part in parts):
            raise ErasureError(f"this is {family}, but only {SUPPORTED}: choose one of those.")


def _projections(names: Iterable[str]) -> tuple[Literal["ldm", "diffusers"], str, dict[str, str]]:
    """Layout, prefix, and canonical name -> key; empty if there are none under a prefix of a UNet."""
    keys = list(names)
    found = [key for key in keys if _PROJECTION.search(key)]
    for prefix in _DIFFUSERS_PREFIXES:
        mine = _under(found, prefix, ("down_blocks.", "mid_block.", "up_blocks."))
        if mine:
            return "diffusers", prefix, mine
    for prefix in _LDM_PREFIXES:
        mine = _under(found, prefix, ("input_blocks.", "middle_block.", "output_blocks."))
        if mine:
            blocks = ldm_attention_blocks(key[len(prefix) :] for key in keys if key.startswith(prefix))
            return "ldm", prefix, {_translate(name, blocks): key for name, key in mine.items()}
    return "ldm", "", {}


def _under(keys: Iterable[str], prefix: str, stems: tuple[str, ...]) -> dict[str, str]:
    """Name without prefix and ".weight" -> key, of the keys that begin with the prefix and a stem."""
    starts = tuple(prefix + stem for stem in stems)
    return {key[len(prefix) : -len(".weight")]: key for key in keys if key.startswith(starts)}


def _translate(name: str, blocks: Mapping[str, str]) -> str:
    block, rest = name.split(".transformer_blocks.", 1)
    if block not in blocks:
        raise ErasureError(f"{name} is not where a Stable Diffusion UNet has its cross-attention: {SUPPORTED}.")
    return f"{blocks[block]}.transformer_blocks.{rest}"


def _order(name: str) -> list[int | str]:
    """Down, middle, up, with numbers as numbers."""
    place = ("down_blocks", "mid_block", "up_blocks").index(name.split(".", 1)[0])
    return [place, *(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)), name]


def _what_instead(names: Iterable[str]) -> str:
    """The sentence for a file without a UNet's cross-attention."""
    names = list(names)
    if any("transformer_blocks." in name or ".attn2." in name for name in names):
        return f"this is a transformer model or has an unknown UNet, but only {SUPPORTED}: choose one of those."
    vae, text = (any(name.startswith(p) for name in names for p in parts) for parts in (_VAE, _TEXT))
    if vae or text:
        part = "a VAE and a text encoder" if vae and text else "a VAE" if vae else "a text encoder"
        return f"this is only {part}, without a UNet: choose the whole checkpoint ({SUPPORTED})."
    return f"no cross-attention (attn2.to_k, attn2.to_v) was found in this model: {SUPPORTED}."
