"""What goes into the closed form: weights of what is erased, mined and kept."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from realera_nodes.core.closed_form import ClosedFormConfig, Grams, solve
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.neighbors import NeighborConfig, sample_neighbors
from realera_nodes.core.spans import TextStates, make_pair
from realera_nodes.erasure import ErasureConfig, build_grams, make_pairs
from realera_nodes.mining import Mined

LENGTH, WIDTH = 6, 5


class Encoder:
    """Prompts of words: each a token of its own, with a state that the word and its place decide."""

    context_width = WIDTH

    def phrase_ids(self, phrase: str) -> list[int]:
        return [zlib.crc32(word.encode()) for word in phrase.split()]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        ids = [[0, *self.phrase_ids(p), *[1] * (LENGTH - 1 - len(p.split()))] for p in prompts]
        states = [
            [torch.randn(WIDTH, generator=torch.Generator().manual_seed((i + 7 * k) % 2**31)) for k, i in enumerate(row)]
            for row in ids
        ]
        return TextStates(torch.stack([torch.stack(row) for row in states]), ids)

    def rows(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        for prompt in prompts:
            states = self.encode([prompt]).states[0, 1:]
            yield states, torch.ones(len(states))


def grams_of(mined: Mined, concept: Concept, config: ErasureConfig) -> Grams:
    backend = Encoder()
    pairs = make_pairs(backend, [concept])[0]
    generator = torch.Generator().manual_seed(0)
    samples = (sample_neighbors(pair, config.neighbors, generator) for pair in pairs)
    return build_grams(backend, pairs, samples, mined, [concept], config, None)


def kept(prompts: Sequence[str], start: int = 1) -> Tensor:
    rows = Encoder().encode(prompts).states[:, start:].flatten(0, 1).double()
    return rows.T @ rows


BARE = ErasureConfig(neighbors=NeighborConfig(m=0, n=0), closed_form=ClosedFormConfig(prior=0.0, beyond=4.0, head=0.0))
OWL = Concept("owl", "forest", templates=("a {}",))


@pytest.mark.parametrize("words", [["a bee"], ["a bee", "a tea pot", "a bus"]])
def test_all_kept_words_together_weigh_so_many_rows_for_each_erased_one(words: list[str]) -> None:
    grams = grams_of(Mined(far=words), OWL, BARE)
    assert grams.rows == LENGTH - 2  # the start token and "a" stand before the phrase
    expected = kept(words) * 4.0 * grams.rows / (len(words) * (LENGTH - 1))
    assert torch.allclose(grams.preserved, expected, atol=1e-12)


def test_what_the_user_keeps_weighs_no_less_than_a_mined_word() -> None:
    asked = replace(OWL, preserve=(Preserved("bus", 2.0),))
    few, many = ["a bee"], [f"a word{i}" for i in range(40)]
    for words, own in ((few, 4.0 * (LENGTH - 2) / LENGTH), (many, 1.0), ([], 1.0)):
        both, alone = grams_of(Mined(far=words), asked, BARE), grams_of(Mined(far=words), OWL, BARE)
        assert torch.allclose(both.preserved - alone.preserved, 2.0 * own * kept(["a bus"], 0), atol=1e-12)  # its start token too


@pytest.mark.parametrize(("neighbors_on", "m"), [(True, 0), (True, 3), (False, 3)])
@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_every_erased_prompt_keeps_its_own_head(neighbors_on: bool, m: int, weight: float) -> None:
    """The start token and "a" of the concept, of each of its samples and of each mined word, and nothing else."""
    word = make_pair("a {}", "tea pot", "forest", Encoder().encode, Encoder().phrase_ids)
    config = replace(BARE, neighbors_on=neighbors_on, neighbors=NeighborConfig(m=m, n=0))
    without = grams_of(Mined(near=[(word, 1.5)], words=["tea pot"]), OWL, config)
    config = replace(config, closed_form=replace(config.closed_form, head=weight))
    grams = grams_of(Mined(near=[(word, 1.5)], words=["tea pot"]), OWL, config)
    head = Encoder().encode(["a owl"]).states[0, :2].double()
    prompts = 1 + m + 1.5 if neighbors_on else 1
    assert torch.allclose(grams.erased - without.erased, weight * prompts * head.T @ head, atol=1e-12)
    assert torch.equal(grams.moved, without.moved)
    assert torch.equal(grams.preserved, without.preserved)
    assert grams.rows == without.rows


def test_an_edit_leaves_the_start_token_and_with_it_the_empty_prompts_first_state() -> None:
    config = replace(BARE, closed_form=replace(BARE.closed_form, ridge=1e-6))
    start = Encoder().encode([""]).states[0, 0]
    moved = []
    for weight in (0.0, 1.0, 100.0):
        config = replace(config, closed_form=replace(config.closed_form, head=weight))
        change = solve(grams_of(Mined(), OWL, config), 0.1, 1e-6).change.float()
        moved.append(float((start @ change.T).norm() / start.norm()))
    assert moved[0] > 0.1
    assert moved[1] < 0.1 * moved[0]
    assert moved[2] < moved[1]


def test_without_component_d_or_weight_no_mined_word_is_kept() -> None:
    weightless = replace(BARE, closed_form=replace(BARE.closed_form, beyond=0.0))
    for config in (replace(BARE, beyond_on=False), weightless):
        assert not grams_of(Mined(far=["a bee"]), OWL, config).preserved.any()
