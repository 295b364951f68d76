"""The closed forms as the public UCE and MACE codes compute them, layer by layer: for the benchmark only.

Written from the papers' formula. For every layer the targets W0 e* of all rows are computed and kept, then

    W = (sum (W0 e*) e^T + mu W0) (sum e e^T + mu I)^-1

is summed and inverted anew, in float32. Two ways to sum:

- ``public``: as MACE's code does, concept by concept one matrix for each token position, summed over its prompts, then
  added up over the positions;
- ``product``: one matrix product for each concept, the same formula written with care.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .measure import Clock

FORMS = ("public", "product")


def cost(out: int, width: int, form: str) -> int:
    """Work a row in one layer, up to a common factor: what the times of some layers are scaled by.

    ``public`` is bound by the matrices it stores and adds, ``product`` by operations, W0 e* among them.
    """
    return out + width if form == "public" else 2 * out + width


def summed(left: Tensor, right: Tensor, form: str) -> Tensor:
    """sum of left_i right_i^T over all rows of one concept: (prompts, tokens, a), (prompts, tokens, b) -> (a, b)."""
    if form == "public":
        return torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1)).sum(0)
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def plain_edit(
    weights: Sequence[Tensor], erased: Sequence[Tensor], targets: Sequence[Tensor], mu: float, form: str, clock: Clock
) -> list[Tensor]:
    """New weights (out, d) for each of ``weights``, in the tensors' dtype.

    Args:
        erased: the rows e of each concept, (prompts, tokens, d).
        targets: the rows e* of each concept, (prompts, tokens, d).
        mu: weight of ||W - W0||^2.
        form: "public" or "product".
        clock: gets "rows" (grows with the rows) and "inverse" (does not).
    """
    with clock("rows"):
        values = [[target @ w.T for target in targets] for w in weights]
    edited = []
    for w, value in zip(weights, values, strict=True):
        with clock("rows"):
            left, right = mu * w, mu * torch.eye(w.shape[1], dtype=w.dtype)
            for e, v in zip(erased, value, strict=True):
                left += summed(v, e, form)
                right += summed(e, e, form)
        with clock("inverse"):
            edited.append(left @ torch.inverse(right))
    return edited


def plain_fusion(
    weights: Sequence[Tensor], refined: Sequence[Tensor], loras: Sequence[Sequence[tuple[Tensor, Tensor]]],
    states: Sequence[Tensor], prior: Tensor, form: str, clock: Clock,
) -> list[Tensor]:  # fmt: skip
    """MACE Eq. 7 layer by layer, with the targets (W' + B_i D_i) e of all rows kept: new weights (out, d) for each layer.

    Args:
        weights, refined: W, which the prior holds on to, and W' of each layer, (out, d).
        loras: each concept's (D (r, d), B (out, r)) in each layer.
        states: the rows e of each concept, (prompts, tokens, d).
        prior: sum of p p^T with its weight, (d, d).
        form, clock: as for ``plain_edit``.
    """
    with clock("rows"):
        values = [
            [e @ (start + lora[i][1] @ lora[i][0]).T for e, lora in zip(states, loras, strict=True)]
            for i, start in enumerate(refined)
        ]
    fused = []
    for w, value in zip(weights, values, strict=True):
        with clock("rows"):
            left, right = w @ prior, prior.clone()
            for e, v in zip(states, value, strict=True):
                left += summed(v, e, form)
                right += summed(e, e, form)
        with clock("inverse"):
            fused.append(left @ torch.inverse(right))
    return fused


def kept_bytes(rows: int, width: int, outs: Sequence[int], sides: int = 2) -> int:
    """What the plain formula must hold at once, in float32: all rows (``sides`` of them: e, e*) and all target values."""
    return 4 * rows * (sides * width + sum(outs))
