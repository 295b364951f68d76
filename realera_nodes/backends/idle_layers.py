"""Text encoder layers that do nothing are not run: the embedded model's CLIP-L has eleven of them.

A residual layer whose attention and MLP both end in zero weights returns its input, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def is_idle(layer: Any) -> bool:
    """Whether a CLIP layer adds nothing to what it is given."""
    ends = (getattr(getattr(layer, "self_attn", None), "out_proj", None), getattr(getattr(layer, "mlp", None), "fc2", None))
    return all(end is not None and not any(bool(p.count_nonzero()) for p in end.parameters()) for end in ends)


@contextmanager
def without_idle_layers(encoder: Any) -> Iterator[None]:
    """Inside, a CLIP text encoder skips its idle layers. Only its last state may be asked for: layers are counted otherwise."""
    stack = getattr(encoder, "text_model", encoder)
    stack = getattr(stack, "encoder", stack)
    layers = getattr(stack, "layers", None)
    if layers is None:
        yield
        return
    stack.layers = nn.ModuleList([layer for layer in layers if not is_idle(layer)])
    try:
        yield
    finally:
        stack.layers = layers
