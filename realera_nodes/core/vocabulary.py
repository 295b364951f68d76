"""Whole words of a byte-pair vocabulary, without the pieces of words that merging leaves behind ("tion", "ght", "ening")."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: ends of words in CLIP's vocabulary that are no words, made by tools/word_fragments.py
FRAGMENTS = Path(__file__).parent / "fragments.txt"
END = "</w>"


@cache
def fragments() -> frozenset[str]:
    """Tokens that are no words of their own."""
    return frozenset(FRAGMENTS.read_text(encoding="ascii").split())


def whole_words(vocabulary: Mapping[str, int]) -> list[str]:
    """Words of a vocabulary (token -> id), commonest first: three plain letters or more, and no fragments."""
    words = [(i, token.removesuffix(END)) for token, i in vocabulary.items() if token.endswith(END)]
    return [w for _, w in sorted(words) if len(w) >= 3 and w.isascii() and w.isalpha() and w not in fragments()]
