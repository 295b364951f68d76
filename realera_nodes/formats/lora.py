"""LoRA files for cross-attention projections.

Written with kohya names over diffusers blocks and alpha = rank: the one naming that ComfyUI, WebUIs and diffusers all
read. Read in that naming and in diffusers' and PEFT's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ErasureError
from .atomic import Batch
from .stream import FLOATS, SafetensorsFile, write_tensors

Factors = dict[str, tuple[Tensor, Tensor]]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# what follows a module's name: kohya, diffusers' old names, PEFT with and without an adapter's name
_PARTS = (
    (re.compile(r"(?:\.lora_down|\.lora\.down|_lora\.down|\.lora_A(?:\.\w+)?)\.weight$"), "down"),
    (re.compile(r"(?:\.lora_up|\.lora\.up|_lora\.up|\.lora_B(?:\.\w+)?)\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)
_PREFIXES = ("base_model.model.unet.", "base_model.model.", "unet.", "")
# float16 keeps its 11 bits of precision between these magnitudes, with room for small entries beside large ones
_COMFORTABLE = (2.0**-6, 2.0**10)


def kohya_name(canonical: str) -> str:
    """``down_blocks.1...attn2.to_k`` -> ``lora_unet_down_blocks_1_..._attn2_to_k``."""
    return "lora_unet_" + canonical.replace(".", "_")


def lora_tensors(factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a LoRA file.

    In float16, components whose two vectors are of very different size are balanced by a power of two, which leaves
    their product exact but keeps small numbers from becoming zero.

    Args:
        factors: canonical name -> (down (r, in), up (out, r)), any scale included.
        dtype: float16, bfloat16 or float32. ``alpha`` is float32 always: it is exact for any rank.

    Raises:
        ErasureError: no factors, shapes that do not fit, NaN or infinity, or too large for ``dtype``.
    """
    if dtype not in DTYPES:
        raise ErasureError(f"a LoRA cannot be stored as {dtype}: choose float16, bfloat16 or float32.")
    if not factors:
        raise ErasureError("there is nothing to write into the LoRA: the edit changes no projection.")
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        _require_fit(name, down, up)
        down, up = down.detach(), up.detach()
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ErasureError(f"the LoRA factors of {name} contain NaN or infinity: lower the learning rate or weaken the edit.")
        if dtype == torch.float16:
            down, up = _balanced(down, up)
        if max(down.abs().max(), up.abs().max()) > torch.finfo(dtype).max:
            raise ErasureError(f"the LoRA factors of {name} are too large for {dtype}: write the LoRA as float32.")
        key = kohya_name(name)
        tensors[f"{key}.lora_down.weight"] = down.to("cpu", dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = up.to("cpu", dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def _require_fit(name: str, down: Tensor, up: Tensor) -> None:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ErasureError(f"the LoRA factors of {name} do not fit each other (down {tuple(down.shape)}, up {tuple(up.shape)}): "
                           "the file is damaged or of another kind than LoRA on linear layers.")  # fmt: skip


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Equal magnitudes for both vectors of the rank-one components where one is outside float16's comfortable range."""
    d, u = down.abs().amax(1).double(), up.abs().amax(0).double()
    low, high = _COMFORTABLE
    needed = (d > 0) & (u > 0) & ((torch.minimum(d, u) < low) | (torch.maximum(d, u) > high))
    exponent = torch.where(needed, ((u.log2() - d.log2()) / 2).nan_to_num(0, 0, 0).round(), 0)
    factor = torch.exp2(exponent).to(down.dtype)
    return down * factor[:, None], up / factor.to(up)


def write_lora(
    path: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
    batch: Batch | None = None,
) -> None:
    """A LoRA file, whole or not at all, or with its ``batch``. Where it has metadata, they hold the hash of its tensors.

    Raises:
        ErasureError: see ``lora_tensors`` and ``atomic.atomic_file``.
    """
    write_tensors(path, lora_tensors(factors, dtype), metadata, overwrite, batch, hashed=bool(metadata))


def read_lora(path: Path, canonical_names: Iterable[str]) -> Factors:
    """Factors of a LoRA file in float32: canonical name -> (down (r, in), up (out, r)), with alpha / rank inside ``up``.

    Args:
        path: kohya, diffusers or PEFT safetensors file.
        canonical_names: projections of the model it is for, as in ``Architecture.projections``.

    Raises:
        ErasureError: unusable file, a checkpoint, a key that belongs to none of the names, factors that do not fit each other.
    """
    file = SafetensorsFile.open(path)
    parts = lora_parts(file)
    names = {}
    for name in canonical_names:
        names[kohya_name(name)] = name
        names |= {prefix + name: name for prefix in _PREFIXES}
    grouped: dict[str, dict[str, str]] = {}
    for key, (module, part) in parts.items():
        # diffusers' old attention processors
        known = names.get(module) or names.get(module.replace(".processor.", "."))
        if known is None:
            raise ErasureError(f"{key} in {file.path.name} belongs to no cross-attention to_k or to_v of this model: "
                               "choose a LoRA that was made for it and trains only those.")  # fmt: skip
        if part in grouped.setdefault(known, {}):
            raise ErasureError(f"{file.path.name} holds more than one LoRA for {known}: keep one adapter in the file.")
        grouped[known][part] = key
    scale = _PeftScale.of(file)
    return {name: _factors(file, name, grouped[name], scale) for name in sorted(grouped)}


def lora_parts(file: SafetensorsFile) -> dict[str, tuple[str, str]]:
    """Key -> (module as the file names it, "down", "up" or "alpha"). Raises ErasureError if this is not a LoRA."""
    parts: dict[str, tuple[str, str]] = {}
    foreign = None
    for key in file.entries:
        match = next(((m, part) for pattern, part in _PARTS if (m := pattern.search(key))), None)
        if match is None:
            foreign = foreign or key
        else:
            parts[key] = (key[: match[0].start()], match[1])
    if not any(part != "alpha" for _, part in parts.values()):
        raise ErasureError(f"{file.path.name} is not a LoRA (a checkpoint or a part of one): choose a LoRA file.")
    if foreign is not None:
        raise ErasureError(f"{foreign} in {file.path.name} is not part of a plain LoRA: choose one without DoRA, LoHa or LoKr.")
    return parts


def _factors(file: SafetensorsFile, name: str, keys: Mapping[str, str], peft: _PeftScale) -> tuple[Tensor, Tensor]:
    for part in ("down", "up"):
        if part not in keys:
            raise ErasureError(f"{file.path.name} lacks the {part} factor of {name}: the file is incomplete, download it again.")
    for key in (keys["down"], keys["up"]):
        if file.entries[key].dtype not in FLOATS:
            raise ErasureError(f"{key} in {file.path.name} holds quantised whole numbers: use a float16 version of the LoRA.")
    down, up = file.read(keys["down"]).float(), file.read(keys["up"]).float()
    _require_fit(name, down, up)
    rank = down.shape[0]
    scale = float(file.read(keys["alpha"]).float().reshape(())) / rank if "alpha" in keys else peft.at(name, rank)
    if not (math.isfinite(scale) and torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ErasureError(f"{name} in {file.path.name} contains NaN or infinity: the file is damaged, use another copy.")
    return down, up * scale


class _PeftScale:
    """alpha / rank of a PEFT file: its config travels in diffusers' metadata; without one, alpha is the rank."""

    def __init__(self, config: Mapping[str, object]) -> None:
        # diffusers prefixes the fields with the component's name
        self.config = {key.removeprefix("unet."): value for key, value in config.items()}

    @classmethod
    def of(cls, file: SafetensorsFile) -> _PeftScale:
        text = file.metadata.get("lora_adapter_metadata", "{}")
        try:
            return cls(dict(json.loads(text)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ErasureError(f"{file.path.name} has a lora_adapter_metadata that is not JSON: save the LoRA again.") from error

    def at(self, name: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha", rank)
        patterns = self.config.get("alpha_pattern")
        if isinstance(patterns, dict):
            alpha = next((a for key, a in patterns.items() if name == key or name.endswith("." + key)), alpha)
        if not isinstance(alpha, int | float):
            raise ErasureError(f"the LoRA's lora_alpha is {alpha!r} instead of a number: save the LoRA again.")
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
