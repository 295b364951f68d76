"""Erasure metrics: accuracies, their harmonic means, and residue and drift in embedding space."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def harmonic(*values: float) -> float:
    """Harmonic mean of values in [0, 1]; 0 where one of them is."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / v for v in values)


def h_o(acc_e: float, acc_s: float, acc_g: float) -> float:
    """Overall score of object erasure: 3 / (1/(1 - Acc_e) + 1/Acc_s + 1/(1 - Acc_g)) (MACE section 4, RealEra Table 1)."""
    return harmonic(1 - acc_e, acc_s, 1 - acc_g)


def h_c(acc_e: float, acc_s: float) -> float:
    """Score of celebrity erasure: 2 / (1/(1 - Acc_e) + 1/Acc_s) (MACE section 4.2)."""
    return harmonic(1 - acc_e, acc_s)


def h_a(clip_e: float, clip_s: float) -> float:
    """Score of style erasure: CLIP_s - CLIP_e (MACE section 4.4)."""
    return clip_s - clip_e


def accuracy(seen: Sequence[str], expected: Sequence[str]) -> float:
    """Share of pictures recognised as what they should show."""
    if len(seen) != len(expected) or not seen:
        raise ValueError(f"{len(seen)} labels for {len(expected)} pictures")
    return sum(a == b for a, b in zip(seen, expected, strict=True)) / len(seen)


def residue(edited: Tensor, base: Tensor, anchor: Tensor) -> Tensor:
    """How much of the way from a concept to its anchor is left: ||x' - a|| / ||x - a|| over the last axis.

    1 is untouched, 0 has become the anchor. ``edited``, ``base``, ``anchor``: (..., d) projected or raw states.
    """
    return (edited - anchor).norm(dim=-1) / (base - anchor).norm(dim=-1).clamp(min=1e-12)


def drift(edited: Tensor, base: Tensor) -> Tensor:
    """Relative change of what should stay: ||x' - x|| / ||x|| over the last axis."""
    return (edited - base).norm(dim=-1) / base.norm(dim=-1).clamp(min=1e-12)
