"""Whole words of CLIP's vocabulary, and how the others were found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import realera_nodes.demo
from realera_nodes.core.prior import captions
from realera_nodes.core.vocabulary import fragments, whole_words
from realera_nodes.demo.bpe import vocabulary
from tools.word_fragments import find_fragments, read_words


def test_words_are_whole_plain_and_commonest_first() -> None:
    tokens = {"cat</w>": 9, "tion</w>": 3, "do</w>": 4, "Cat</w>": 5, "it's</w>": 6, "café</w>": 7, "dog": 1, "zebra</w>": 2}
    assert whole_words(tokens) == ["zebra", "Cat", "cat"]


def test_pieces_of_words_are_gone_and_words_stay() -> None:
    found = whole_words({token: i for i, token in enumerate(vocabulary())})
    assert 28_000 < len(found) < 31_000
    kept = set(found)
    assert not kept & {"tion", "ation", "ght", "ening", "versity", "agram", "ducation", "lywood", "ers", "ings", "ology"}
    assert kept >= {
        "boarding",
        "boeing",
        "aircraft",
        "flight",
        "minecraft",
        "kardashian",
        "pikachu",
        "gogh",
        "iphone",
        "man",
        "land",
    }


def test_no_word_of_a_caption_or_a_concept_is_taken_for_a_piece() -> None:
    concepts = json.loads((Path(realera_nodes.demo.__file__).parent / "concepts.json").read_text(encoding="utf-8"))
    said = " ".join(captions()) + json.dumps(concepts)
    assert not set(re.findall("[a-z]+", said.lower())) & fragments()


def test_the_list_is_of_this_vocabularys_ends() -> None:
    assert fragments() <= {token.removesuffix("</w>") for token in vocabulary() if token.endswith("</w>")}
    assert len(fragments()) > 3000


def test_a_piece_must_be_shown_to_be_one() -> None:
    ends = ["tion", "nation", "kardashian", "kim", "inst", "agram", "ducation", "costa", "odd", "ikea"]
    tokens = [f"{word}</w>" for word in ends] + ["pine"]
    pairs = [("na", "tion</w>"), ("kim", "kardashian</w>"), ("aga", "inst</w>"), ("inst", "agram</w>"), ("pl", "odd</w>")]
    words = {"nation", "against", "education", "lacosta", "odd", "kim"}
    assert find_fragments(tokens, pairs, words, {"costa"}) == ["agram", "ducation", "inst", "tion"]
    assert find_fragments(tokens, pairs, words, set()) == ["agram", "costa", "ducation", "inst", "tion"]


def test_dictionaries_are_read_without_their_acronyms(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("EST\nPlato\ncat\ncat's\ncafé\n", encoding="utf-8")
    assert read_words([tmp_path / "words"]) == {"plato", "cat"}
