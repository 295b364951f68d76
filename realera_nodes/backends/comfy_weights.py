"""Weights of a model that ComfyUI has loaded: their names, their values under its patches, and whether they are numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ..core.errors import ErasureError
from ..formats.unet_names import ldm_parameters

PREFIX = "diffusion_model."
PROJECTIONS = ("attn2.to_k.weight", "attn2.to_v.weight")
SUPPORTED = "SD1.x, SD2.x and SDXL are supported"


def plain(x: Tensor) -> Tensor:
    """The tensor, copied if it comes from inference mode and autograd is on, which cannot save it."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def finite(x: Tensor) -> Tensor:
    """What a model predicted. ErasureError: NaN or infinite."""
    if not torch.isfinite(x).all():
        raise ErasureError(
            "the model predicts NaN or infinite noise: its weights are damaged, or overflow in half precision; "
            "load another file, or start ComfyUI with --force-fp32."
        )
    return x


class EffectiveWeights(Mapping[str, Tensor]):
    """Weights with the patches of a model applied, float32 on the CPU, computed when they are asked for."""

    def __init__(self, patcher: Any, keys: Mapping[str, str]):
        patches = patcher.get_key_patches(PREFIX)
        self.parts = {name: (key, patches[key]) for name, key in keys.items()}

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
    names = [key.removeprefix(PREFIX) for key in patcher.model.state_dict() if key.startswith(PREFIX)]
    sdxl = patcher.model.model_config.unet_config.get("num_classes") == "sequential"
    found = ldm_parameters(names, sdxl)
    unknown = set(names) - set(found.values())
    if unknown:
        raise ErasureError(f"the UNet has a part of an unknown layout ({min(unknown)}): {SUPPORTED}.")
    return {name: PREFIX + stored for name, stored in found.items()}
