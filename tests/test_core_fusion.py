"""Fusion is the least-squares solution of Eq. 7 in every layer, and keeps nothing that grows with the number of LoRAs."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realera_nodes.core.adapters import Factors
from realera_nodes.core.closed_form import Transform
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.fusion import Fusion, naive_sum
from realera_nodes.core.refinement import RefinementConfig

K, V = "a.attn2.to_k", "b.attn2.to_v"
CONFIG = RefinementConfig(lambda_2=1.0, prior_rows=1.0, lambda_3=1.0)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lora(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Factors:
    return {
        n: (normal(rank, d, seed=seed + i), normal(out, rank, seed=seed + 50 + i))
        for i, (n, (out, d)) in enumerate(shapes.items())
    }


def change(width: int, seed: int) -> Transform:
    return Transform(0.3 * normal(width, width, seed=seed), 1.0, 0.0)


def brute_force(
    w: Tensor, refined: Tensor, parts: list[tuple[Tensor, Tensor]], kept: list[tuple[Tensor, float]], mu: float, ridge: float
) -> Tensor:
    """min of Eq. 7 for one layer, every term a stacked and weighted equation x W*^T = y. ``parts``: (states, B D).

    ||W* - W'||^2 has the weight mu: the public code solves from the refined weights on. What is kept has the original's values.
    """
    x, y = [e for e, _ in parts], [e @ (refined + bd).T for e, bd in parts]
    x += [math.sqrt(a) * p for p, a in kept]
    y += [math.sqrt(a) * p @ w.T for p, a in kept]
    for weight, start in ((mu, refined), (ridge, refined)):
        x.append(math.sqrt(weight) * torch.eye(w.shape[1], dtype=torch.float64))
        y.append(math.sqrt(weight) * start.T)
    return torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution.T


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 10),
    outs=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    ranks=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12), st.sampled_from(["both", "k", "v"])), min_size=1, max_size=5),
    general=st.tuples(st.integers(0, 20), st.floats(0.01, 10)),
    domain=st.tuples(st.integers(0, 20), st.floats(0.01, 10)),
    mu=st.sampled_from([0.0, 0.1, 5.0]),
    ridge=st.floats(1e-4, 1),
    refined=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_the_solution_is_that_of_brute_force_in_every_layer(
    width, outs, ranks, general, domain, mu, ridge, refined, seed
) -> None:
    """LoRAs of different ranks, some without one of the layers, with and without refinement and each of the priors."""
    shapes = {K: (outs[0], width), V: (outs[1], width)}
    fusion, states, loras = Fusion(shapes), [], []
    for i, (rank, rows, where) in enumerate(ranks):
        chosen = {n: s for n, s in shapes.items() if where == "both" or n.endswith(where)}
        loras.append(lora(chosen, rank, seed + 100 * i))
        states.append(normal(rows, width, seed=seed + 100 * i + 99))
        fusion.add(loras[i], [states[i]])
    p, q = normal(general[0], width, seed=seed + 1), normal(domain[0], width, seed=seed + 2)
    config = RefinementConfig(lambda_2=general[1], prior_rows=1.0, lambda_3=domain[1], mu=mu, ridge=ridge)
    start = change(width, seed + 3) if refined else None
    fused = fusion.solve(config, p.T @ p, q.T @ q, start, torch.float64)
    total = sum(e.square().sum() for e in states) + general[1] * p.square().sum() + domain[1] * q.square().sum() + mu * width
    rho = ridge * float(total) / width
    for i, (name, (out, _)) in enumerate(shapes.items()):
        w = normal(out, width, seed=seed + 10 + i)
        w1 = w if start is None else w + w @ start.change
        parts = [(e, f[name][1] @ f[name][0] if name in f else torch.zeros_like(w)) for e, f in zip(states, loras, strict=True)]
        expected = brute_force(w, w1, parts, [(p, general[1]), (q, domain[1])], mu, rho)
        scale = max(float(expected.norm()), float(w.norm()))
        assert float((w + fused.delta(name, w) - expected).norm()) < 1e-9 * scale


def test_one_lora_by_hand() -> None:
    """e = (2, 0), B = (1), D = (3, 1), kept (0, 1): C = diag(4, 1), S = B D G = (12, 0), so W* - W = (3, 0)."""
    fusion = Fusion({K: (1, 2)})
    fusion.add({K: (torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0]]))}, [torch.tensor([[2.0, 0.0]])])
    fused = fusion.solve(RefinementConfig(lambda_2=1.0, prior_rows=1.0, ridge=0.0), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert fused.delta(K, torch.tensor([[5.0, 7.0]])).tolist() == [[3, 0]]
    assert fused.condition == 4
    assert fused.transform is None


def test_what_no_prompt_of_the_loras_reaches_stays_refined_under_mu() -> None:
    """mu pulls to W', so that beside the LoRAs' own states the refinement is what it was before the fusion."""
    shapes, e = {K: (6, 12)}, torch.linalg.qr(normal(12, 12, seed=0)).Q
    fusion, start, w = Fusion(shapes), change(12, 3), normal(6, 12, seed=2)
    fusion.add(lora(shapes, 1, 10), [e[:4]])
    fused = fusion.solve(RefinementConfig(lambda_2=0.0, mu=1e6, ridge=0.0), refinement=start, dtype=torch.float64)
    torch.testing.assert_close(e[4:] @ fused.delta(K, w).T, e[4:] @ (w @ start.change).T, rtol=1e-9, atol=1e-9)


def test_one_lora_without_priors_does_what_it_does_alone() -> None:
    shapes = {K: (6, 8)}
    fusion, f, e = Fusion(shapes), lora(shapes, 1, 0), normal(3, 8, seed=1)
    fusion.add(f, [e])
    w = normal(6, 8, seed=2)
    fused = fusion.solve(RefinementConfig(ridge=1e-10), dtype=torch.float64)
    torch.testing.assert_close(e @ fused.delta(K, w).T, e @ (f[K][1] @ f[K][0]).T, rtol=1e-7, atol=1e-7)


def test_concepts_that_share_nothing_do_not_disturb_each_other_and_what_is_kept_stays() -> None:
    """The naive sum gives each concept all of the LoRAs at half strength."""
    shapes = {K: (6, 12)}
    basis = torch.linalg.qr(normal(12, 12, seed=0)).Q
    states, kept = [basis[:4], basis[4:8]], basis[8:]
    loras = [lora(shapes, 1, 10), lora(shapes, 1, 20)]
    fusion = Fusion(shapes)
    for f, e in zip(loras, states, strict=True):
        fusion.add(f, [e])
    w = normal(6, 12, seed=3)
    delta = fusion.solve(RefinementConfig(lambda_2=1.0, prior_rows=1.0, ridge=1e-9), kept.T @ kept, dtype=torch.float64).delta(
        K, w
    )
    naive = naive_sum([(f, 1.0) for f in loras], shapes)[K].double()
    for f, e in zip(loras, states, strict=True):
        wanted = e @ (f[K][1] @ f[K][0]).T
        torch.testing.assert_close(e @ delta.T, wanted, rtol=1e-6, atol=1e-6)
        assert float((e @ naive.T - wanted).norm()) > 0.3 * float(wanted.norm())
    assert float((kept @ delta.T).norm()) < 1e-6
    assert float((kept @ naive.T).norm()) > 0.1


def test_order_and_thin_or_full_sums_do_not_matter() -> None:
    """12 LoRAs of rank 3 pass every layer's thin limit (out 5, d 7: rank 3; out 90, d 7: rank 7)."""
    shapes = {K: (5, 7), V: (90, 7)}
    loras, states = [lora(shapes, 3, 100 * i) for i in range(12)], [normal(9, 7, seed=i) for i in range(12)]
    grams = [e.T @ e for e in states]
    results = []
    for order in (range(12), reversed(range(12))):
        fusion = Fusion(shapes)
        for i in order:
            fusion.add(loras[i], [states[i]])
        results.append(fusion.solve(CONFIG, torch.eye(7), dtype=torch.float64))
    total = sum(grams) + torch.eye(7, dtype=torch.float64)
    total += CONFIG.ridge * total.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    for name, (out, d) in shapes.items():
        direct = sum(f[name][1] @ f[name][0] @ g for f, g in zip(loras, grams, strict=True)) @ torch.linalg.inv(total)
        for fused in results:
            down, up = fused.factors[name]
            assert down.shape[0] == min(out, d)
            torch.testing.assert_close(up @ down, direct, rtol=1e-9, atol=1e-9)


