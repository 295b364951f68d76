"""The data file of the concepts, and the hygiene between what is trained, erased and measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from realera_nodes.demo import clip_text
from realera_nodes.demo.concepts import CIFAR10, demo_concepts, eraser_inputs
from realera_nodes.demo.expand import load_asset
from tools.demo_training.captions import caption, every_caption_part

ROOT = Path(__file__).parent.parent
CONCEPTS = demo_concepts()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def contains(text: str, phrase: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(phrase.lower())}(?![a-z0-9])", text.lower()) is not None


def test_there_are_at_least_eighty_with_cifar10_and_characters() -> None:
    names = [c.name for c in CONCEPTS]
    assert len(names) == len(set(names)) >= 80
    assert set(CIFAR10) <= set(names)
    people = [c.name for c in CONCEPTS if c.kind == "person"]
    given = [p.split()[0] for p in people]
    assert len(people) >= 4
    assert len(given) - len(set(given)) == 1, "two characters share a given name"


def test_every_concept_has_phrases_of_each_kind() -> None:
    for c in CONCEPTS:
        assert len(c.synonyms) >= 2, c.name
        assert len(c.associated) >= 2, c.name
        assert len(c.synonyms + c.associated) >= 4, c.name
        assert c.unseen, c.name


def test_a_phrase_belongs_to_one_concept() -> None:
    phrases = [p.lower() for c in CONCEPTS for p in (*c.trained, *c.unseen)]
    assert len(phrases) == len(set(phrases))


def test_unseen_words_are_in_no_caption() -> None:
    parts = every_caption_part()
    for c in CONCEPTS:
        for unseen in c.unseen:
            assert not [p for p in parts if contains(p, unseen)], unseen


def test_captions_are_made_of_the_listed_parts_only() -> None:
    import random

    known = {w for part in every_caption_part() for w in words(part)} | {"in"}
    rng = random.Random(0)
    for _ in range(3000):
        text = caption((rng.randrange(len(CONCEPTS)), rng.randrange(5), rng.randrange(6)), rng)
        assert set(words(text)) <= known, text


def test_an_eraser_is_given_names_only() -> None:
    given = {w.lower() for w in eraser_inputs()}
    assert given == {c.name.lower() for c in CONCEPTS}
    for c in CONCEPTS:
        assert not given & {p.lower() for p in (*c.synonyms, *c.associated, *c.unseen)}


def test_associated_phrases_appear_in_no_code_that_erases() -> None:
    erasing = [p for p in (ROOT / "realera_nodes").rglob("*.py") if "demo" not in p.relative_to(ROOT).parts]
    for path in erasing:
        text = path.read_text()
        found = [p for c in CONCEPTS for p in c.associated if contains(text, p)]
        assert not found, (path, found)


@pytest.fixture(scope="module")
def phrase_vector(tmp_path_factory: pytest.TempPathFactory):
    """Unit EOS state of a bare phrase without EOS's own direction: where its cosine to a name is measured."""
    from transformers import CLIPTokenizer

    from realera_nodes.demo.bpe import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    asset = load_asset("text")
    table = clip_text.expand_table(asset["codes"], asset["logits"])
    own = F.normalize(table[clip_text.EOS], dim=0)

    def vector(phrase: str) -> torch.Tensor:
        state = clip_text.encode_vectors(table[torch.tensor(tokenizer(phrase)["input_ids"])][None])[0, -1]
        return F.normalize(state - (state @ own) * own, dim=0)

    return vector


@pytest.mark.needs_weights
def test_each_concept_has_two_trained_phrases_far_from_its_name(phrase_vector) -> None:
    for c in CONCEPTS:
        name = phrase_vector(c.name)
        cosines = [float(phrase_vector(p) @ name) for p in (*c.synonyms, *c.associated)]
        assert sum(v < 0.4 for v in cosines) >= 2, (c.name, cosines)
