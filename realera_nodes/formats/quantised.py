"""Weights that were packed into fewer bits: what is stored is not the weight, so an edit of it would be wrong."""

from __future__ import annotations

import re

from ..core.errors import ErasureError
from .stream import FLOATS, SafetensorsFile

#: (what stands beside or in place of a packed weight, how people call it)
_SIGNS = (
    (re.compile(r"\.quant_state\.bitsandbytes__nf4$"), "NF4 (bitsandbytes)"),
    (re.compile(r"\.quant_state\.bitsandbytes__fp4$"), "FP4 (bitsandbytes)"),
    (re.compile(r"\.(nested_)?(absmax|quant_map)$|\.quant_state\."), "4-bit (bitsandbytes)"),
    (re.compile(r"\.(SCB|weight_format)$"), "int8 (bitsandbytes)"),
    (re.compile(r"\.comfy_quant$|\.weight_scale_2$"), "ComfyUI-packed"),
    (re.compile(r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|weight_scale_inv|input_scale|scale_input)$"), "scaled float8"),
    (re.compile(r"\.weight\._(data|scale|shift|zeropoint)$|\.weight_qtype$"), "quanto-packed"),
    (re.compile(r"\.(W_q|W_q\.meta)$"), "HQQ"),
    (re.compile(r"\.(qweight|qzeros|wscales|g_idx)$"), "GPTQ, AWQ or SVDQuant"),
    (re.compile(r"\.(weight_packed|weight_zero_point|_weight_qdata|weight_qdata|quant_type|weight_q)$"), "packed"),
)


def refuse_quantised(file: SafetensorsFile) -> None:
    """Raises ErasureError, naming the kind and one tensor, where weights of a model are quantised. Plain float8 is not."""
    for pattern, kind in _SIGNS:  # the surest first
        for name in file.entries:
            if pattern.search(name):
                raise ErasureError(f"{file.path.name} holds quantised, {kind} weights: use a float16 version of the model "
                                   f"({name} tells).")  # fmt: skip
    for name, entry in file.entries.items():
        if name.endswith(".weight") and entry.dtype not in FLOATS:
            raise ErasureError(f"{name} in {file.path.name} holds quantised whole numbers ({entry.dtype}): "
                               "use a float16 version of the model.")  # fmt: skip
    marked = next((k for k in ("_quantization_metadata", "quantization_config") if k in file.metadata), None)
    if marked is not None:
        raise ErasureError(f"{file.path.name} holds quantised weights: use a float16 version of the model ({marked} tells).")
