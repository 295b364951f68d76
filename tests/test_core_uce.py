"""UCE against its formula, summed and inverted layer by layer, and the rows that its two token rules choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realera_nodes.core.closed_form import Grams, solve
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.spans import TextStates
from realera_nodes.core.uce import UCE_NEW, UCE_OLD, UceConfig, uce, uce_grams

WIDTH, LENGTH, START, END = 12, 8, 1, 2


def words(text: str) -> list[int]:
    """An id above the special ones for each word, the same for the same word."""
    return [3 + sum(ord(c) * 7**i for i, c in enumerate(w)) % 100_003 for w in text.split()]


def encode(prompts: Sequence[str]) -> TextStates:
    """Causal: a token's state depends on it and on all before it. START, words, END up to the length."""
    ids = [([START, *words(p)] + [END] * LENGTH)[:LENGTH] for p in prompts]
    return TextStates(torch.stack([torch.stack([state(row[: i + 1]) for i in range(LENGTH)]) for row in ids]), ids)


def state(head: list[int]) -> Tensor:
    seed = sum((i + 1) * 104_729 * x for i, x in enumerate(head)) % 2**31
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(
    w: Tensor, erased: list[tuple[Tensor, Tensor]], kept: list[Tensor], s_e: float, s_p: list[float], mu: float
) -> Tensor:
    """W' of the formula, one outer product at a time."""
    a, c = mu * w, mu * torch.eye(WIDTH, dtype=torch.float64)
    for rows, targets in erased:
        for e, v in zip(rows, targets, strict=True):
            a, c = a + s_e * torch.outer(w @ v, e), c + s_e * torch.outer(e, e)
    for rows, scale in zip(kept, s_p, strict=True):
        for p in rows:
            a, c = a + scale * torch.outer(w @ p, p), c + scale * torch.outer(p, p)
    return torch.linalg.solve(c.T, a.T).T


def layer(seed: int, n_out: int = 5) -> Tensor:
    return torch.randn(n_out, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, expected: Tensor) -> bool:
    return float((ours - expected).norm() / expected.norm()) < 1e-9


CONCEPTS = [
    Concept("big red dog", "cat", aliases=("hound",), preserve=(Preserved("wolf", 2.0), Preserved("old fox"))),
    Concept("van", "bus", preserve=(Preserved("wolf"), Preserved("ship"))),
]


@settings(max_examples=30, deadline=None)
@given(
    s_e=st.floats(0.05, 5), s_p=st.floats(0.05, 5), mu=st.floats(1e-2, 5), guide=st.sampled_from(["", "art", "a grey stone"])
)  # fmt: skip
def test_last_subject_tokens_by_the_formula_in_every_layer(s_e: float, s_p: float, mu: float, guide: str) -> None:
    config = UceConfig(to_anchor=False, guide=guide, erase_scale=s_e, preserve_scale=s_p, mu=mu)
    transform = uce(encode, words, CONCEPTS, config, WIDTH)
    target = encode([guide]).states[0, len(guide.split())][None]  # the start token of an empty guide
    erased = [(encode([p]).states[0, n][None], target) for p, n in (("big red dog", 3), ("hound", 1), ("van", 1))]
    kept = [encode([p]).states[0, n][None] for p, n in (("wolf", 1), ("old fox", 2), ("ship", 1))]
    assert transform.mu == mu
    for seed in (0, 1):
        w = layer(seed)
        assert close(w + transform.delta(w), by_hand(w, erased, kept, s_e, [2 * s_p, s_p, s_p], mu))


@pytest.mark.parametrize("guide", ["", "art", "one two three four five"])
def test_the_first_script_by_the_formula_in_every_layer(guide: str) -> None:
    """Erased from the last subject tokens on through the end and the padding, as far as both go. Kept: all rows of the empty
    prompt and of every preserved phrase, the start token among them, at 1 / (1 + their number); lambda is .5."""
    config = replace(UCE_OLD, guide=guide)
    transform = uce(encode, words, CONCEPTS, config, WIDTH)
    other, j = encode([guide]).states[0], len(guide.split())
    erased = []
    for p, i in (("big red dog", 3), ("hound", 1), ("van", 1)):
        n = LENGTH - max(i, j)
        erased.append((encode([p]).states[0, i : i + n], other[j : j + n]))
    kept = [encode([p]).states[0] for p in ("", "wolf", "old fox", "ship")]
    for seed in (0, 1):
        w = layer(seed)
        assert close(w + transform.delta(w), by_hand(w, erased, kept, 1, [1 / 4, 2 / 4, 1 / 4, 1 / 4], 0.5))


