"""Which tokens belong to a phrase, and what they become."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realera_nodes.core.errors import ErasureError
from realera_nodes.core.spans import TextStates, align, find_spans, make_pair, phrase_span

START, END, LENGTH = 90, 91, 10


@pytest.mark.parametrize(
    ("ids", "phrase", "spans"),
    [
        ([90, 1, 2, 3, 91], [2], [(2, 3)]),
        ([90, 1, 2, 1, 2, 91], [1, 2], [(1, 3), (3, 5)]),
        ([1, 1, 1, 1, 1], [1, 1], [(0, 2), (2, 4)]),  # without overlap
        ([1, 2, 1, 2, 1], [1, 2, 1], [(0, 3)]),
        ([1, 1, 2], [1, 2], [(1, 3)]),
        ([1, 2], [1, 2, 3], []),
        ([1, 2], [3], []),
        ([1, 2], [], []),
        ([], [1], []),
    ],
)
def test_find_spans(ids: list[int], phrase: list[int], spans: list[tuple[int, int]]) -> None:
    assert find_spans(ids, phrase) == spans


@given(st.lists(st.integers(0, 2), max_size=14), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_spans_hold_the_phrase_and_nothing_else_does(ids: list[int], phrase: list[int]) -> None:
    spans = find_spans(ids, phrase)
    assert all(ids[a:b] == phrase for a, b in spans)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    rest = [0, *[b for _, b in spans]], [*[a for a, _ in spans], len(ids)]
    assert not any(ids[i : i + len(phrase)] == phrase for a, b in zip(*rest, strict=True) for i in range(a, b - len(phrase) + 1))


def test_the_last_occurrence_is_the_phrase() -> None:
    assert phrase_span([90, 5, 6, 5, 91], [5], "photo", "photo of photo") == (3, 4)


def test_a_phrase_that_is_not_there_is_named() -> None:
    sentence = 'the tokens of "cat" do not occur in the prompt "a dog": write the phrase as its own words.'
    with pytest.raises(ErasureError, match=f"^{re.escape(sentence)}$"):
        phrase_span([90, 1, 2, 91], [3], "cat", "a dog")


@pytest.mark.parametrize(
    ("span", "anchor", "order"),
    [
        # equal lengths
        ((3, 5), (3, 5), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        # a longer anchor: last subject tokens meet, its first is left out; the tail moves by one and ends on the last position
        ((3, 4), (3, 5), [0, 1, 2, 4, 5, 6, 7, 8, 9, 9]),
        ((2, 3), (2, 5), [0, 1, 4, 5, 6, 7, 8, 9, 9, 9]),
        # a shorter anchor: surplus first tokens go to its first
        ((3, 5), (3, 4), [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]),
        ((3, 6), (3, 5), [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]),
        ((2, 5), (2, 3), [0, 1, 2, 2, 2, 3, 4, 5, 6, 7]),
        # phrases in different places
        ((2, 3), (4, 5), [0, 1, 4, 5, 6, 7, 8, 9, 9, 9]),
        ((4, 6), (1, 2), [0, 1, 2, 3, 1, 1, 2, 3, 4, 5]),
        # at the ends
        ((0, 1), (0, 1), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((8, 10), (8, 9), [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]),
    ],
)
def test_align(span: tuple[int, int], anchor: tuple[int, int], order: list[int]) -> None:
    found = align(span, anchor, LENGTH)
    assert found.dtype == torch.int64
    assert found.tolist() == order


VOCABULARY = {"a": 1, "photo": 2, "of": 3, "the": 4, "dog": 5, "hot": 6, "sky": 7}


def encode(prompts: list[str], pooled: bool = False) -> TextStates:
    """A state is (10 prompt + position, token)."""
    ids = [[START, *[VOCABULARY[w] for w in p.split()], END] for p in prompts]
    ids = [row + [END] * (LENGTH - len(row)) for row in ids]
    states = torch.tensor([[[10.0 * n + i, float(x)] for i, x in enumerate(row)] for n, row in enumerate(ids)])
    return TextStates(states, ids, states[:, -1] if pooled else None)


def phrase_ids(text: str) -> list[int]:
    return [VOCABULARY[w] for w in text.split()]


def test_make_pair_aligns_the_anchor_and_leaves_the_words_before() -> None:
    pair = make_pair("a photo of hot dog", "a photo of sky", "hot dog", "sky", encode, phrase_ids)
    assert (pair.start, pair.stop) == (4, 6)
    assert pair.text.ids == [[START, 1, 2, 3, 6, 5, END, END, END, END]]
    assert pair.anchor.ids == [[START, 1, 2, 3, 7, END, END, END, END, END]]
    assert pair.targets[:, 0].tolist() == [0, 1, 2, 3, 14, 14, 15, 16, 17, 18]
    assert pair.targets[4:, 1].tolist() == [7, 7, END, END, END, END]
    e, target = pair.rows
    assert torch.equal(e, pair.text.states[0, 4:])
    assert torch.equal(target, pair.targets[4:])
    assert torch.equal(pair.anchor.states, encode(["a", "a photo of sky"]).states[1:])  # the anchor itself is not re-ordered


def test_make_pair_takes_the_words_before_from_the_concept_where_prompts_differ() -> None:
    pair = make_pair("the dog of sky", "a photo of sky", "dog", "sky", encode, phrase_ids)
    assert pair.start == 2
    assert pair.targets[:, 0].tolist() == [0, 1, 14, 15, 16, 17, 18, 19, 19, 19]


def test_make_pair_names_the_prompt_that_lacks_its_phrase() -> None:
    with pytest.raises(ErasureError, match=r'tokens of "sky" do not occur in the prompt "a photo"'):
        make_pair("a dog", "a photo", "dog", "sky", encode, phrase_ids)


def test_states_are_cut_like_lists() -> None:
    text = encode(["a", "dog", "sky"], pooled=True)
    assert len(text) == 3
    assert len(text[1]) == 1
    assert torch.equal(text[1].states, text.states[1:2])
    assert text[1].ids == [text.ids[1]]
    assert torch.equal(text[1:].pooled, text.pooled[1:])
    assert encode(["a"])[0].pooled is None
