"""The closed form is the least-squares solution of Eq. 7, whatever way its sums were gathered."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realera_nodes.core import closed_form
from realera_nodes.core.closed_form import ClosedFormConfig, Grams, Transform, solve
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.prior import mean_gram


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gathered(width: int, groups: list[tuple[Tensor, Tensor, float]], kept: list[tuple[Tensor, float]]) -> Grams:
    grams = Grams(width)
    for e, target, weight in groups:
        grams.erase(e, target, weight)
    for p, weight in kept:
        grams.preserve(p, weight)
    return grams


def brute_force(w0: Tensor, groups, kept, lambda_1: float, mu: float) -> Tensor:
    """min_W of Eq. 7 with mu ||W - W0||^2, row by row: every term is a stacked, weighted equation x W^T = y."""
    x = [math.sqrt(w) * e for e, _, w in groups] + [math.sqrt(lambda_1 * w) * p for p, w in kept]
    y = [math.sqrt(w) * t @ w0.T for _, t, w in groups] + [math.sqrt(lambda_1 * w) * p @ w0.T for p, w in kept]
    x.append(math.sqrt(mu) * torch.eye(w0.shape[1], dtype=torch.float64))
    y.append(math.sqrt(mu) * w0.T)
    return torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution.T


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 12),
    erased=st.lists(st.tuples(st.integers(0, 9), st.floats(0.05, 20)), min_size=1, max_size=3),
    kept=st.lists(st.tuples(st.integers(0, 30), st.floats(0.05, 20)), max_size=3),
    lambda_1=st.floats(0, 10),
    ridge=st.floats(1e-4, 10),
    seed=st.integers(0, 2**32),
)
def test_the_solution_is_that_of_brute_force_in_every_layer(width, erased, kept, lambda_1, ridge, seed) -> None:
    groups = [(normal(n, width, seed=seed + i), normal(n, width, seed=seed + 10 + i), w) for i, (n, w) in enumerate(erased)]
    keep = [(normal(n, width, seed=seed + 20 + i), w) for i, (n, w) in enumerate(kept)]
    grams = gathered(width, groups, keep)
    if float(grams.erased.trace() + lambda_1 * grams.preserved.trace()) == 0:
        with pytest.raises(ErasureError, match="ridge"):
            solve(grams, lambda_1, ridge)
        return
    transform = solve(grams, lambda_1, ridge)
    c = grams.erased + lambda_1 * grams.preserved
    assert transform.mu == pytest.approx(ridge * float(c.trace()) / width, rel=1e-12)
    for layer, n_out in enumerate((1, 5)):
        w0 = normal(n_out, width, seed=seed + 30 + layer)
        expected = brute_force(w0, groups, keep, lambda_1, transform.mu)
        error = (w0 + transform.delta(w0) - expected).norm() / expected.norm()
        assert float(error) < 1e-9


def test_without_ridge_enough_rows_give_plain_least_squares() -> None:
    groups, keep = [(normal(9, 6, seed=0), normal(9, 6, seed=1), 1.0)], [(normal(20, 6, seed=2), 1.0)]
    transform, w0 = solve(gathered(6, groups, keep), 0.1, 0.0), normal(4, 6, seed=3)
    assert transform.mu == 0
    torch.testing.assert_close(w0 + transform.delta(w0), brute_force(w0, groups, keep, 0.1, 0.0), rtol=1e-9, atol=1e-12)


def test_one_row_by_hand() -> None:
    """e = (2, 0) -> (0, 2), kept (0, 1) with lambda 0.5, no ridge: C = diag(4, .5), A - C = ((-4, 0), (4, 0))."""
    grams = gathered(2, [(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 1.0)], [(torch.tensor([[0.0, 1.0]]), 1.0)])
    transform = solve(grams, 0.5, 0.0)
    assert transform.change.tolist() == [[-1, 0], [1, 0]]
    assert transform.condition == 8
    assert transform.rows(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist() == [[0, 2], [0, 3]]
    assert transform.delta(torch.tensor([[1.0, 10.0]])).tolist() == [[9, 0]]


def test_the_condition_number_is_that_of_c() -> None:
    groups, keep = [(normal(9, 6, seed=0), normal(9, 6, seed=1), 1.0)], [(normal(20, 6, seed=2), 1.0)]
    grams = gathered(6, groups, keep)
    transform = solve(grams, 0.1, 1e-2)
    c = grams.erased + 0.1 * grams.preserved + transform.mu * torch.eye(6, dtype=torch.float64)
    assert transform.condition == pytest.approx(float(torch.linalg.cond(c)), rel=1e-9)


def some_transform(rows: int = 3, width: int = 8) -> Transform:
    groups, keep = [(normal(rows, width, seed=4), normal(rows, width, seed=5), 1.0)], [(normal(30, width, seed=6), 1.0)]
    return solve(gathered(width, groups, keep))


def test_what_is_erased_arrives_and_what_is_kept_stays() -> None:
    e, target = normal(2, 16, seed=0), normal(2, 16, seed=1)
    p = normal(6, 16, seed=2)
    transform = solve(gathered(16, [(e, target, 1.0)], [(p, 1.0)]), 1.0, 1e-10)
    torch.testing.assert_close(transform.rows(e), target, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(transform.rows(p), p, rtol=1e-6, atol=1e-6)


def test_strength_is_linear_from_nothing_to_the_edit() -> None:
    transform, w = some_transform(), normal(5, 8, seed=7)
    edit = transform.delta(w)
    assert torch.equal(transform.delta(w, 0.0), torch.zeros(5, 8, dtype=torch.float64))
    assert torch.equal(transform.delta(w, 1.0), edit)
    for strength in (-1.0, 0.25, 0.5, 2.0):
        torch.testing.assert_close(transform.delta(w, strength), strength * edit, rtol=1e-12, atol=1e-14)
    e = normal(4, 8, seed=8)
    assert torch.equal(transform.rows(e, 0.0), e)
    torch.testing.assert_close(transform.rows(e, 0.5) @ w.T, e @ (w + 0.5 * edit).T, rtol=1e-12, atol=1e-12)


def test_erasing_a_concept_into_itself_changes_nothing() -> None:
    e = normal(3, 8, seed=0)
    transform = solve(gathered(8, [(e, e.clone(), 1.0)], []))
    assert torch.equal(transform.change, torch.zeros(8, 8, dtype=torch.float64))
    low = transform.low_rank()
    down, up = low.factors(normal(5, 8, seed=1))
    assert (low.rank, low.dropped, down.shape, up.shape) == (0, 0.0, (0, 8), (5, 0))


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_deltas_are_computed_in_float32_at_least(dtype: torch.dtype, result: torch.dtype) -> None:
    transform, w = some_transform(), normal(5, 8, seed=7).to(dtype)
    delta = transform.delta(w)
    assert delta.dtype == result
    torch.testing.assert_close(delta.double(), w.double() @ transform.change, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8),
    width=st.integers(4, 24),
    kept=st.integers(0, 40),
    ridge=st.floats(1e-3, 1),
    seed=st.integers(0, 2**32),
)
def test_low_rank_factors_are_the_edit(rows: int, width: int, kept: int, ridge: float, seed: int) -> None:
    groups = [(normal(rows, width, seed=seed), normal(rows, width, seed=seed + 1), 1.0)]
    transform = solve(gathered(width, groups, [(normal(kept, width, seed=seed + 2), 1.0)]), 0.1, ridge)
    low = transform.low_rank()
    assert low.rank <= min(rows, width)
    assert low.dropped < 1e-6
    torch.testing.assert_close(low.left @ low.right, transform.change, rtol=0, atol=1e-6 * float(transform.change.norm()))
    w = normal(6, width, seed=seed + 3)
    for strength in (1.0, 0.5):
        down, up = low.factors(w, strength)
        assert (down.dtype, up.dtype, down.shape, up.shape) == (torch.float32, torch.float32, (low.rank, width), (6, low.rank))
        delta = transform.delta(w, strength)
        scale = float(up.norm() * down.norm())
        torch.testing.assert_close((up.double() @ down.double()), delta, rtol=0, atol=4 * torch.finfo(torch.float32).eps * scale)


def test_a_rough_tolerance_says_what_it_dropped() -> None:
    change = torch.diag(torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64))
    low = Transform(change, 1.0, 0.0).low_rank(tolerance=0.8)
    assert low.rank == 1
    assert low.dropped == pytest.approx(3 / 5, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(10)), cuts=st.lists(st.integers(1, 9), max_size=4), chunk=st.integers(1, 12))
def test_sums_do_not_depend_on_order_or_chunks(order: list[int], cuts: list[int], chunk: int) -> None:
    e, target, p = (normal(10, 5, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    whole = gathered(5, [(e, target, 1.0)], [(p, 1.0)])
    grams = Grams(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_form, "CHUNK", chunk)
        bounds = [0, *sorted(set(cuts)), 10]
        for a, b in itertools.pairwise(bounds):
            part = order[a:b]
            grams.preserve(p[part])
            grams.erase(e[part], target[part])
            assert grams.moved.isfinite().all()  # read in between: what waits is counted once
            assert grams.preserved.isfinite().all()
    assert (grams.rows, grams.kept_rows) == (10, 10)
    for name in ("erased", "crossed", "preserved"):
        torch.testing.assert_close(getattr(grams, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solve(grams).change, solve(whole).change, rtol=1e-9, atol=1e-9)


def test_a_weight_is_that_many_copies() -> None:
    e, target, p = normal(2, 4, seed=0), normal(2, 4, seed=1), normal(5, 4, seed=2)
    weighted = gathered(4, [(e, target, 3.0)], [(p, 2.0)])
    copied = gathered(4, [(e, target, 1.0)] * 3, [(p, 1.0)] * 2)
    torch.testing.assert_close(solve(weighted).change, solve(copied).change, rtol=1e-11, atol=1e-12)


def test_samples_come_as_batches_of_rows_and_none_is_nothing() -> None:
    e, target = normal(2, 3, 4, seed=0), normal(2, 3, 4, seed=1)
    batched = gathered(4, [(e, target, 1.0)], [(e[:0], 1.0)])
    flat = gathered(4, [(e.reshape(6, 4), target.reshape(6, 4), 1.0), (e[:0], target[:0], 1.0)], [])
    assert batched.rows == flat.rows == 6
    assert batched.kept_rows == 0
    torch.testing.assert_close(batched.crossed, flat.crossed, rtol=1e-14, atol=1e-14)


def test_a_prior_is_its_rows() -> None:
    e, target, p = normal(2, 4, seed=0), normal(2, 4, seed=1), normal(6, 4, seed=2)
    grams = gathered(4, [(e, target, 1.0)], [])
    rows = [(p[:4], torch.ones(4)), (p[4:], torch.tensor([1.0, 3.0]))]  # the last row stands for three
    grams.add_prior(mean_gram(lambda prompts: rows, ["x"], 4) * 8, 8)
    direct = gathered(4, [(e, target, 1.0)], [(p[:5], 1.0), (p[5:], 3.0)])
    assert grams.kept_rows == 8
    torch.testing.assert_close(solve(grams).change, solve(direct).change, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5])
def test_too_few_rows_without_ridge_are_refused_by_the_name_of_ridge(rows: int) -> None:
    grams = gathered(8, [(normal(rows, 8, seed=0), normal(rows, 8, seed=1), 1.0)], [(normal(2, 8, seed=2), 1.0)])
    with pytest.raises(ErasureError, match=r"condition number .* raise ridge \(now 0\) or give more preserved concepts"):
        solve(grams, 0.1, 0.0)


def test_a_condition_number_beyond_the_limit_is_refused() -> None:
    grams = gathered(8, [(normal(1, 8, seed=0), normal(1, 8, seed=1), 1.0)], [])
    reached = solve(grams, 0.1, 1e-3).condition
    assert solve(grams, 0.1, 1e-3, max_condition=reached).condition == reached
    with pytest.raises(ErasureError, match=r"raise ridge \(now 0.001\)"):
        solve(grams, 0.1, 1e-3, max_condition=reached * 0.999)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_states_are_refused(bad: float) -> None:
    grams, good, damaged = Grams(4), normal(2, 4, seed=0), normal(2, 4, seed=1)
    damaged[1, 2] = bad
    for call in (
        lambda: grams.erase(damaged, good),
        lambda: grams.erase(good, damaged),
        lambda: grams.preserve(damaged),
        lambda: grams.add_prior(damaged.T @ damaged, 2),
    ):
        with pytest.raises(ErasureError, match="NaN or infinite"):
            call()
    assert float(grams.erased.abs().sum() + grams.crossed.abs().sum() + grams.preserved.abs().sum()) == 0
    assert (grams.rows, grams.kept_rows) == (0, 0)


def test_states_of_another_width_are_refused() -> None:
    grams = Grams(4)
    for call in (
        lambda: grams.erase(normal(2, 5, seed=0), normal(2, 5, seed=1)),
        lambda: grams.erase(normal(2, 4, seed=0), normal(2, 5, seed=1)),
        lambda: grams.preserve(normal(1, 5, seed=0)),
        lambda: grams.add_prior(torch.ones(5, 5), 1),
        lambda: grams.add_prior(torch.ones(1, 1), 1),
    ):
        with pytest.raises(ErasureError, match=r"are [15] wide, the model's cross-attention 4: use its own encoder\."):
            call()


def test_rows_and_targets_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\) rows to erase, \(3, 4\) targets"):
        Grams(4).erase(normal(2, 4, seed=0), normal(3, 4, seed=1))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_damaged_weights_are_refused(bad: float) -> None:
    w = normal(5, 8, seed=0, dtype=torch.float32).half()
    w[3, 3] = bad
    transform = some_transform()
    for call in (transform.delta, transform.low_rank().factors):
        with pytest.raises(ErasureError, match="a projection to edit holds NaN or infinite values"):
            call(w)


def test_weights_and_rows_are_left_as_they_are() -> None:
    transform, w, e = some_transform(), normal(5, 8, seed=7), normal(2, 8, seed=8)
    kept_w, kept_e = w.clone(), e.clone()
    transform.delta(w)
    transform.low_rank().factors(w)
    transform.rows(e)
    Grams(8).erase(e, e)
    assert torch.equal(w, kept_w)
    assert torch.equal(e, kept_e)


def test_keys_and_values_choose_the_projections() -> None:
    assert [ClosedFormConfig(values=False).edits(n) for n in ("a.attn2.to_k", "a.attn2.to_v")] == [True, False]
    assert [ClosedFormConfig(keys=False).edits(n) for n in ("a.attn2.to_k", "a.attn2.to_v")] == [False, True]