def test_the_first_script_keeps_the_empty_prompt_where_nothing_else_is_kept() -> None:
    concept = Concept("red dog", "cat")
    transform = uce(encode, words, [concept], UCE_OLD, WIDTH)
    erased = [(encode(["red dog"]).states[0, 2:], encode([""]).states[0, : LENGTH - 2])]
    w = layer(4)
    assert close(w + transform.delta(w), by_hand(w, erased, [encode([""]).states[0]], 1, [1.0], 0.5))


@pytest.mark.parametrize("tokens", ["last-subject", "aligned"])
@pytest.mark.parametrize("kept_tokens", ["edited", "all"])
@pytest.mark.parametrize("keep_empty", [False, True])
def test_what_is_kept_does_not_hang_on_what_is_edited(tokens: str, kept_tokens: str, keep_empty: bool) -> None:
    config = UceConfig(tokens=tokens, kept_tokens=kept_tokens, keep_empty=keep_empty, preserve_scale=0.7)
    found = uce_grams(encode, words, CONCEPTS, config, WIDTH).preserved
    rows = [(encode([""]).states[0], 1.0)] if keep_empty else []
    for phrase, last, weight in (("wolf", 1, 2.0), ("old fox", 2, 1.0), ("ship", 1, 1.0)):
        states = encode([phrase]).states[0]
        part = states if kept_tokens == "all" else states[last : last + 1] if tokens == "last-subject" else states[last:]
        rows.append((part, weight))
    expected = sum(0.7 * weight * part.T @ part for part, weight in rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_each_concept_to_its_own_anchor() -> None:
    transform = uce(encode, words, CONCEPTS, UceConfig(), WIDTH)
    cat, bus = encode(["cat"]).states[0, 1][None], encode(["bus"]).states[0, 1][None]
    rows = [encode([p]).states[0, n][None] for p, n in (("big red dog", 3), ("hound", 1), ("van", 1))]
    kept = [encode([p]).states[0, n][None] for p, n in (("wolf", 1), ("old fox", 2), ("ship", 1))]
    w = layer(3)
    expected = by_hand(w, list(zip(rows, (cat, cat, bus), strict=True)), kept, 1, [2, 1, 1], 0.5)
    assert close(w + transform.delta(w), expected)


def test_templates_move_the_subject() -> None:
    """An empty guide in a template leaves the word before it."""
    config = replace(UCE_NEW, templates=("a photo of {}", "{} walks by"))
    grams = uce_grams(encode, words, [Concept("red dog", "cat")], config, WIDTH)
    rows = torch.stack([encode(["a photo of red dog"]).states[0, 5], encode(["red dog walks by"]).states[0, 2]])
    targets = torch.stack([encode(["a photo of "]).states[0, 3], encode([" walks by"]).states[0, 0]])
    assert grams.rows == 2
    torch.testing.assert_close(grams.erased, rows.T @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grams.crossed, targets.T @ rows, rtol=1e-12, atol=1e-12)


def test_without_preserved_phrases_only_the_ridge_keeps() -> None:
    grams = uce_grams(encode, words, [Concept("dog", "cat")], UCE_NEW, WIDTH)
    assert (grams.rows, grams.kept_rows) == (1, 0)
    transform = uce(encode, words, [Concept("dog", "cat")], UCE_NEW, WIDTH)
    e, v = encode(["dog"]).states[0, 1], encode([""]).states[0, 0]
    # one row: T e = e + (v - e) |e|^2 / (|e|^2 + mu), and what is orthogonal to e stays
    share = float(e @ e) / (float(e @ e) + 0.5)
    torch.testing.assert_close(transform.rows(e[None])[0], e + share * (v - e), rtol=1e-12, atol=1e-12)
    other = layer(5, 1)[0]
    other = other - e * (other @ e) / (e @ e)
    torch.testing.assert_close(transform.rows(other[None])[0], other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "scale"), [(0, 1.0), (1, 0.5), (3, 0.25), (8, 1 / 9), (9, 0.1), (100, 0.1)])
def test_the_first_script_keeps_the_less_the_more_there_is_and_counts_the_empty_prompt(count: int, scale: float) -> None:
    assert UCE_OLD.kept_scale(count) == scale
    assert UCE_NEW.kept_scale(count) == 1.0


