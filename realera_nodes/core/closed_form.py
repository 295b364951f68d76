"""Closed-form edits of W_K and W_V: one transform for all layers of a context width (RealEra Eq. 7, UCE, MACE Eq. 1-2).

Every objective  min_W sum ||W e - W0 e*||^2 + lambda sum ||W p - W0 p||^2 + mu ||W - W0||^2  has targets W0 times
something, so its solution is W = W0 T for every layer, with one d x d matrix

    T = A C^-1,   A = sum e* e^T + lambda sum p p^T + mu I,   C = sum e e^T + lambda sum p p^T + mu I.

The sums are accumulated once in float64: memory does not grow with the number of concepts, and no layer is visited
before the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import ErasureError
from .settings import check_settings, number

#: rows of a product: few enough to stay in the processor's cache
CHUNK = 1024
#: a Gram is symmetric: of its blocks of so many rows and columns, only those on and below the diagonal are summed
BLOCK = 192


@dataclass(frozen=True)
class ClosedFormConfig:
    """Settings of Eq. 7.

    Attributes:
        lambda_1: weight of the preserve sum (paper: 0.1)
        prior: weight of the general prior, as the number of rows of mean strength it counts for per erased row
        beyond: weight of the words that were mined as different, likewise
        head: weight of the start token and the words before each erased phrase, which stay: 1 is that of an erased row
        ridge: mu ||W - W0||^2 with mu = ridge trace(C) / d; C is singular below d independent rows without it
        keys, values: which projections are edited
        strength: 0 is the base, 1 the edit
        max_condition: refuse to invert C beyond it
    """

    lambda_1: float = number(0.1, 0, 1000)
    prior: float = number(1.0, 0, 1000)
    beyond: float = number(16.0, 0, 1000)
    head: float = number(1.0, 0, 1000)
    ridge: float = number(1e-3, 0, 1, 0.0001)
    keys: bool = True
    values: bool = True
    strength: float = number(1.0, -10, 10, 0.05)
    max_condition: float = number(1e13, 1, 1e30)

    def __post_init__(self) -> None:
        check_settings(self)
        if not (self.keys or self.values):
            raise ErasureError("neither W_K nor W_V is selected: edit at least one of them.")

    def edits(self, name: str) -> bool:
        """Whether a projection of this name is edited."""
        return self.keys if name.endswith("to_k") else self.values


class Grams:
    """The sums of Eq. 7 without lambda_1 and mu, streamed: three (d, d) float64 matrices, whatever the number of rows.

    Rows wait in float64 until there are CHUNK of them, as products of few rows are slow; so a Gram is up to date when it is read.

    Attributes:
        rows, kept_rows: how many were added
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.width = width
        self._erased, self._moved, self._preserved = (
            torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3)
        )
        self._erasing, self._keeping = _Waiting(width, self._add_erased), _Waiting(width, self._add_preserved)
        self.rows = self.kept_rows = 0

    @property
    def erased(self) -> Tensor:
        """sum e e^T, (d, d)."""
        self._erasing.empty()
        return mirrored(self._erased)

    @property
    def moved(self) -> Tensor:
        """sum (e* - e) e^T, (d, d), which is A - C without cancellation."""
        self._erasing.empty()
        return self._moved

    @property
    def crossed(self) -> Tensor:
        """sum e* e^T, (d, d)."""
        return self.erased + self.moved

    @property
    def preserved(self) -> Tensor:
        """sum p p^T, (d, d)."""
        self._keeping.empty()
        return mirrored(self._preserved)

    def erase(self, e: Tensor, target: Tensor, weight: float = 1.0) -> None:
        """Adds rows e (n, d) that should become target (n, d)."""
        e, target = self._rows(e), self._rows(target)
        if e.shape != target.shape:
            raise ValueError(f"{tuple(e.shape)} rows to erase, {tuple(target.shape)} targets")
        self._erasing.add(weight, e, target)
        self.rows += len(e)

    def preserve(self, p: Tensor, weight: float = 1.0) -> None:
        """Adds rows p (n, d) that should stay."""
        p = self._rows(p)
        self._keeping.add(weight, p)
        self.kept_rows += len(p)

    def hold(self, p: Tensor, weight: float = 1.0) -> None:
        """Adds rows p (n, d) that should stay, beside those to erase: lambda_1 does not weigh them, and they are not counted."""
        p = self._rows(p)
        self._erasing.add(weight, p, p)

    def add_prior(self, gram: Tensor, rows: float) -> None:
        """Adds a ready sum p p^T (d, d) over prompts of the general prior, counting for ``rows`` rows."""
        self._preserved += self._rows(gram).to(self._preserved)
        self.kept_rows += round(rows)

    def _add_erased(self, weight: float, e: Tensor, target: Tensor) -> None:
        add_gram(self._erased, e, weight)
        self._moved.addmm_(target.sub_(e).T, e, alpha=weight)

    def _add_preserved(self, weight: float, p: Tensor) -> None:
        add_gram(self._preserved, p, weight)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1]).to(self._erased.device)
        if x.shape[1] != self.width:
            raise ErasureError(
                f"text states are {x.shape[1]} wide, the model's cross-attention {self.width}: use its own encoder."
            )
        if not all_finite(x):
            raise ErasureError("the text encoder returned NaN or infinite states: its weights are damaged; load another file.")
        return x


