"""The report's numbers in embedding space, on edits whose answers are known."""

from __future__ import annotations

import pytest
import torch

from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.spans import TextStates
from realera_nodes.core.words import NamedWord
from realera_nodes.mining import Mined
from realera_nodes.report.probes import Probe, demo_probes, general_probes, strongest_words
from realera_nodes.report.report import embedding_residue, markdown, value_drift

D, LENGTH = 48, 12
CONCEPT = Concept("jet plane", "sky", aliases=("airliner",), preserve=(Preserved("bird"),), templates=("a photo of the {}",))


class Words:
    """A text encoder whose states are one random vector a word: causal context is left out, padding is the word ""."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {"": 0}
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(64, D, generator=generator)
        self.weights = {f"{layer}.attn2.{k}": torch.randn(20, D, generator=generator) for layer in "ab" for k in ("to_k", "to_v")}

    def phrase_ids(self, phrase: str) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids)) for word in phrase.split()]

    def encode(self, prompts: list[str]) -> TextStates:
        rows = [[0, *self.phrase_ids(p)] for p in prompts]
        ids = [row + [0] * (LENGTH - len(row)) for row in rows]
        return TextStates(self.table[torch.tensor(ids)], ids)

    def projections(self) -> dict[str, torch.Tensor]:
        return self.weights


def towards_anchor(backend: Words, share: float, phrase: str = "jet plane", anchor: str = "sky") -> dict[str, torch.Tensor]:
    """Deltas that bring the values of a phrase's words ``share`` of the way to the anchor's, and move no other known word's."""
    for known in (phrase, anchor, "airliner", "a photo of the", "bird", *(p.prompt for p in general_probes([CONCEPT]))):
        backend.phrase_ids(known)
    e, keep = backend.phrase_ids(phrase), list(range(len(backend.ids)))
    targets = backend.table.clone()
    targets[e] += share * (backend.table[backend.phrase_ids(anchor)] - backend.table[e])
    states = backend.table[keep]
    # more words than dimensions could not all be kept: those of this test are fewer
    transform = torch.linalg.lstsq(states.double(), (targets[keep] - states).double()).solution.float()
    return {name: w @ transform.T for name, w in backend.weights.items()}


@pytest.fixture
def backend() -> Words:
    return Words()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_residue_is_what_is_left_of_the_way(backend: Words, share: float) -> None:
    found = embedding_residue(backend, general_probes([CONCEPT]), towards_anchor(backend, share))
    assert set(found) == {"concept", "synonym"}  # what should stay has no anchor
    assert found["concept"] == pytest.approx(abs(1 - share), abs=1e-4)
    assert found["synonym"] == pytest.approx(1, abs=1e-4)


def test_drift_is_of_the_words_that_moved(backend: Words) -> None:
    found = value_drift(backend, general_probes([CONCEPT]), towards_anchor(backend, 0.5))
    assert found["preserved"] == pytest.approx(0, abs=1e-4)
    assert found["unrelated"] == pytest.approx(0, abs=1e-4)
    assert found["concept"] > 0.05


def test_values_are_looked_at_where_they_are_edited(backend: Words) -> None:
    deltas = towards_anchor(backend, 1.0)
    probes = general_probes([CONCEPT])
    halves = {n: d / 2 if n.endswith("to_k") else d for n, d in deltas.items()}
    assert embedding_residue(backend, probes, halves)["concept"] == pytest.approx(0, abs=1e-4)
    keys = {n: d for n, d in halves.items() if n.endswith("to_k")}
    assert embedding_residue(backend, probes, keys)["concept"] == pytest.approx(0.5, abs=1e-4)
    assert embedding_residue(backend, probes, {}) == {}
    assert value_drift(backend, probes, {}) == {}


def test_a_words_anchor_is_its_concepts(backend: Words) -> None:
    other = Concept("cat", "dog", templates=("{}",))
    words = [NamedWord(w, 0.5, 0.5, True, r) for w, r in (("runway", 0.6), ("wings", 0.9), ("purr", 0.8), ("fog", 0.1))]
    mined = Mined({"jet plane": words[:2], "cat": [words[2], words[1], words[3]]}, words=["wings", "runway", "purr"])
    assert strongest_words([CONCEPT], mined) == {"wings": "sky", "runway": "sky"}
    named = strongest_words([CONCEPT, other], mined)
    assert named == {"wings": "sky", "runway": "sky", "purr": "dog"}
    assert strongest_words([CONCEPT, other], mined, 2) == {"wings": "sky"}
    probes = general_probes([CONCEPT, other], ["hangar"], named)
    evoking = [(p.label, p.prompt, p.anchor) for p in probes if p.group == "associated"]
    assert evoking[0] == ("hangar", "a photo of the hangar", "sky")
    assert evoking[-1] == ("purr", "a photo of the purr", "dog")


def test_the_anchor_takes_the_phrases_place() -> None:
    assert Probe("concept", "photo", "a photo of a {}, red", anchor="sky").prompt == "a photo of a photo, red"
    probes = {p.label: p for p in demo_probes([Concept("airplane", "sky")])}
    assert probes["airplane"].template == "a photo of the {}"
    assert all(p.anchor == "sky" for p in probes.values() if p.group in ("synonym", "associated"))
    assert all(p.anchor is None for p in probes.values() if p.group in ("preserved", "unrelated"))


def test_the_page_shows_both_numbers() -> None:
    table = {
        "after": {},
        "picture_change": {"concept": 0.5, "unrelated": 0.25},
        "value_drift": {"concept": 1.5, "unrelated": 0.0},
        "embedding_residue": {"concept": 0.125},
    }
    page = markdown("x", table)
    assert "| concept | 0.500 | 1.500 | 0.125 |" in page
    assert "| unrelated | 0.250 | 0.000 | - |" in page
