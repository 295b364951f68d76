"""Neighbors satisfy Eq. 3-6 when recomputed from the vectors, and are distributed as Algorithm 1 has them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realera_nodes.core.errors import ErasureError
from realera_nodes.core.neighbors import NeighborConfig, directions, radius_at, sample_neighbors, turned
from realera_nodes.core.spans import ErasurePair, TextStates

START = 2


def make(width: int, rows: int = 3, seed: int = 0, scale: float = 1.0) -> ErasurePair:
    g = torch.Generator().manual_seed(seed)
    length = START + rows
    text, anchor = (TextStates(scale * torch.randn(1, length, width, generator=g), [[0] * length]) for _ in range(2))
    return ErasurePair("p", "p*", text, anchor, START, START + 1, anchor.states[0].flip(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine(e: Tensor, x: Tensor) -> Tensor:
    """cos(e, x) over flattened slices in float64: e (n, d), x (N, n, d) -> (N,)."""
    return torch.nn.functional.cosine_similarity(x.double().flatten(1), e.double().flatten()[None], dim=1)


def distance(e: Tensor, x: Tensor) -> Tensor:
    """Of every token, relative to its own norm: (N, n)."""
    return (x.double() - e.double()).norm(dim=-1) / e.double().norm(dim=-1)


@given(width=st.integers(2, 20), rho=st.floats(0.01, 6), seed=st.integers(0, 2**32))
def test_turned_is_the_cosine_of_the_vectors(width: int, rho: float, seed: int) -> None:
    g = seeded(seed)
    e = torch.randn(width, generator=g, dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(width, generator=g, dtype=torch.float64), dim=0)
    x = e + rho * e.norm() * u
    found = turned(torch.tensor(rho, dtype=torch.float64), u @ e / e.norm())
    assert float(found) == pytest.approx(float(x @ e / (x.norm() * e.norm())), abs=1e-9)


@given(phi=st.floats(0.2, math.pi - 0.05), share=st.floats(0.02, 0.95))
def test_radius_and_cosine_are_inverse(phi: float, share: float) -> None:
    c = torch.tensor(math.cos(phi), dtype=torch.float64)
    wanted = math.cos(share * phi)  # a step turns e by less than phi
    rho = radius_at(wanted, c)
    assert float(turned(rho, c)) == pytest.approx(wanted, abs=1e-9)
    assert float(radius_at(float(turned(rho, c)), c)) == pytest.approx(float(rho), rel=1e-5)


def test_a_step_never_turns_beyond_its_own_direction() -> None:
    c = torch.tensor([0.5, -0.5])
    assert radius_at(0.0, c).tolist() == pytest.approx([math.inf, 2.0], rel=1e-6)
    assert radius_at(-0.6, c).tolist() == [math.inf, math.inf]
    assert radius_at(1.0, c).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("rho", "cos", "norm"),
    [
        (0.1, 0.997, 0.93), (0.25, 0.978, 0.84), (0.4, 0.93, 0.77), (0.5, 0.88, 0.73), (0.6, 0.81, 0.71), (0.75, 0.66, 0.71),
        (0.9, 0.50, 0.73),
        (1, 0.38, 0.76), (1.1, 0.27, 0.80), (1.25, 0.13, 0.89), (1.41, 0, 0.99), (2, -0.29, 1.47), (5, -0.59, 4.4),
    ],
)  # fmt: skip
def test_how_far_a_radius_turns_a_clip_state(rho: float, cos: float, norm: float) -> None:
    """At ||e|| = sqrt(768) a direction v - e has cosine -1/sqrt(2) to e, and everything follows from rho."""
    e = torch.nn.functional.normalize(torch.randn(4, 768, generator=seeded()), dim=-1) * 768**0.5
    u, c = directions(e, 50, seeded(1))
    assert float(c.mean()) == pytest.approx(-(0.5**0.5), abs=0.01)
    x = e + rho * e.norm(dim=-1, keepdim=True) * u
    torch.testing.assert_close(cosine(e, x), turned(torch.tensor(float(rho)), c).double(), rtol=0, atol=1e-5)
    exact = float(turned(torch.tensor(float(rho)), torch.tensor(-(0.5**0.5))))
    assert exact == pytest.approx(cos, abs=0.01)
    assert float(cosine(e, x).mean()) == pytest.approx(exact, abs=0.01)
    assert float((x.norm(dim=-1) / e.norm(dim=-1)).mean()) == pytest.approx(norm, rel=0.015)


def test_directions_point_from_e_to_a_gaussian() -> None:
    e = make(32).rows[0] * torch.tensor([[1.0], [3.0], [0.2]])
    u, c = directions(e, 6, seeded(4))
    v = torch.randn(6, 3, 32, generator=seeded(4)) * e.norm(dim=-1, keepdim=True) / 32**0.5
    torch.testing.assert_close(u, (v - e) / (v - e).norm(dim=-1, keepdim=True))
    step = e.norm(dim=-1, keepdim=True) * u
    joint = (step * e).flatten(1).sum(1) / (step.flatten(1).norm(dim=1) * e.norm())
    torch.testing.assert_close(c, joint, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    width=st.sampled_from([4, 24, 96]),
    d1=st.floats(0.4, 1.2),
    s2=st.floats(0.3, 0.85),
    gap=st.floats(0.05, 0.14),
    inner=st.sampled_from([0.0, 0.75]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_samples_satisfy_equations_3_and_4(width, d1, s2, gap, inner, seed, scale) -> None:
    """Recomputed in float64 from the float32 vectors; 1e-4 is their rounding."""
    s1 = min(s2 + gap, 0.99)
    config = NeighborConfig(d1=d1, d2=max(d1, inner) + 1.5, s1=s1, s2=s2, inner=inner, m=7, n=9)
    pair = make(width, seed=seed, scale=scale)
    e, target = pair.rows
    try:
        found = sample_neighbors(pair, config, seeded(seed))
    except ErasureError as error:
        assert "no neighbor lies within d1" in str(error) or "hardly any neighbor" in str(error)  # noqa: PT017
        return
    near, far, anchors = found.neighbors[:, START:], found.beyond[:, START:], found.anchors[:, START:]
    assert (len(near), len(anchors), len(far)) == (7, 7, 9)
    assert float(distance(e, near).max()) <= d1 + 1e-4
    assert s2 - 1e-4 <= float(cosine(e, near).min())
    assert float(cosine(e, near).max()) <= s1 + 1e-4
    assert float(distance(e, far).min()) >= (inner or d1) - 1e-4
    assert float(distance(e, far).max()) <= config.d2 + 1e-4
    assert float(cosine(e, far).max()) < s2 + 1e-4
    assert float(distance(target, anchors).max()) <= config.d1_anchor + 1e-4
    # one radius a sample, and the reported numbers are those of the vectors
    torch.testing.assert_close(distance(e, near), found.radius.double()[:, None].expand(7, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(distance(e, far), found.beyond_radius.double()[:, None].expand(9, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(cosine(e, near), found.cosine.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(cosine(e, far), found.beyond_cosine.double(), rtol=0, atol=1e-4)


def literal(e: Tensor, low: float, high: float, s_low: float, s_high: float, count: int, generator: torch.Generator):
    """Algorithm 1 as printed, lines 4-12 and 13-22 (no ``break``): radii and cosines of what is accepted, its share."""
    radii, cosines, got, drawn = [], [], 0, 0
    norm = e.norm(dim=-1, keepdim=True)
    while got < count:
        v = torch.randn(4000, *e.shape, generator=generator) * norm / e.shape[-1] ** 0.5
        r = low + (high - low) * torch.rand(4000, generator=generator)
        eta = r[:, None, None] * norm * (v - e) / (v - e).norm(dim=-1, keepdim=True)
        cos = torch.nn.functional.cosine_similarity((e + eta).flatten(1), e.flatten()[None], dim=1)
        keep = (s_low <= cos) & (cos <= s_high)
        radii.append(r[keep])
        cosines.append(cos[keep])
        got, drawn = got + int(keep.sum()), drawn + len(v)
    return torch.cat(radii)[:count], torch.cat(cosines)[:count], got / drawn


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest distance of two empirical distribution functions."""
    a, b = a.sort().values, b.sort().values
    at = torch.cat([a, b])
    share = [torch.searchsorted(x, at, right=True).double() / len(x) for x in (a, b)]
    return float((share[0] - share[1]).abs().max())


