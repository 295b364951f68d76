"""Named neighbors: order, the inside flag and the response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.spans import TextStates
from realera_nodes.core.words import NamedWord, ask_words, expected_responses, named_words, response_similarity

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


def test_expected_responses_are_those_of_ridge_regression() -> None:
    g = torch.Generator().manual_seed(1)
    states, y = torch.randn(30, 6, generator=g, dtype=torch.float64), torch.randn(12, generator=g, dtype=torch.float64)
    asked = list(range(3, 27, 2))
    x = states - states.mean(0)
    x = x / x.norm(dim=1, keepdim=True)
    a = x[asked]  # min ||a w - (y - mean)||^2 + r ||w||^2
    w = torch.linalg.solve(a.T @ a + 0.3 * torch.eye(6), a.T @ (y - y.mean()))
    assert torch.allclose(expected_responses(states, asked, y, ridge=0.3), x @ w + y.mean(), atol=1e-12)


def world(words: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """States, and responses that follow a direction of its own, which has nothing to do with what lies near."""
    g = torch.Generator().manual_seed(2)
    states = torch.randn(words, 16, generator=g)
    return states, torch.nn.functional.normalize(states, dim=1)[:, 0]


def test_asking_finds_words_that_lie_far_away() -> None:
    states, response = world()
    nearest = response.argsort()[100:].tolist() + response.argsort()[:100].tolist()  # the best ones are not the nearest
    config = NeighborConfig(candidates=200, nearest=0.3, learnt=0.3)
    found = ask_words(states, nearest, config, lambda rows: response[rows])
    assert len(found) == 200
    best = set(response.argsort(descending=True)[:40].tolist())
    by_chance = ask_words(states, nearest, NeighborConfig(candidates=200, nearest=0.3, learnt=0), lambda rows: response[rows])
    assert len(best & set(found)) >= 36 > 25 > len(best & set(by_chance))


@pytest.mark.parametrize(("nearest", "learnt"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.3, 0.25)])
@pytest.mark.parametrize("candidates", [0, 1, 7, 64, 5000])
def test_as_many_words_are_asked_as_the_settings_say_each_once(nearest: float, learnt: float, candidates: int) -> None:
    states, response = world(100)
    config = NeighborConfig(candidates=candidates, nearest=nearest, learnt=learnt)
    asked: list[int] = []

    def ask(rows: list[int]) -> torch.Tensor:
        asked.extend(rows)
        return response[rows]

    allowed = list(range(10, 100))
    found = ask_words(states, allowed, config, ask)
    assert sorted(asked) == sorted(set(asked)) == sorted(found)
    assert set(found) <= set(allowed)
    assert len(found) == min(candidates, 90)
    assert set(allowed[: round(nearest * min(candidates, 90))]) <= set(found)
    assert all(found[i] == pytest.approx(float(response[i])) for i in found)


def test_where_all_words_are_to_be_learnt_the_nearest_come_first() -> None:
    states, response = world(100)
    found = ask_words(states, list(range(100)), NeighborConfig(candidates=9, nearest=0, learnt=1), lambda rows: response[rows])
    assert list(found)[:3] == [0, 1, 2]
    assert len(found) == 9


def test_the_same_words_are_asked_again_and_others_under_another_seed() -> None:
    states, response = world(400)
    once, again, other = (
        set(ask_words(states, list(range(400)), NeighborConfig(candidates=40, seed=s), lambda rows: response[rows]))
        for s in (0, 0, 1)
    )
    assert once == again != other
