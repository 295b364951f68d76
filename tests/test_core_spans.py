"""Which tokens belong to a phrase, and what they become."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realera_nodes.core.errors import ErasureError
from realera_nodes.core.spans import TextStates, align, find_spans, make_pair, template_span

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


VOCABULARY = {"a": 1, "photo": 2, "of": 3, "the": 4, "dog": 5, "hot": 6, "sky": 7, "{": 8, "}": 9, "{}": 10}


def encode(prompts: list[str], pooled: bool = False) -> TextStates:
    """A state is (10 prompt + position, token)."""
    ids = [[START, *[VOCABULARY[w] for w in p.split()], END] for p in prompts]
    ids = [row + [END] * (LENGTH - len(row)) for row in ids]
    states = torch.tensor([[[10.0 * n + i, float(x)] for i, x in enumerate(row)] for n, row in enumerate(ids)])
    return TextStates(states, ids, states[:, -1] if pooled else None)


def phrase_ids(text: str) -> list[int]:
    return [VOCABULARY[w] for w in text.split()]


@pytest.mark.parametrize(
    ("template", "phrase", "span"),
    [
        ("a photo of the {}", "dog", (5, 6)),
        ("a photo of {} of the sky", "sky", (4, 5)),  # the template repeats the phrase after it
        ("the sky of {}", "sky", (4, 5)),  # and before it
        ("sky sky {} sky", "sky", (3, 4)),
        ("hot {}", "hot dog", (2, 4)),  # a phrase that begins as the words before end
        ("a {}", "a a", (2, 4)),  # and one that is nothing else
        ("{} of hot dog", "hot dog", (1, 3)),
        ("{{ sky }} sky of {}", "sky", (6, 7)),  # braces of its own
        ("{{}} sky {}", "sky", (3, 4)),
        ("{}", "the", (1, 2)),
        ("a photo of {}", "", (4, 4)),
        ("{}", "", (1, 1)),
    ],
)
def test_the_span_is_where_the_template_says(template: str, phrase: str, span: tuple[int, int]) -> None:
    assert template_span(encode([template.format(phrase)]).ids[0], template, phrase, phrase_ids) == span


WORDS = st.lists(st.sampled_from(["a", "hot", "dog"]), max_size=2).map(" ".join)


@given(WORDS, WORDS.filter(bool), WORDS)
def test_the_span_is_the_templates_own_whatever_its_words_repeat(before: str, phrase: str, after: str) -> None:
    start, stop = template_span(encode([f"{before} {phrase} {after}"]).ids[0], f"{before} {{}} {after}", phrase, phrase_ids)
    assert (start, stop) == (1 + len(before.split()), 1 + len(before.split()) + len(phrase.split()))


def test_a_phrase_that_is_not_read_as_its_own_words_is_named() -> None:
    def letters(text: str) -> list[int]:
        return [ord(c) for c in text.replace("nd", "N")]

    sentence = 'the tokens of "dog" do not stand at the place of {} in the prompt "an andog": use a template where'
    with pytest.raises(ErasureError, match=f"^{re.escape(sentence)}"):
        template_span([START, *letters("an andog"), END], "an an{}", "dog", letters)


@pytest.mark.parametrize(("ids", "span"), [([START, 8, 5, END], (2, 3)), ([START, 8, 5, 4, 5, END], None)])
def test_words_before_that_are_read_by_what_follows(ids: list[int], span: tuple[int, int] | None) -> None:
    """The words before are one token in the prompt, two alone: the phrase is found where nothing repeats it."""
    alone = {"a hot": [1, 6], "dog": [5]}.__getitem__
    if span:
        assert template_span(ids, "a hot{}", "dog", alone) == span
    else:
        with pytest.raises(ErasureError, match="do not stand at the place"):
            template_span(ids, "a hot{}", "dog", alone)


def test_make_pair_aligns_the_anchor_and_leaves_the_words_before() -> None:
    pair = make_pair("a photo of {}", "hot dog", "sky", encode, phrase_ids)
    assert (pair.prompt, pair.anchor_prompt) == ("a photo of hot dog", "a photo of sky")
    assert (pair.start, pair.stop) == (4, 6)
    assert pair.text.ids == [[START, 1, 2, 3, 6, 5, END, END, END, END]]
    assert pair.anchor.ids == [[START, 1, 2, 3, 7, END, END, END, END, END]]
    assert pair.targets[:, 0].tolist() == [0, 1, 2, 3, 14, 14, 15, 16, 17, 18]
    assert pair.targets[4:, 1].tolist() == [7, 7, END, END, END, END]
    e, target = pair.rows
    assert torch.equal(e, pair.text.states[0, 4:])
    assert torch.equal(target, pair.targets[4:])
    assert torch.equal(pair.anchor.states, encode(["a", "a photo of sky"]).states[1:])  # the anchor itself is not re-ordered


def test_make_pair_maps_the_phrase_where_the_template_repeats_the_anchor() -> None:
    pair = make_pair("a {} of the sky", "hot dog", "sky", encode, phrase_ids)
    assert (pair.start, pair.stop) == (2, 4)
    assert pair.targets[:, 0].tolist() == [0, 1, 12, 12, 13, 14, 15, 16, 17, 18]
    assert pair.targets[4:, 1].tolist() == [3, 4, 7, END, END, END]


def test_states_are_cut_like_lists() -> None:
    text = encode(["a", "dog", "sky"], pooled=True)
    assert len(text) == 3
    assert len(text[1]) == 1
    assert torch.equal(text[1].states, text.states[1:2])
    assert text[1].ids == [text.ids[1]]
    assert torch.equal(text[1:].pooled, text.pooled[1:])
    assert encode(["a"])[0].pooled is None
