"""Concept-focal importance sampling is Eq. 5, and draws follow their density exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realera_nodes.core.errors import ErasureError
from realera_nodes.core.timesteps import draw, focal_density, uniform_density


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_density_is_equation_5_and_sums_to_one() -> None:
    density = focal_density()
    assert (density.shape, density.dtype) == ((1000,), torch.float64)
    assert float(density.sum()) == pytest.approx(1, abs=1e-12)
    raw = [sigmoid(0.05 * (t - 200)) - sigmoid(0.05 * (t - 400)) for t in range(1000)]
    expected = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    torch.testing.assert_close(density, expected, rtol=1e-9, atol=1e-15)


def test_the_paper_s_values_hold_86_percent_between_200_and_400_around_300() -> None:
    density, t = focal_density(), torch.arange(1000)
    assert float((density * t).sum()) == pytest.approx(300, abs=0.1)
    assert float(density[200:401].sum()) == pytest.approx(0.86, abs=0.01)
    assert int(density.argmax()) == 300
    torch.testing.assert_close(density[:601], density[:601].flip(0), rtol=1e-7, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(t1=st.floats(0, 900), gap=st.floats(1, 100), gamma=st.floats(0.01, 1), steps=st.integers(1000, 1200))
def test_any_density_is_one(t1: float, gap: float, gamma: float, steps: int) -> None:
    density = focal_density(t1, t1 + gap, gamma, steps)
    assert len(density) == steps
    assert float(density.sum()) == pytest.approx(1, abs=1e-9)
    assert bool((density >= 0).all())


@pytest.mark.parametrize("density", [focal_density(), uniform_density(50), focal_density(3, 8, 0.9, 20)])
def test_draws_follow_their_density(density: torch.Tensor) -> None:
    """The largest distance of distribution functions stays under Kolmogorov's 0.1% bound."""
    count = 200_000
    drawn = draw(count, torch.Generator().manual_seed(4), density)
    assert (drawn.shape, drawn.dtype) == ((count,), torch.int64)
    found = torch.bincount(drawn, minlength=len(density)).double() / count
    assert float((found.cumsum(0) - density.cumsum(0)).abs().max()) < 1.95 / count**0.5


def test_each_timestep_owns_its_part_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    density = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: u)
    assert draw(6, torch.Generator(), density).tolist() == [1, 1, 3, 3, 4, 4]


def test_only_the_local_generator_is_used() -> None:
    state = torch.random.get_rng_state()
    a, b = (draw(9, torch.Generator().manual_seed(7), focal_density()) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(a, draw(9, torch.Generator().manual_seed(8), focal_density()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"t1": 400.0}, "t1 is 400 and t2 is 400"),
        ({"t1": -1.0}, "t1 is -1"),
        ({"t2": 1001.0}, "t2 is 1001"),
        ({"t1": float("nan")}, "t1 is nan"),
        ({"gamma": 0.0}, "gamma is 0"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"t1": 200.3, "t2": 200.6, "gamma": 1e4}, "no timestep lies between"),
    ],
)
def test_an_interval_without_timesteps_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        focal_density(**values)
