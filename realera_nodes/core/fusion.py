"""MACE's fusion: any number of concept LoRAs in one closed form (Eq. 7), and their naive sum (Eq. 6).

LoRA i should do to its own concept's prompts what it does alone, and no more. With W the original weight, W' = W + W X the
refined one (X = T - I of core.refinement), G_i = sum e e^T over the states of concept i's prompts, G = sum_i G_i, P the sum
of kept states with all weights applied and rho = mu + a numerical ridge, Eq. 7 is

    min_W* sum_i sum_e ||W* e - (W' + B_i D_i) e||^2 + sum_p ||W* p - W p||^2 + rho ||W* - W'||^2,

where what is kept has the original's values, and mu pulls to the refined weights: the paper writes ||W' - W||^2 for the
refinement alone, and the public code starts the fusion from W'. It is quadratic in W*. Its derivative vanishes where, with
C = G + P + rho I,

    W* C = W' G + sum_i B_i D_i G_i + W P + rho W'
         = W C + W X (G + rho I) + sum_i B_i (D_i G_i),

    W* = W + W [X (G + rho I) C^-1] + [sum_i B_i (D_i G_i)] C^-1.

The bracket in the middle is one d x d matrix for all projections. Of a LoRA only B_i (out, r) and D_i G_i = sum (D_i e) e^T
(r, d) enter, never its concept's states: they are kept as they come while they are smaller than their (out, d) product, then
added to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import Factors
from .closed_form import Grams, Transform, add_gram, all_finite, mirrored
from .errors import ErasureError
from .refinement import RefinementConfig, add_priors, grouped

#: rows of text states that are multiplied at once
ROWS = 4096


@dataclass(frozen=True)
class Fused:
    """What all LoRAs became: W* = W + W (transform.change) + up @ down.

    Attributes:
        transform: the refinement's part; None where there was no refinement
        factors: name -> (down (r, d), up (out, r)), exact; r is the sum of the LoRAs' ranks, at most min(out, d)
        condition: of C in the 1-norm
    """

    transform: Transform | None
    factors: Factors
    condition: float

    def delta(self, name: str, weight: Tensor) -> Tensor:
        """W* - W for W (out, d), in the wider of float32 and the weight's type."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        lora = None
        if name in self.factors:
            down, up = (x.to(weight.device, dtype) for x in self.factors[name])
            lora = up @ down
        if self.transform is None:
            return torch.zeros(weight.shape, dtype=dtype, device=weight.device) if lora is None else lora
        total = self.transform.delta(weight)
        return total if lora is None else total.add_(lora)