COUNT = 4000
#: 0.1% critical value of two samples of COUNT: sqrt(-ln(.001 / 2) / 2) sqrt(2 / COUNT)
CRITICAL = math.sqrt(-math.log(0.0005) / 2) * math.sqrt(2 / COUNT)

BOUNDS = [
    NeighborConfig(),
    NeighborConfig(d1=3.0, d2=4.0, s2=0.8, s1=0.98),  # the shell ends well inside d1
    NeighborConfig(d1=1.5, d2=3.0, s2=0.7, s1=0.9, inner=0.0),
    NeighborConfig(d1=0.5, d2=1.0, s2=0.0, s1=1.0, inner=0.2),  # d1 cuts the shell
]


@pytest.mark.parametrize("width", [6, 48])
@pytest.mark.parametrize("config", BOUNDS)
def test_neighbors_are_distributed_as_by_plain_rejection(config: NeighborConfig, width: int) -> None:
    pair = make(width, rows=2)
    radius, cos, share = literal(pair.rows[0], 0, config.d1, config.s2, config.s1, COUNT, seeded(1))
    found = sample_neighbors(pair, replace(config, m=COUNT, n=0), seeded(2))
    assert kolmogorov_smirnov(found.radius, radius) < CRITICAL
    assert kolmogorov_smirnov(found.cosine, cos) < CRITICAL
    assert found.accepted == pytest.approx(share, abs=0.03)