def test_more_loras_may_follow_a_solution() -> None:
    shapes = {K: (40, 30)}
    at_once, in_turn = Fusion(shapes), Fusion(shapes)
    for i in range(3):
        for fusion in (at_once, in_turn):
            fusion.add(lora(shapes, 2, 10 * i), [normal(4, 30, seed=i)])
        in_turn.solve(CONFIG, torch.eye(30))
    a, b = (f.solve(CONFIG, torch.eye(30), dtype=torch.float64).factors[K] for f in (at_once, in_turn))
    assert a[0].shape == (6, 30)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def live_bytes() -> int:
    """Of all tensors' memory that is reachable, each once."""
    gc.collect()
    sizes = {}
    for x in gc.get_objects():
        if issubclass(type(x), Tensor):  # isinstance would ask every object, and some warn
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def test_memory_does_not_grow_with_the_number_of_loras() -> None:
    """Thin parts are added up after 5 LoRAs in one layer and 8 in the other, and keep their room."""
    shapes = {K: (8, 12), V: (20, 12)}
    before, fusion, seen = live_bytes(), Fusion(shapes), []
    for i in range(1, 121):
        factors, states = lora(shapes, 1, i), normal(5, 12, seed=i)
        references = [weakref.ref(x) for pair in factors.values() for x in pair] + [weakref.ref(states)]
        fusion.add(factors, [states])
        del factors, states
        assert all(r() is None for r in references)
        if i % 40 in (0, 39):
            seen.append(live_bytes() - before)
    product = sum(8 * out * d for out, d in shapes.values())
    rows = sum(8 * (out + d) for out, d in shapes.values())  # of one LoRA
    assert max(seen) <= 2 * product + rows + 8 * 12 * 12 + 64  # sums, thin parts up to as much again, G
    assert len(set(seen)) == 1
    assert fusion.count == 120