class Fusion:
    """Accumulates LoRAs one by one; its memory does not grow with their number.

    Args:
        shapes: (out, d) of every projection that a LoRA may change, by canonical name

    Attributes:
        count: LoRAs added

    Raises:
        ErasureError: there is no projection, or not all read states of one width.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        widths = sorted({int(shape[1]) for shape in shapes.values()})
        if len(widths) != 1:
            found = " and ".join(map(str, widths)) or "none"
            raise ErasureError(f"fusion needs projections of one text width, and the model's are {found}: choose another model.")
        self.width = widths[0]
        self.shapes = {name: (int(shape[0]), int(shape[1])) for name, shape in shapes.items()}
        self.count = 0
        self._gram = torch.zeros(self.width, self.width, dtype=torch.float64)  # on and below the diagonal
        self._thin = {name: _Thin(*shape) for name, shape in self.shapes.items()}
        self._full: dict[str, Tensor] = {}

    @property
    def gram(self) -> Tensor:
        """G, the sum of e e^T over the states of all concepts' prompts, (d, d) float64."""
        return mirrored(self._gram)

    def add(self, factors: Factors, states: Iterable[Tensor], source: str = "") -> None:
        """Adds a LoRA with the text states of its concept's prompts, (..., d) each; all their tokens count.

        Layers that it lacks it leaves as they are.

        Args:
            source: what the LoRA is called in messages

        Raises:
            ErasureError: it is empty, damaged, or made for another model. Nothing of it was added then.
        """
        who = f'the LoRA "{source}"' if source else f"LoRA {self.count + 1}"
        check_factors(factors, self.shapes, who)
        rows = [_checked(x, self.width, who) for x in states]
        names = sorted(factors)
        # one product for all layers: a rank-1 LoRA has 32 rows, of which each alone would be a matrix-vector product
        down = torch.cat([factors[name][0].double() for name in names])
        right = torch.zeros_like(down)
        for group in grouped(rows, len, ROWS):
            x = torch.empty(sum(map(len, group)), self.width + len(down), dtype=torch.float64)
            e = x[:, : self.width]
            for part, there in zip(group, e.split([len(part) for part in group]), strict=True):
                there.copy_(part)
            x[:, self.width :] = (down @ e.T).T
            add_gram(self._gram, x, more=right)
        for name, part in zip(names, right.split([factors[n][0].shape[0] for n in names]), strict=True):
            thin = self._thin[name]
            thin.append(factors[name][1], part)
            if thin.rank >= thin.limit:
                self._full[name] = thin.added_to(self._full.get(name))
                thin.rank = 0
        self.count += 1

    def solve(
        self, config: RefinementConfig, general: Tensor | None = None, domain: Tensor | None = None,
        refinement: Transform | None = None, dtype: torch.dtype = torch.float32,
    ) -> Fused:  # fmt: skip
        """The minimiser of Eq. 7. More LoRAs may be added afterwards.

        Args:
            general, domain: what is kept, as for core.refinement.refinement_grams; the targets are the original weights'
            refinement: W' = W T that the LoRAs were trained on; None: the original
            dtype: of the factors

        Raises:
            ErasureError: no LoRA was added, or C cannot be inverted well.
        """
        if not self.count:
            raise ErasureError("no LoRA to fuse was given: add at least one.")
        kept = Grams(self.width)
        add_priors(kept, general, config.fusion_prior, domain, config.lambda_3)
        gram = self.gram
        c = gram + kept.preserved
        pull = config.mu + config.ridge * (float(c.diagonal().mean()) + config.mu)
        c.diagonal().add_(pull)
        lower, condition = _factorised(c, config)
        transform = None
        if refinement is not None:
            start = refinement.change.to(c)
            transform = Transform(_over(start @ gram + pull * start, lower), condition, config.mu)
        return Fused(transform, self._factors(lower, dtype), condition)

    def _factors(self, lower: Tensor, dtype: torch.dtype) -> Factors:
        """S C^-1 of each projection as (down, up): of thin parts by their right sides alone, else by an identity."""
        result: Factors = {}
        names = [n for n in self.shapes if self._thin[n].rank and n not in self._full]
        for group in grouped(names, lambda n: self._thin[n].rank, 512):
            thin = [self._thin[n] for n in group]
            downs = _over(torch.cat([t.right for t in thin]), lower).to(dtype).split([t.rank for t in thin])
            for name, down, t in zip(group, downs, thin, strict=True):
                result[name] = (down.clone(), t.left.T.to(dtype).clone(memory_format=torch.contiguous_format))
        for name, full in self._full.items():
            out, d = self.shapes[name]
            total = full if not self._thin[name].rank else self._thin[name].added_to(full.clone())
            delta = _over(total, lower).to(dtype)
            result[name] = (delta, torch.eye(out, dtype=dtype)) if out <= d else (torch.eye(d, dtype=dtype), delta)
        return result


