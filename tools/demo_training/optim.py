"""Muon: momentum whose matrix updates are made orthogonal (Jordan et al. 2024), batched over equal shapes.

``torch.optim.Muon`` takes no convolution weights and orthogonalises in bfloat16, which CPUs
without AMX emulate slowly; hence these few lines. Biases and norms go to AdamW.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .run import reduce_sum

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices to ``g`` (n, rows, cols), approximately: singular values in [.7, 1.2].

    Every factor of the iteration is a polynomial of the first Gram matrix, so it runs on that matrix alone:
    34 rows^3 multiplications instead of 20 rows^2 cols, which pays for wide convolutions.
    """
    transposed = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if transposed else g
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.transpose(1, 2)
    identity = torch.eye(gram.shape[1], dtype=x.dtype).expand_as(gram)
    total = identity
    for i in range(steps):
        factor = torch.baddbmm(b * gram, gram, gram, alpha=c).add_(identity, alpha=a)
        total = factor @ total if i else factor
        if i < steps - 1:
            gram = factor @ (factor @ gram)
    x = total @ x
    return x.transpose(1, 2) if transposed else x


class Muon(torch.optim.Optimizer):
    """Updates have root mean square 0.2 * lr, like AdamW's, so one learning rate serves both.

    With ``shard=(rank, world)`` each process orthogonalises its share and the updates are exchanged; the
    gradients of all processes must already agree. ``steps`` are Newton-Schulz iterations: three leave the
    weakest directions of a gradient smaller than five do, at nearly half the cost.
    """

    def __init__(self, params, lr=2e-3, momentum=0.95, weight_decay=0.0, steps=5, shard=(0, 1)):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, (self.rank, self.world) = steps, shard

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            by_shape = defaultdict(list)
            for i, p in enumerate(params):
                by_shape[(p.shape[0], p[0].numel())].append(i)
            updates = [torch.zeros_like(p) for p in params]
            turn = 0
            for (rows, cols), members in sorted(by_shape.items()):
                mine = [i for n, i in enumerate(members, turn) if n % self.world == self.rank]
                turn += len(members)
                if mine:
                    directions = torch.stack([self._momentum(params[i], group["momentum"]).reshape(rows, cols) for i in mine])
                    scaled = orthogonalize(directions, self.steps) * (0.2 * max(rows, cols) ** 0.5)
                    for i, update in zip(mine, scaled, strict=True):
                        updates[i] = update.view_as(params[i])
            if self.world > 1:
                reduce_sum(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        """Nesterov momentum of a parameter's gradient."""
        m = self.state[p].setdefault("momentum", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - beta)
        return p.grad.lerp(m, beta)
