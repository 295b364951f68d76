"""RealEra's neighbor-concept mining and beyond-concept samples (Eq. 3-6, Algorithm 1 lines 2-23).

Distances are relative to the norm of each token's state, so that they mean the same for any encoder. The paper's
v ~ N(0, I) has that norm for CLIP-L (about sqrt(768)); other encoders get v scaled to it. Both bounds are one: with phi
the angle between e and the direction of v - e, a step of rho ||e|| turns e by an angle theta with
rho = sin(theta) / sin(phi - theta), so S2 <= cos <= S1 is a shell of radii. Uniform radii are drawn from the smallest
interval that holds every candidate's shell, then tested as the paper defines; the distribution is the same as that of plain
rejection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ErasureError
from .settings import check_settings, number, seed
from .spans import ErasurePair


@dataclass(frozen=True)
class NeighborConfig:
    """Settings of Eq. 3-6. The paper leaves D, S, M, N open: these defaults are ours (docs/method.md says how chosen).

    Attributes:
        d1: outer radius of neighbors, relative to ||e||
        d2: outer radius of beyond-concept samples
        inner: their inner radius; 0 is the paper's literal D1
        s1, s2: bounds of cos(e, e + eta) of neighbors; beyond-concept samples lie under s2
        d1_anchor: D1', tolerance around the anchor, relative to ||e*||
        m, n: neighbors and beyond-concept samples per prompt
        renormalize: scale samples back to the norm of e (they come out at about 0.7 of it)
        tries: draws per sample before giving up
        words: named neighbors that join the erased set, at most; 0 is the paper's method, random samples alone
        word_weight: weight of a named neighbor's rows in the closed form, beside the concept's 1
        words_beyond: words that draw something else, kept, at most
        vocabulary: how many of the tokenizer's commonest words are looked at, 1 or more
        candidates: how many of those the model is asked about
        nearest: share of the candidates that are the nearest ones in text space
        learnt: share of the candidates that a regression on the answers so far expects to answer like the concept; the
            rest are drawn at random from the whole vocabulary
        response: a candidate is a neighbor from this correlation of noise predictions upwards
        response_beyond: and is kept below this one
    """

    d1: float = number(0.6, 0.01, 10)
    d2: float = number(1.5, 0.01, 10)
    inner: float = number(0.75, 0, 10)
    s1: float = number(0.98, -1, 1)
    s2: float = number(0.8, -1, 1)
    d1_anchor: float = number(0.1, 0, 10)
    m: int = number(10, 0, 10_000)
    n: int = number(30, 0, 10_000)
    renormalize: bool = False
    tries: int = number(200, 1, 100_000)
    words: int = number(128, 0, 4096)
    word_weight: float = number(1.0, 0.01, 10)
    words_beyond: int = number(1024, 0, 49408)
    vocabulary: int = number(20000, 1, 49408, 1000)
    candidates: int = number(1300, 0, 49408)
    nearest: float = number(0.3, 0, 1)
    learnt: float = number(0.25, 0, 1)
    response: float = number(0.5, -1, 1)
    response_beyond: float = number(0.3, -1, 1)
    seed: int = seed(0)

    def __post_init__(self) -> None:
        check_settings(self)
        rules = [
            (max(self.d1, self.inner) < self.d2, f"d2 is {self.d2}: it must be above d1 ({self.d1}) and inner ({self.inner})"),
            (self.s2 < self.s1, f"s2 = {self.s2} and s1 = {self.s1}: they must satisfy -1 <= s2 < s1 <= 1"),
            (
                self.nearest + self.learnt <= 1,
                f"nearest = {self.nearest} and learnt = {self.learnt}: they are shares of the candidates, together at most 1",
            ),
            (
                self.response_beyond <= self.response,
                f"response_beyond = {self.response_beyond} and response = {self.response}: they must rise within -1 to 1",
            ),
        ]
        for holds, sentence in rules:
            if not holds:
                raise ErasureError(sentence + ".")


@dataclass(frozen=True)
class NeighborSamples:
    """Samples of one prompt; rows before the concept's first token are the prompt's own.

    Attributes:
        neighbors: (M, L, d) e + eta
        anchors: (M, L, d) targets e* + eta', aligned to the concept's positions
        beyond: (N, L, d) samples outside of the neighborhood, to be kept
        radius, cosine: (M,) of the neighbors; beyond_radius, beyond_cosine: (N,)
        accepted: share of draws that the paper's own uniform [0, D1] would have accepted
    """

    neighbors: Tensor
    anchors: Tensor
    beyond: Tensor
    radius: Tensor
    cosine: Tensor
    beyond_radius: Tensor
    beyond_cosine: Tensor
    accepted: float


def turned(rho: Tensor, c: Tensor) -> Tensor:
    """cos(e, e + rho ||e|| u) where u is a unit direction with cosine ``c`` to e."""
    return (1 + rho * c) / (1 + 2 * rho * c + rho.square()).sqrt()


def radius_at(cosine: float, c: Tensor) -> Tensor:
    """The radius at which a step along a direction with cosine ``c`` to e has turned e to ``cosine`` (inf: never)."""
    theta, phi = math.acos(max(-1.0, min(1.0, cosine))), torch.acos(c.clamp(-1, 1))
    gap = torch.sin(phi - theta)
    return torch.where(phi > theta, math.sin(theta) / gap.clamp(min=1e-12), torch.full_like(c, math.inf))


def directions(e: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit directions of v - e per token (count, n, d) and their joint cosine to e (count,), for e (n, d)."""
    norm = e.norm(dim=-1, keepdim=True)
    v = torch.randn(count, *e.shape, generator=generator, dtype=torch.float32).to(e.device) * (norm / e.shape[-1] ** 0.5)
    u = torch.nn.functional.normalize(v - e, dim=-1)
    c = (u * e * norm).sum((-2, -1)) / e.square().sum()
    return u, c


