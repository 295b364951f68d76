"""Which timesteps training visits: uniform, and MACE's concept-focal importance sampling (Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(count: int, generator: torch.Generator, low: int = 0, high: int = 1000) -> Tensor:
    """``count`` integer timesteps in [low, high), each as likely."""
    return torch.randint(low, high, (count,), generator=generator)


def focal_density(t1: float = 200, t2: float = 400, gamma: float = 0.05, steps: int = 1000) -> Tensor:
    """MACE Eq. 5: probability of each timestep, (sigmoid(gamma (t - t1)) - sigmoid(gamma (t - t2))) / Z, (steps,) float64."""
    t = torch.arange(steps, dtype=torch.float64)
    density = torch.sigmoid(gamma * (t - t1)) - torch.sigmoid(gamma * (t - t2))
    return density / density.sum()


def focal(count: int, generator: torch.Generator, density: Tensor) -> Tensor:
    """``count`` timesteps by exact inverse-CDF sampling of a density (steps,)."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.searchsorted(density.cumsum(0), u).clamp(max=len(density) - 1)
