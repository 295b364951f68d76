"""The data file of the concepts, and the hygiene between what is trained, erased and measured."""

from __future__ import annotations

import re
from pathlib import Path

from realera_nodes.demo import clip_text
from realera_nodes.demo.bpe import write_tokenizer
from realera_nodes.demo.concepts import CIFAR10, demo_concepts, eraser_inputs
from realera_nodes.demo.expand import load_asset
from tools.demo_training.captions import caption, every_caption_part
from tools.demo_training.text_encoder import phrase_vectors

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


def test_each_concept_has_two_trained_phrases_far_from_its_name(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    asset = load_asset("text")
    table = clip_text.expand_table(asset["codes"], asset["logits"])
    for c in CONCEPTS:
        vectors = phrase_vectors(table, tokenizer, [c.name, *c.synonyms, *c.associated])
        cosines = (vectors[1:] @ vectors[0]).tolist()
        assert sum(v < 0.4 for v in cosines) >= 2, (c.name, cosines)
