"""Which timesteps training visits: uniform, and MACE's concept-focal importance sampling (Eq. 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ErasureError


def uniform_density(steps: int = 1000) -> Tensor:
    """Each timestep as likely: (steps,) float64."""
    return torch.full((steps,), 1 / steps, dtype=torch.float64)


def focal_density(t1: float = 200, t2: float = 400, gamma: float = 0.05, steps: int = 1000) -> Tensor:
    """MACE Eq. 5: probability of each timestep, (sigmoid(gamma (t - t1)) - sigmoid(gamma (t - t2))) / Z, (steps,) float64.

    With the paper's values the mean is 300 and [200, 400] holds 86%: early steps (large t), which decide what a picture is
    of in general, are left alone.

    Raises:
        ErasureError: the interval is empty or lies outside of the timesteps, or gamma is not above 0.
    """
    if not (0 <= t1 < t2 <= steps):
        raise ErasureError(f"t1 is {t1:g} and t2 is {t2:g}: they must hold 0 <= t1 < t2 <= {steps}.")
    if not 0 < gamma < math.inf:
        raise ErasureError(f"gamma is {gamma:g}: it must be above 0 and finite.")
    t = torch.arange(steps, dtype=torch.float64)
    density = torch.sigmoid(gamma * (t - t1)) - torch.sigmoid(gamma * (t - t2))
    total = density.sum()
    if not total > 0:
        raise ErasureError(f"no timestep lies between t1 = {t1:g} and t2 = {t2:g}: widen them, or lower gamma (now {gamma:g}).")
    return density / total


def draw(count: int, generator: torch.Generator, density: Tensor) -> Tensor:
    """``count`` timesteps (count,) int64 of a density (steps,), by its exact inverse distribution function.

    A timestep t is drawn for u in [F(t - 1), F(t)), so that one with density 0 never is.
    """
    below = density.double().cumsum(0)
    u = torch.rand(count, generator=generator, dtype=torch.float64) * below[-1]  # rounding leaves the sum beside 1
    # u < 1, but the product may round up to the sum itself: then it is the last timestep that can be drawn
    return torch.searchsorted(below, u, right=True).clamp(max=int(density.nonzero()[-1]))