class _Thin:
    """A sum of products left^T right, kept as rows of both until the product itself is smaller.

    Both sides have room for as many again, up to ``limit``: a small tensor for every LoRA, made between large ones that come
    and go, would leave their places in memory too small for the next ones.
    """

    def __init__(self, out: int, d: int):
        self.rank, self.limit = 0, -(-out * d // (out + d))
        self._left, self._right = torch.empty(0, out), torch.empty(0, d, dtype=torch.float64)

    @property
    def left(self) -> Tensor:
        """(rank, out), in the LoRAs' widest type."""
        return self._left[: self.rank]

    @property
    def right(self) -> Tensor:
        """(rank, d) float64."""
        return self._right[: self.rank]

    def append(self, left: Tensor, right: Tensor) -> None:
        """Adds left (out, r) @ right (r, d); copies are kept, as the caller may go on training."""
        end = self.rank + right.shape[0]
        dtype = torch.promote_types(self._left.dtype, left.dtype)
        if end > len(self._right) or dtype != self._left.dtype:
            room = max(end, min(2 * len(self._right), self.limit))
            old = self.left, self.right
            self._left = torch.empty(room, left.shape[0], dtype=dtype)
            self._right = torch.empty(room, right.shape[1], dtype=torch.float64)
            self._left[: self.rank], self._right[: self.rank] = old
        self._left[self.rank : end] = left.detach().T
        self._right[self.rank : end] = right
        self.rank = end

    def added_to(self, full: Tensor | None) -> Tensor:
        """The sum, (out, d) float64, added in place to ``full`` if there is one."""
        left = self.left.double().T
        return left @ self.right if full is None else full.addmm_(left, self.right)


def _factorised(c: Tensor, config: RefinementConfig) -> tuple[Tensor, float]:
    """C's Cholesky factor and its condition number in the 1-norm, which is at least the 2-norm's and quicker to have."""
    lower, failed = torch.linalg.cholesky_ex(c)
    condition = float("inf")
    if not int(failed):
        condition = float(torch.linalg.matrix_norm(c, 1) * torch.linalg.matrix_norm(torch.cholesky_inverse(lower), 1))
    if not condition <= config.max_condition:
        raise ErasureError(
            f"the sum of text states has condition number {condition:.1e}, above {config.max_condition:.0e}: raise ridge "
            f"(now {config.ridge:g}) or lambda_2, or give more concepts to retain."
        )
    return lower, condition


def _over(rows: Tensor, lower: Tensor) -> Tensor:
    """rows C^-1."""
    return torch.cholesky_solve(rows.T, lower).T.contiguous()


def _checked(states: Tensor, width: int, who: str) -> Tensor:
    """States (..., d) as rows (n, d)."""
    rows = states.reshape(-1, states.shape[-1])
    if rows.shape[1] != width:
        raise ErasureError(
            f"the text states of {who} are {rows.shape[1]} wide, the model's cross-attention {width}: use its own encoder."
        )
    if not all_finite(rows):
        raise ErasureError(f"the text states of {who} hold NaN or infinite values: load another text encoder.")
    return rows


def check_factors(factors: Factors, shapes: Mapping[str, Sequence[int]], who: str = "the LoRA") -> None:
    """Raises ErasureError where a LoRA does not fit projections of these (out, d): the sentence names the first layer."""
    if not factors:
        raise ErasureError(f"{who} has no layer of the text attention (attn2.to_k, attn2.to_v): choose an erasure LoRA.")
    for name in sorted(factors):
        down, up = factors[name]
        if name not in shapes:
            raise ErasureError(f"{who} changes {name}, which is no text projection of this model: it was made for another one.")
        out, width = shapes[name]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ErasureError(f"the two factors of {who} at {name} do not fit each other: the file is damaged; train it again.")
        if down.shape[1] != width:
            raise ErasureError(f"{who} reads text states of width {down.shape[1]} at {name}, the model's are {width} wide: "
                               "it was made for another model.")  # fmt: skip
        if up.shape[0] != out:
            raise ErasureError(f"{who} writes {up.shape[0]} values at {name}, the model's layer has {out}: "
                               "it was made for another model.")  # fmt: skip
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ErasureError(f"{who} holds NaN or infinite values at {name}: train it again.")


def naive_sum(
    loras: Iterable[tuple[Factors, float]], shapes: Mapping[str, Sequence[int]], normalise: bool = True
) -> dict[str, Tensor]:
    """Eq. 6, the ablation: sum_i w_i B_i D_i by name, (out, d) float32, streamed.

    Args:
        loras: (factors, weight w_i)
        normalise: divide by the sum of weights, as Eq. 6 has it; off, the LoRAs act with their full strength at once

    Raises:
        ErasureError: no LoRA, one of another model, or weights whose sum is not above 0.
    """
    total: dict[str, Tensor] = {}
    weights, count = 0.0, 0
    for factors, weight in loras:
        count += 1
        check_factors(factors, shapes, f"LoRA {count}")
        weights += weight
        for name, (down, up) in factors.items():
            part = total.setdefault(name, torch.zeros(up.shape[0], down.shape[1]))
            part.addmm_(up.float(), down.float(), alpha=weight)
    if not count:
        raise ErasureError("no LoRA to fuse was given: add at least one.")
    if not normalise:
        return total
    if not 0 < weights < float("inf"):
        raise ErasureError(f"the weights of the LoRAs sum up to {weights:g}: they must sum up to more than 0.")
    return {name: part / weights for name, part in total.items()}
