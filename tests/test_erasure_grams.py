"""What goes into the closed form: weights of what is erased, mined and kept."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from realera_nodes.core.closed_form import ClosedFormConfig, Grams
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.neighbors import NeighborConfig, sample_neighbors
from realera_nodes.core.spans import TextStates
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


def kept(prompts: Sequence[str]) -> Tensor:
    rows = Encoder().encode(prompts).states[:, 1:].flatten(0, 1).double()
    return rows.T @ rows


BARE = ErasureConfig(neighbors=NeighborConfig(m=0, n=0), closed_form=ClosedFormConfig(prior=0.0, beyond=4.0))
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
    for words, own in ((few, 4.0 * (LENGTH - 2) / (LENGTH - 1)), (many, 1.0), ([], 1.0)):
        both, alone = grams_of(Mined(far=words), asked, BARE), grams_of(Mined(far=words), OWL, BARE)
        assert torch.allclose(both.preserved - alone.preserved, 2.0 * own * kept(["a bus"]), atol=1e-12)


def test_without_component_d_or_weight_no_mined_word_is_kept() -> None:
    weightless = replace(BARE, closed_form=replace(BARE.closed_form, beyond=0.0))
    for config in (replace(BARE, beyond_on=False), weightless):
        assert not grams_of(Mined(far=["a bee"]), OWL, config).preserved.any()
