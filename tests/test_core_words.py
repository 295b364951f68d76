"""Named neighbors: order, the inside flag and the response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.spans import TextStates
from realera_nodes.core.words import NamedWord, named_words, response_similarity

CONCEPT = torch.tensor([2.0, 0.0])


def test_words_come_nearest_first_with_exact_cosine_and_distance() -> None:
    states = torch.tensor([[0.0, 2.0], [2.0, 0.0], [3.0, 0.0], [-2.0, 0.0], [1.6, 1.2]])
    found = named_words(CONCEPT, states, ["left", "itself", "long", "back", "near"], NeighborConfig(d1=0.6, s2=0.8 - 1e-6))
    assert [w.word for w in found] == ["itself", "long", "near", "left", "back"]
    assert [w.cosine for w in found] == pytest.approx([1, 1, 0.8, 0, -1], abs=1e-6)
    assert [w.distance for w in found] == pytest.approx([0, 0.5, 0.4**0.5, 2**0.5, 2], abs=1e-6)
    assert [w.inside for w in found] == [True, True, False, False, False]
    assert all(w.response is None for w in found)


@pytest.mark.parametrize(
    ("state", "inside"),
    [
        ([2.8, 0.0], True),  # distance 0.4, cosine 1
        ([3.4, 0.0], False),  # too far
        ([1.2, 0.9], True),  # distance 0.602, cosine 0.8
        ([1.3, 0.98], False),  # distance 0.602, but turned too far: 0.7985
    ],
)
def test_inside_needs_both_bounds(state: list[float], inside: bool) -> None:
    config = NeighborConfig(d1=0.61, s2=0.799)
    assert named_words(CONCEPT, torch.tensor([state]), ["word"], config)[0].inside is inside


def test_the_scale_of_the_encoder_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    concept, states = torch.randn(8, generator=g), torch.randn(20, 8, generator=g)
    words = [str(i) for i in range(20)]
    plain = named_words(concept, states, words, NeighborConfig())
    scaled = named_words(4 * concept, 4 * states, words, NeighborConfig())
    assert [(w.word, w.inside) for w in plain] == [(w.word, w.inside) for w in scaled]


def test_no_words_are_no_words() -> None:
    assert named_words(CONCEPT, torch.zeros(0, 2), [], NeighborConfig()) == []


def answer(text: TextStates) -> Tensor:
    """K = 2 latents: a linear answer and its double, with an offset that every prompt shares."""
    x = text.states[:, -1]
    return torch.stack([x + 5, 2 * x - 3], 1)


def text_of(*rows: list[float]) -> TextStates:
    return TextStates(torch.tensor(rows)[:, None], [[0]] * len(rows))


def test_response_is_one_for_the_concept_and_compares_what_prompts_add() -> None:
    concept, empty = text_of([2.0, 1.0, 0.0]), text_of([1.0, 1.0, 0.0])
    texts = text_of([2.0, 1.0, 0.0], [7.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 0.0])
    found = response_similarity(answer, concept, empty, texts)
    assert found.tolist() == pytest.approx([1, 1, -1, 0, 0.5**0.5, 0], abs=1e-6)


def test_response_is_the_mean_over_latents() -> None:
    def turning(text: TextStates) -> Tensor:
        x = text.states[:, -1]
        return torch.stack([x, torch.stack([x[:, 0], torch.zeros(len(x))], 1)], 1)

    found = response_similarity(turning, text_of([1.0, 0.0]), text_of([0.0, 0.0]), text_of([1.0, 1.0]))
    assert found.tolist() == pytest.approx([(0.5**0.5 + 1) / 2], abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_only_change_how_much_is_asked_at_once(batch: int) -> None:
    texts = TextStates(torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0)), [[0, 0]] * 7)
    sizes = []

    def counting(text: TextStates) -> Tensor:
        sizes.append(len(text))
        return answer(text)

    found = response_similarity(counting, texts[0], texts[1], texts, batch)
    torch.testing.assert_close(found, response_similarity(answer, texts[0], texts[1], texts, 7))
    assert sizes[0] == sizes[1] == 1
    assert sizes[2:] == [min(batch, 7 - i) for i in range(0, 7, batch)]


def test_no_texts_have_no_responses() -> None:
    none = TextStates(torch.zeros(0, 1, 3), [])
    assert response_similarity(answer, text_of([2.0, 1.0, 0.0]), text_of([1.0, 1.0, 0.0]), none).shape == (0,)


def test_a_word_can_be_told_its_response() -> None:
    assert NamedWord("jet", 0.7, 0.8, False, 0.9).response == 0.9