def test_neighbors_drawn_one_at_a_time_are_distributed_the_same() -> None:
    pair, config, count = make(24, rows=1), NeighborConfig(d1=3.0, d2=4.0, m=1, n=0), 1000
    radius, *_ = literal(pair.rows[0], 0, config.d1, config.s2, config.s1, count, seeded(1))
    g = seeded(2)
    found = torch.cat([sample_neighbors(pair, config, g).radius for _ in range(count)])
    assert kolmogorov_smirnov(found, radius) < CRITICAL * (COUNT / count) ** 0.5


@pytest.mark.parametrize("config", BOUNDS[:3])
def test_beyond_samples_are_distributed_as_by_plain_rejection(config: NeighborConfig) -> None:
    """[D1, D2) of line 14; ``inner`` replaces D1 where it is set."""
    pair = make(12, rows=2)
    radius, cos, _ = literal(pair.rows[0], config.inner or config.d1, config.d2, -1, config.s2, COUNT, seeded(1))
    found = sample_neighbors(pair, replace(config, m=0, n=COUNT), seeded(2))
    assert kolmogorov_smirnov(found.beyond_radius, radius) < CRITICAL
    assert kolmogorov_smirnov(found.beyond_cosine, cos) < CRITICAL


def test_a_difference_would_be_seen() -> None:
    pair, config = make(48, rows=2), NeighborConfig()
    radius, *_ = literal(pair.rows[0], 0, config.d1, config.s2, config.s1, COUNT, seeded(1))
    found = sample_neighbors(pair, replace(config, s1=0.97, m=COUNT, n=0), seeded(2))
    assert kolmogorov_smirnov(found.radius, radius) > CRITICAL


def test_the_same_seed_gives_the_same_samples() -> None:
    pair, config = make(16), NeighborConfig()
    first, again, other = (sample_neighbors(pair, config, seeded(s)) for s in (3, 3, 4))
    for name in ("neighbors", "anchors", "beyond", "radius", "cosine", "beyond_radius", "beyond_cosine"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 3), (3, 0), (1, 1), (100, 2)])