@pytest.mark.parametrize(("count", "scale"), [(0, 1.0), (1, 1.0), (4, 0.25), (10, 0.1), (100, 0.1)])
def test_without_the_empty_prompt_the_phrases_alone_are_counted(count: int, scale: float) -> None:
    assert UceConfig(preserve_scale=0.0).kept_scale(count) == scale


def test_the_two_codes() -> None:
    assert (UCE_NEW.tokens, UCE_NEW.mu, UCE_NEW.erase_scale, UCE_NEW.preserve_scale, UCE_NEW.guide) == (
        "last-subject",
        0.5,
        1,
        1,
        "",
    )
    assert (UCE_NEW.kept_tokens, UCE_NEW.keep_empty) == ("edited", False)
    assert (UCE_OLD.tokens, UCE_OLD.mu, UCE_OLD.erase_scale) == ("aligned", 0.5, 1)
    assert (UCE_OLD.kept_tokens, UCE_OLD.keep_empty) == ("all", True)


def test_a_concept_is_moved_by_its_own_row_and_no_other() -> None:
    """The last-subject rule leaves a token after the phrase where the kept phrases put it; a strong ridge leaves all."""
    still = uce(encode, words, CONCEPTS, replace(UCE_NEW, mu=1e9), WIDTH)
    assert float(still.change.norm()) < 1e-7
    strong = uce(encode, words, CONCEPTS, replace(UCE_NEW, mu=1e-9), WIDTH)
    e, v = encode(["van"]).states[0, 1], encode([""]).states[0, 0]
    torch.testing.assert_close(strong.rows(e[None])[0], v, rtol=1e-6, atol=1e-6)
    p = encode(["ship"]).states[0, 1]
    torch.testing.assert_close(strong.rows(p[None])[0], p, rtol=1e-6, atol=1e-6)


def test_keys_and_values() -> None:
    names = ("a.attn2.to_k", "a.attn2.to_v")
    assert [UceConfig(values=False).edits(n) for n in names] == [True, False]
    assert [UceConfig(keys=False).edits(n) for n in names] == [False, True]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": "first"}, 'tokens is "first": choose one of last-subject, aligned'),
        ({"kept_tokens": "none"}, 'kept_tokens is "none": choose one of edited, all'),
        ({"erase_scale": 0.0}, "erase_scale is 0.0"),
        ({"mu": 0.0}, "mu is 0.0: it must lie between 1e-12"),
        ({"mu": float("inf")}, "mu is inf"),
        ({"preserve_scale": -1.0}, "preserve_scale is -1.0"),
        ({"preserve_scale": float("nan")}, "preserve_scale is nan"),
        ({"templates": ("a photo",)}, "each of templates must hold"),
        ({"templates": ("{} by {x}",)}, "each of templates must hold"),
        ({"templates": ()}, "each of templates must hold"),
        ({"keys": False, "values": False}, "neither W_K nor W_V"),
        ({"strength": 11.0}, "strength is 11.0"),
        ({"max_condition": float("nan")}, "max_condition is nan"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ErasureError, match=sentence):
        UceConfig(**change)


@pytest.mark.parametrize(
    ("concepts", "config", "sentence"),
    [
        ([], UCE_NEW, "no concept to erase"),
        ([Concept("dog", "cat"), Concept("Dog", "sky")], UCE_NEW, '"Dog" is on the list twice'),
        ([Concept("art", "cat")], replace(UCE_NEW, guide="art"), '"art" is both erased and the guide'),
        ([Concept("dog", "cat", preserve=(Preserved("van"),)), Concept("van", "bus")], UCE_NEW, "erased, but also preserved"),
    ],
)
def test_contradictions_are_refused(concepts: list[Concept], config: UceConfig, sentence: str) -> None:
    with pytest.raises(ErasureError, match=sentence):
        uce(encode, words, concepts, config, WIDTH)


def test_an_absolute_ridge_is_the_relative_one_of_the_same_size() -> None:
    """``solve``'s mu: the same number, whichever way it is given, and its own name in the refusal."""
    grams = Grams(4)
    e = layer(0)[:2, :4]
    grams.erase(e, e.flip(0))
    relative = solve(grams, 0.1, 1e-2)
    absolute = solve(grams, 0.1, mu=relative.mu)
    assert absolute.mu == relative.mu
    assert torch.equal(absolute.change, relative.change)
    with pytest.raises(ErasureError, match=r"raise mu \(now 0\) or give more preserved concepts"):
        solve(grams, 0.1, mu=0.0)
