"""What a phrase is, for every host: how it is spelled, and what is none.

A phrase is looked for in prompts by its tokens, so it must be written as a tokenizer reads it: hosts fold white space, and take
the backslash off an escaped bracket, since bare brackets are their syntax for weights.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from typing import Any

from .errors import ErasureError

#: characters; an encoder reads 75 tokens, and a byte-pair tokenizer takes quadratic time over one endless word
LONGEST = 1000
_ESCAPED = re.compile(r"\\+([()\[\]{}])")  # several, where they were escaped again on their way: what is spelled stays so
_ESCAPED_IN_TEMPLATES = re.compile(r"\\+([()\[\]])")  # its braces are its own
_JOINERS = "\u200c\u200d"
#: no picture of their own, though Unicode counts them among letters, marks or symbols
_BLANK = {"\u034f", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u2800", "\u3164", "\uffa0", *map(chr, range(0xFE00, 0xFE10)),
          *map(chr, range(0xE0100, 0xE01F0))}  # fmt: skip
#: what tokenizers take for the ends of a text, wherever it stands
_MARKS = ("<|startoftext|>", "<|endoftext|>")


def spelled(text: str) -> str:
    """A text as prompts have it: NFC, white space of any kind as single spaces, nothing invisible, brackets without backslash.

    Joiners stay between letters of scripts that need them, and in pictographs.
    """
    return _folded(_ESCAPED.sub(r"\1", _folded(text)))


def _folded(text: str) -> str:
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = unicodedata.normalize("NFC", text)
    spaced = "".join(" " if c.isspace() else c for c in text)
    seen = [c for c in spaced if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf")]
    kept = [c for i, c in enumerate(seen) if c not in _JOINERS or _joins(seen, i)]
    # what stood apart may compose now
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def _joins(seen: list[str], i: int) -> bool:
    around = seen[max(0, i - 1) : i] + seen[i + 1 : i + 2]
    return len(around) == 2 and all(ord(c) > 127 and not c.isspace() and c not in _JOINERS for c in around)


def phrase_of(text: Any, empty: str, what: str = "a phrase") -> str:
    """The phrase that somebody wrote, ``spelled``.

    Args:
        empty: the sentence for a text of which nothing is left
        what: what it is, in the other sentences

    Raises:
        ErasureError: no text, nothing to be seen in it, too long, or characters that are no text.
    """
    found = spelled(_text(text, what))
    if not any(_is_seen(c) for c in found):
        raise ErasureError(empty)
    for mark in _MARKS:
        if mark in found.casefold():
            raise ErasureError(f'"{shown(found)}" holds {mark}, which ends a text for the tokenizer: write words.')
    return found


def _is_seen(c: str) -> bool:
    return c not in _BLANK and unicodedata.category(c) not in ("Cc", "Cf", "Mn", "Me", "Mc", "Zs", "Zl", "Zp")


def template_of(text: Any) -> str:
    """A prompt with {} where the phrase goes, spelled as phrases are. ErasureError: not exactly one {}, or no text."""
    found = _folded(_ESCAPED_IN_TEMPLATES.sub(r"\1", _folded(_text(text, "a template"))))
    if not holds_one_phrase(found):
        raise ErasureError(f'the template "{shown(found)}" must hold {{}} once, where the phrase goes.')
    return found


def holds_one_phrase(template: str) -> bool:
    """Whether ``template.format(phrase)`` puts the phrase in once: one bare {}, no other field, no loose brace."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        return False
    return fields == [("", "", None)]


def same(a: str, b: str) -> bool:
    """Whether two phrases are one to a tokenizer, which folds case and spaces."""
    return folded(a) == folded(b)


def folded(phrase: str) -> str:
    """What two phrases that are one to a tokenizer have in common."""
    return unicodedata.normalize("NFC", spelled(phrase).casefold())


def shown(text: str, most: int = 60) -> str:
    """The beginning of a text, for sentences about it."""
    return text if len(text) <= most else text[:most] + "..."


def told(value: Any) -> str:
    """A setting's value, for sentences about it."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python itself refuses to write very long ones
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        return shown(spelled(repr(value)))
    except ValueError:
        return f"a {type(value).__name__} with numbers of thousands of digits"


def _text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise ErasureError(f"{what} must be words, not {told(text)}: write them as text.")
    if len(text) > LONGEST:
        raise ErasureError(f'{what} has {len(text)} characters ("{shown(spelled(text[:80]), 40)}..."), '
                           "and a text encoder reads 75 tokens: shorten it.")  # fmt: skip
    if any("\ud800" <= c <= "\udfff" or c == "\ufffd" for c in text):
        raise ErasureError(f"{what} holds characters that are no text ({shown(ascii(text))}): write it anew.")
    return text