def sample_neighbors(pair: ErasurePair, config: NeighborConfig, generator: torch.Generator) -> NeighborSamples:
    """Neighbors, perturbed anchors and beyond-concept samples of one prompt (Algorithm 1 lines 2-23).

    Line 21's ``break`` would end the loop after one draw; it is read as a misprint and the loop goes on to N.

    Raises:
        ErasureError: the bounds admit nothing; the sentence names the bound that excludes.
    """
    e, target = pair.rows
    norm, target_norm = e.norm(dim=-1, keepdim=True), target.norm(dim=-1, keepdim=True)

    def draw(count: int, low: float, high: float, s_low: float, s_high: float, what: str) -> tuple[Tensor, Tensor, Tensor, float]:
        units, radii, cosines, got, drawn = [], [], [], 0, 0
        share = 1.0
        while got < count:
            if drawn >= config.tries * count:
                raise ErasureError(_why_empty(what, config))
            u, c = directions(e, max(count, 2), generator)
            bottom, top = max(low, float(radius_at(s_high, c).min())), min(high, float(radius_at(s_low, c).max()))
            if not bottom < top:
                raise ErasureError(_why_empty(what, config))
            share = (top - bottom) / (high - low)
            rho = bottom + (top - bottom) * torch.rand(len(c), generator=generator).to(e.device)
            cos = turned(rho, c)
            keep = (cos >= s_low) & (cos <= s_high)
            units.append(u[keep])
            radii.append(rho[keep])
            cosines.append(cos[keep])
            got, drawn = got + int(keep.sum()), drawn + len(c)
        return torch.cat(units)[:count], torch.cat(radii)[:count], torch.cat(cosines)[:count], share * got / max(drawn, 1)

    def placed(rows: Tensor) -> Tensor:
        head = pair.text.states[0, : pair.start].expand(len(rows), -1, -1)
        return torch.cat([head, rows], 1)

    def moved(u: Tensor, rho: Tensor, base: Tensor, base_norm: Tensor) -> Tensor:
        rows = base + rho[:, None, None] * base_norm * u
        return rows / rows.norm(dim=-1, keepdim=True) * base_norm if config.renormalize else rows

    empty = e.new_zeros(0)
    u, radius, cosine, accepted = e.new_zeros(0, *e.shape), empty, empty, 1.0
    if config.m:
        u, radius, cosine, accepted = draw(config.m, 0.0, config.d1, config.s2, config.s1, "neighbors")
    anchor_radius = config.d1_anchor * torch.rand(len(u), generator=generator).to(e.device)
    far, far_radius, far_cosine = e.new_zeros(0, *e.shape), empty, empty
    if config.n:
        below = math.nextafter(config.s2, -1)
        far, far_radius, far_cosine, _ = draw(
            config.n, config.inner or config.d1, config.d2, -1.0, below, "beyond-concept samples"
        )
    near = placed(moved(u, radius, e, norm))
    anchors = placed(moved(u, anchor_radius, target, target_norm))
    beyond = placed(moved(far, far_radius, e, norm))
    return NeighborSamples(near, anchors, beyond, radius, cosine, far_radius, far_cosine, accepted)


def _why_empty(what: str, config: NeighborConfig) -> str:
    c = torch.tensor(-(0.5**0.5))
    if what == "neighbors":
        least = float(radius_at(config.s1, c))
        if least >= config.d1:
            return f"no neighbor lies within d1 = {config.d1}: s1 = {config.s1} begins at radius {least:.2f}; raise d1 or s1."
        return f"hardly any neighbor has a cosine between s2 = {config.s2} and s1 = {config.s1}: widen the two bounds."
    least = float(radius_at(config.s2, c))
    return (
        f"no beyond-concept sample lies within d2 = {config.d2}: s2 = {config.s2} begins at radius {least:.2f}; raise d2 or s2."
    )