def test_inputs_stay_and_are_not_held() -> None:
    shapes = {K: (40, 30)}
    f, states = lora(shapes, 2, 0), normal(4, 30, seed=1)
    kept = [f[K][0].clone(), f[K][1].clone(), states.clone()]
    fusion = Fusion(shapes)
    fusion.add(f, [states])
    before = fusion.solve(CONFIG, torch.eye(30)).factors[K]
    assert all(torch.equal(a, b) for a, b in zip((*f[K], states), kept, strict=True))
    f[K][1].zero_()  # the caller goes on training
    after = fusion.solve(CONFIG, torch.eye(30)).factors[K]
    assert torch.equal(before[1], after[1])
    assert before[1].dtype == torch.float32


def test_a_layer_that_no_lora_has_still_forgets_by_the_refinement() -> None:
    shapes = {K: (4, 6), V: (4, 6)}
    fusion, e, start = Fusion(shapes), normal(9, 6, seed=1), change(6, 2)
    fusion.add(lora({K: (4, 6)}, 1, 0), [e])
    w = normal(4, 6, seed=3)
    fused = fusion.solve(RefinementConfig(ridge=1e-9), refinement=start, dtype=torch.float64)
    assert V not in fused.factors
    torch.testing.assert_close(fused.delta(V, w), w @ start.change, rtol=1e-6, atol=1e-6)


