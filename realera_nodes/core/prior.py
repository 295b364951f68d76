"""The general prior: what a model should keep knowing, as one Gram matrix of caption states (MACE section 3.1, design)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .phrases import folded

CAPTIONS = Path(__file__).parent / "captions.txt"


def captions(without: Iterable[str] = (), lines: Sequence[str] | None = None) -> list[str]:
    """Neutral captions, the shipped ones or ``lines``, without those that hold one of the phrases ``without`` as words."""
    lines = CAPTIONS.read_text(encoding="utf-8").splitlines() if lines is None else list(lines)
    phrases = [re.escape(folded(p)) for p in without if folded(p)]
    if not phrases:
        return lines
    # a phrase may begin or end with a bracket, where no word does
    banned = re.compile(r"(?<!\w)(?:" + "|".join(phrases) + r")(?:s|es)?(?!\w)")
    return [line for line in lines if not banned.search(line.casefold())]


def mean_gram(rows: Callable[[Sequence[str]], Iterable[tuple[Tensor, Tensor]]], prompts: Sequence[str], width: int) -> Tensor:
    """Mean of p p^T over token states of prompts: (d, d) float64.

    ``rows(prompts)`` yields (states (n, d), weights (n,)); padding that repeats may come as one row with its count.
    """
    total, weight = torch.zeros(width, width, dtype=torch.float64), 0.0
    for states, weights in rows(prompts):
        x = states.double()
        total.addmm_(x.T, x * weights.double()[:, None])
        weight += float(weights.sum())
    return total / max(weight, 1e-12)
