"""Weights of a model that ComfyUI has loaded: their names, their values under its patches, and whether they are numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor

from ..core.errors import ErasureError
from ..formats.unet_names import ldm_parameters

PREFIX = "diffusion_model."
PROJECTIONS = ("attn2.to_k.weight", "attn2.to_v.weight")
#: types of weights that are computed with as they are
COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUPPORTED = "SD1.x, SD2.x and SDXL are supported"


def plain(x: Tensor) -> Tensor:
    """The tensor, copied if it comes from inference mode and autograd is on, which cannot save it."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def working_dtype(weight: Tensor) -> torch.dtype:
    """The type for differences beside a weight: its own, or half precision where it is float8 or whole numbers.

    The host adds patches to such weights in single precision; in float8 the difference itself would lose 4 to 23%.
    """
    return weight.dtype if weight.dtype in COMPUTED else torch.float16


def key_patches(patcher: Any, key: str) -> list[Any]:
    """A weight without patches, how to read it, and its patches: what the host's ``get_key_patches`` gives for one key.

    That one reads all keys of the state dict, and fails where quantised weights lie in it with scales beside them.
    """
    weight, _, convert = get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    return [(weight, convert or (lambda value, **_: value)), *patcher.patches.get(key, [])]


def weight_keys(patcher: Any) -> list[str]:
    """Keys of a model's state dict that name parameters and buffers, not what a quantised weight is packed into."""
    owned = {name for name, _ in (*patcher.model.named_parameters(), *patcher.model.named_buffers())}
    return [key for key in patcher.model_state_dict() if key in owned]


def parameter(patcher: Any, key: str) -> Tensor:
    """A weight as the model holds it, in its own shape: in a state dict quantised ones lie packed, beside their scales."""
    return comfy.utils.get_attr(patcher.model, key)


def finite(x: Tensor) -> Tensor:
    """What a model predicted. ErasureError: NaN or infinite."""
    if not torch.isfinite(x).all():
        raise ErasureError(
            "the model predicts NaN or infinite noise: its weights are damaged, or overflow in half precision; "
            "load another file, or start ComfyUI with --force-fp32."
        )
    return x


class EffectiveWeights(Mapping[str, Tensor]):
    """Weights with the patches of a model applied, float32 on the CPU, computed when they are asked for.

    float8 and quantised weights are read by the host's own way, their scales included.
    """

    def __init__(self, patcher: Any, keys: Mapping[str, str]):
        self.parts = {name: (key, key_patches(patcher, key)) for name, key in keys.items()}

    def __getitem__(self, name: str) -> Tensor:
        key, ((weight, convert), *patches) = self.parts[name]
        full = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
        full = comfy.lora.calculate_weight(patches, full, key) if patches else full
        if not torch.isfinite(full).all():
            raise ErasureError(f"{key} holds NaN or infinite numbers: the model or a LoRA on it is damaged; load another file.")
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def layer_keys(patcher: Any) -> dict[str, str]:
    """Weight keys of the attention projections by canonical name: diffusers' names for the host's.

    Raises:
        ErasureError: no UNet with text cross-attention.
    """
    config = patcher.model.model_config.unet_config
    names = comfy.utils.unet_to_diffusers(config)
    keys = {PREFIX + theirs: name.removesuffix(".weight") for name, theirs in names.items() if ".attn" in name}
    present = [k for k in patcher.model.state_dict() if k.endswith(PROJECTIONS)]
    if not names or not present:
        raise ErasureError(
            f"{type(patcher.model).__name__} is not supported yet, as it has no UNet with text cross-attention: {SUPPORTED}."
        )
    unknown = [k for k in present if k not in keys]
    if unknown:
        raise ErasureError(f"the UNet has a layer of an unknown layout ({unknown[0]}): {SUPPORTED}.")
    return {name: key for key, name in sorted(keys.items(), key=lambda item: item[1]) if key.endswith(".weight")}


def parameter_keys(patcher: Any) -> dict[str, str]:
    """Keys of all of the UNet's parameters by diffusers' names.

    Raises:
        ErasureError: a UNet with parts of an unknown layout.
    """
    ends = (".weight", ".bias")  # beside quantised ones lie their scales
    names = [key.removeprefix(PREFIX) for key in weight_keys(patcher) if key.startswith(PREFIX) and key.endswith(ends)]
    sdxl = patcher.model.model_config.unet_config.get("num_classes") == "sequential"
    found = ldm_parameters(names, sdxl)
    unknown = set(names) - set(found.values())
    if unknown:
        raise ErasureError(f"the UNet has a part of an unknown layout ({min(unknown)}): {SUPPORTED}.")
    return {name: PREFIX + stored for name, stored in found.items()}