def test_any_number_of_samples(m: int, n: int) -> None:
    found = sample_neighbors(make(16), NeighborConfig(m=m, n=n), seeded())
    assert found.neighbors.shape == found.anchors.shape == (m, START + 3, 16)
    assert found.beyond.shape == (n, START + 3, 16)
    assert found.radius.shape == found.cosine.shape == (m,)
    assert found.beyond_radius.shape == found.beyond_cosine.shape == (n,)


@pytest.mark.parametrize("renormalize", [False, True])
def test_rows_before_the_concept_are_the_prompts_own(renormalize: bool) -> None:
    pair = make(16)
    before = pair.text.states.clone(), pair.targets.clone()
    found = sample_neighbors(pair, NeighborConfig(m=4, n=5, renormalize=renormalize), seeded())
    head = pair.text.states[0, :START]
    for samples in (found.neighbors, found.anchors, found.beyond):
        assert all(torch.equal(x[:START], head) for x in samples)
        assert not any(torch.equal(x[START:], pair.text.states[0, START:]) for x in samples)
    assert torch.equal(pair.text.states, before[0])
    assert torch.equal(pair.targets, before[1])


def test_anchors_move_in_the_direction_of_their_neighbor() -> None:
    pair = make(16)
    e, target = pair.rows
    found = sample_neighbors(pair, NeighborConfig(m=200, n=0, d1_anchor=0.3), seeded())
    step, anchor_step = found.neighbors[:, START:] - e, found.anchors[:, START:] - target
    assert float(torch.nn.functional.cosine_similarity(step, anchor_step, dim=-1).min()) > 0.999
    radius = distance(target, found.anchors[:, START:])
    torch.testing.assert_close(radius, radius[:, :1].expand_as(radius), rtol=0, atol=1e-5)
    assert 0.28 < float(radius.max()) <= 0.3 + 1e-5
    assert float(radius.mean()) == pytest.approx(0.15, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([radius[:, 0], found.radius.double()]))[0, 1])) < 0.2  # their own radius


def test_without_tolerance_every_anchor_is_the_anchor() -> None:
    pair = make(16)
    found = sample_neighbors(pair, NeighborConfig(m=3, n=0, d1_anchor=0), seeded())
    assert torch.equal(found.anchors[:, START:], pair.targets[START:].expand(3, -1, -1))


def test_renormalized_samples_have_the_norm_of_their_token_and_the_same_direction() -> None:
    pair = make(16)
    e, target = pair.rows
    plain, scaled = (sample_neighbors(pair, NeighborConfig(renormalize=r), seeded()) for r in (False, True))
    for name, base in (("neighbors", e), ("anchors", target), ("beyond", e)):
        x, y = getattr(plain, name)[:, START:], getattr(scaled, name)[:, START:]
        torch.testing.assert_close(y.norm(dim=-1), base.norm(dim=-1).expand(len(y), -1))
        torch.testing.assert_close(torch.nn.functional.cosine_similarity(x, y, dim=-1), torch.ones(x.shape[:2]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            NeighborConfig(d1=0.1, s1=0.9),
            r"no neighbor lies within d1 = 0\.1: s1 = 0\.9 begins at radius 0\.4\d; raise d1 or s1\.",
        ),
        (NeighborConfig(s1=-0.9, s2=-0.95), r"no neighbor lies within d1 = 0\.6: s1 = -0\.9 .* raise d1 or s1\."),
        (NeighborConfig(s2=0.9, s1=0.9 + 1e-7), r"hardly any neighbor has a cosine between s2 = 0\.9 and s1 = 0\.9\d*: widen"),
        (
            NeighborConfig(s2=0.0, d2=0.9),
            r"no beyond-concept sample lies within d2 = 0\.9: s2 = 0\.0 begins at .*raise d2 or s2\.",
        ),
        (NeighborConfig(s2=-1), r"no beyond-concept sample lies within d2 = 1\.5: s2 = -1.0 .*raise d2 or s2\."),
    ],
)
def test_bounds_that_admit_nothing_are_named(config: NeighborConfig, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        sample_neighbors(make(768, rows=2), config, seeded())
