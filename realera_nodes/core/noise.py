"""The noise that sampling starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: torch's seeds end before it; after the largest comes 0
SEEDS = 2**64


def start_noise(seeds: Sequence[int], side: int) -> Tensor:
    """Noise (N, 4, side, side) float32: a seed gives the same in any batch and on any device."""
    wrapped = [s - SEEDS if s >= SEEDS else s for s in seeds]
    return torch.stack([torch.randn(4, side, side, generator=torch.Generator().manual_seed(s)) for s in wrapped])