class _Waiting:
    """Rows of one weight on their way to float64 products, at most CHUNK of them; one to erase with what it should become."""

    def __init__(self, width: int, use: Callable[..., None]):
        self.width, self.use = width, use
        self.buffers: list[Tensor] = []
        self.filled, self.weight = 0, 1.0

    def add(self, weight: float, *rows: Tensor) -> None:
        if weight != self.weight:
            self.empty()
            self.weight = weight
        if not self.buffers:
            self.buffers = [torch.empty(CHUNK, self.width, dtype=torch.float64, device=rows[0].device) for _ in rows]
        start = 0
        while start < len(rows[0]):
            n = min(len(rows[0]) - start, len(self.buffers[0]) - self.filled)
            for buffer, x in zip(self.buffers, rows, strict=True):
                buffer[self.filled : self.filled + n] = x[start : start + n]
            start, self.filled = start + n, self.filled + n
            if self.filled == len(self.buffers[0]):
                self.empty()

    def empty(self) -> None:
        """Uses what waits."""
        if self.filled:
            self.use(self.weight, *(buffer[: self.filled] for buffer in self.buffers))
            self.filled = 0


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Their sum is if one is, at a tenth of the cost of looking at each."""
    return bool(torch.isfinite(x.sum()) or torch.isfinite(x).all())


def add_gram(total: Tensor, a: Tensor, weight: float = 1.0, more: Tensor | None = None) -> None:
    """Adds weight a^T a (d, d) for a (n, d) to the blocks on and below the diagonal of ``total``.

    That is 5/8 of the operations for d = 768. With ``more`` (m, d), a is (n, d + m), and ``more`` gets what its last m columns
    make with the first d, in one product with the last block: alone they would make a thin, slow one.
    """
    d = total.shape[0]
    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        if end < d or more is None:
            total[start:end, :end].addmm_(a[:, start:end].T, a[:, :end], alpha=weight)
        else:
            last, rest = (a[:, start:].T @ a[:, :d]).split([d - start, len(more)])
            total[start:].add_(last, alpha=weight)
            more.add_(rest, alpha=weight)


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle; what stands above the diagonal is not read."""
    return lower.tril() + lower.tril(-1).T


@dataclass(frozen=True)
class Transform:
    """W = W0 T, kept as T - I.

    Attributes:
        change: (d, d) float64, T - I
        condition: of C in the 2-norm
        mu: the ridge that was used
    """

    change: Tensor
    condition: float
    mu: float

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W - W0 for W0 (out, d), computed in the wider of float32 and the weight's type."""
        w = _checked(weight, torch.float64 if weight.dtype == torch.float64 else torch.float32)
        edit = w @ (self.change if w.dtype == torch.float64 else self._single).to(w.device)
        return edit if strength == 1 else edit.mul_(strength)

    @cached_property
    def _single(self) -> Tensor:
        # SDXL has 140 projections: converting for each would cost a fifth of the products
        return self.change.float()

    def rows(self, e: Tensor, strength: float = 1.0) -> Tensor:
        """T e for rows e (..., d): what an edited layer sees in place of e."""
        return e + e @ (strength * self.change.T).to(e)

    def low_rank(self, tolerance: float = 1e-7) -> LowRank:
        """T - I as a product of thin factors; singular values under ``tolerance`` of the largest are dropped."""
        u, s, v = torch.linalg.svd(self.change)
        rank = max(1, int((s > tolerance * s[0]).sum())) if s[0] > 0 else 0
        dropped = float(s[rank:].norm() / s.norm()) if s[0] > 0 else 0.0
        return LowRank(u[:, :rank] * s[:rank], v[:rank], dropped)


def _checked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    w = weight.detach().to(dtype)
    if not torch.isfinite(w).all():
        raise ErasureError("a projection to edit holds NaN or infinite values: the checkpoint is damaged; load another file.")
    return w


@dataclass(frozen=True)
class LowRank:
    """T - I = left @ right: (d, r), (r, d). ``dropped`` is the Frobenius share that the truncation lost."""

    left: Tensor
    right: Tensor
    dropped: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def factors(self, weight: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """The edit of W0 (out, d) as a LoRA: (down (r, d), up (out, r)), up @ down = W - W0."""
        w = _checked(weight, torch.float64)
        return self.right.float(), (strength * (w @ self.left.to(w))).float()


def solve(
    grams: Grams, lambda_1: float = 0.1, ridge: float = 1e-3, max_condition: float = 1e13, mu: float | None = None
) -> Transform:  # fmt: skip
    """The minimiser of Eq. 7 as a transform, by one float64 Cholesky factorisation.

    ``mu`` is the weight of ||W - W0||^2 itself, in place of ``ridge`` trace(C) / d.

    Raises:
        ErasureError: C cannot be inverted well; the sentence names the setting to raise.
    """
    c = grams.erased + lambda_1 * grams.preserved
    setting = f"raise ridge (now {ridge:g})" if mu is None else f"raise mu (now {mu:g})"
    mu = ridge * float(c.diagonal().mean()) if mu is None else mu
    c.diagonal().add_(mu)
    values = torch.linalg.eigvalsh(c)
    low, high = float(values[0]), float(values[-1])
    condition = high / low if low > 0 else float("inf")
    if not condition <= max_condition:
        raise ErasureError(
            f"the sum of text states has condition number {condition:.1e}, above {max_condition:.0e}: {setting} "
            f"or give more preserved concepts."
        )
    # T - I = (A - C) C^-1
    change = torch.cholesky_solve(grams.moved.T, torch.linalg.cholesky(c)).T
    return Transform(change.contiguous(), condition, mu)