def test_delta_comes_in_the_weights_type_at_least_float32() -> None:
    fusion = Fusion({K: (4, 6), V: (4, 6)})
    fusion.add(lora({K: (4, 6)}, 1, 0), [torch.eye(6)])
    fused = fusion.solve(CONFIG)
    assert fused.delta(K, torch.zeros(4, 6, dtype=torch.float16)).dtype == torch.float32
    assert fused.delta(K, torch.zeros(4, 6, dtype=torch.float64)).dtype == torch.float64
    assert torch.equal(fused.delta(V, torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("rows", [1, 100, 4096])
def test_states_count_the_same_in_any_batches(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realera_nodes.core.fusion.ROWS", rows)
    states = [normal(1, 77, 5, seed=i, dtype=torch.float32) for i in range(6)]
    e = torch.cat(states).flatten(0, 1).double()
    f, fusion = lora({K: (4, 5)}, 1, 0), Fusion({K: (4, 5)})
    fusion.add(f, iter(states))
    torch.testing.assert_close(fusion.gram, e.T @ e, rtol=1e-12, atol=1e-9)
    delta = fusion.solve(RefinementConfig(ridge=0.0), dtype=torch.float64).delta(K, normal(4, 5, seed=9))
    torch.testing.assert_close(delta, f[K][1] @ f[K][0], rtol=1e-9, atol=1e-9)  # B D G G^-1


BAD: dict[str, tuple[dict, str]] = {
    "empty": ({}, "has no layer of the text attention"),
    "other layer": ({"x.attn1.to_q": (torch.ones(1, 6), torch.ones(4, 1))}, "x.attn1.to_q, which is no text projection"),
    "width": ({K: (torch.ones(1, 7), torch.ones(4, 1))}, r"width 7 at a\.attn2\.to_k, the model's are 6 wide"),
    "out": ({K: (torch.ones(1, 6), torch.ones(5, 1))}, "writes 5 values at a.attn2.to_k, the model's layer has 4"),
    "ranks": ({K: (torch.ones(2, 6), torch.ones(4, 1))}, "do not fit each other"),
    "nan": ({K: (torch.full((1, 6), float("nan")), torch.ones(4, 1))}, "NaN or infinite"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_lora_that_does_not_fit_is_refused_and_nothing_of_it_is_added(what: str) -> None:
    factors, words = BAD[what]
    fusion = Fusion({K: (4, 6), V: (4, 6)})
    mixed = {V: (torch.ones(1, 6), torch.ones(4, 1)), **factors} if factors else {}
    with pytest.raises(ErasureError, match=words) as refused:
        fusion.add(mixed, [torch.eye(6)], "dog.safetensors")
    assert 'the LoRA "dog.safetensors"' in str(refused.value)
    assert fusion.count == 0
    assert float(fusion.gram.abs().sum()) == 0
    with pytest.raises(ErasureError, match="add at least one"):
        fusion.solve(CONFIG)
    with pytest.raises(ErasureError, match=words):
        naive_sum([(mixed, 1.0)], fusion.shapes)


def test_states_of_another_encoder_are_refused() -> None:
    fusion = Fusion({K: (4, 6)})
    with pytest.raises(ErasureError, match="states of LoRA 1 are 5 wide, the model's cross-attention 6"):
        fusion.add(lora({K: (4, 6)}, 1, 0), [torch.eye(5)])
    with pytest.raises(ErasureError, match="NaN"):
        fusion.add(lora({K: (4, 6)}, 1, 0), [torch.eye(6), torch.full((6, 6), float("nan"))])
    assert fusion.count == 0
    assert float(fusion.gram.abs().sum()) == 0


@pytest.mark.parametrize(("shapes", "words"), [({}, "none"), ({K: (4, 6), V: (4, 7)}, "6 and 7")])
def test_a_model_without_one_text_width_is_refused(shapes: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        Fusion(shapes)


def test_what_cannot_be_inverted_is_refused_by_the_setting_to_raise() -> None:
    fusion = Fusion({K: (4, 6)})
    fusion.add(lora({K: (4, 6)}, 1, 0), [normal(2, 6, seed=0)])
    with pytest.raises(ErasureError, match=r"raise ridge \(now 0\)"):
        fusion.solve(RefinementConfig(ridge=0.0))
    fused = fusion.solve(RefinementConfig(ridge=1e-3))
    with pytest.raises(ErasureError, match="condition number"):
        fusion.solve(RefinementConfig(ridge=1e-3, max_condition=0.5 * fused.condition))


def test_the_naive_sum_is_equation_6() -> None:
    shapes = {K: (4, 6), V: (3, 6)}
    first, second = lora(shapes, 2, 0), lora({K: (4, 6)}, 1, 10)
    for normalise, share in ((True, 4.0), (False, 1.0)):
        found = naive_sum(iter([(first, 1.0), (second, 3.0)]), shapes, normalise)
        expected = (first[K][1] @ first[K][0] + 3 * second[K][1] @ second[K][0]) / share
        torch.testing.assert_close(found[K].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[V].double(), first[V][1] @ first[V][0] / share, rtol=1e-5, atol=1e-6)
    with pytest.raises(ErasureError, match="add at least one"):
        naive_sum([], shapes)
    with pytest.raises(ErasureError, match="sum up to 0"):
        naive_sum([(first, 1.0), (second, -1.0)], shapes)
