"""Finds the tokens of CLIP's vocabulary that end words but are no words, for ``realera_nodes/core/fragments.txt``.

    python -m tools.word_fragments DICTIONARY... --long DICTIONARY...

The shipped list was made with Debian's wamerican and wbritish 2020.12.07-2 and, for ``--long``, wamerican-large:
american-english, british-english and american-english-large under /usr/share/dict. A dictionary alone would not do: a sixth of
the commonest tokens are names, brands and hashtags that it lacks ("boeing", "kardashian", "minecraft"), and those are just
what may go with a concept. So a token that is in no dictionary goes only if it is shown to be a piece of something:

- merging it to what stands before it gives a dictionary's word ("na" + "tion"), or what stands before is no word either
  ("inst" + "agram"), while "kim" + "kardashian" proves nothing;
- or it has five letters or more and a dictionary's word ends with it ("ducation", whose merge was never learned).
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from realera_nodes.core.prior import CAPTIONS
from realera_nodes.core.vocabulary import END, FRAGMENTS
from realera_nodes.demo import bpe

CONCEPTS = Path(bpe.__file__).with_name("concepts.json")
#: letters from which on the end of a word is seldom a name as well
LONG = 5


def read_words(paths: Iterable[Path]) -> set[str]:
    """Lower-case words of plain letters, names included, acronyms not: "est" and "ing" are in dictionaries as such."""
    found = (line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    return {w.lower() for w in found if w.isascii() and w.isalpha() and (w.islower() or w.istitle())}


def find_fragments(tokens: Iterable[str], pairs: Iterable[tuple[str, str]], words: set[str], more: set[str]) -> list[str]:
    """Fragments among a vocabulary's tokens, sorted.

    Args:
        tokens: of the vocabulary
        pairs: its merges, (left, right)
        words: a dictionary
        more: further words, too strange to speak for tokens that are seen to be pieces
    """
    plain = (t.removesuffix(END) for t in tokens if t.endswith(END))
    asked = {t for t in plain if len(t) >= 3 and t.isascii() and t.isalpha()} - words
    before: dict[str, list[str]] = defaultdict(list)
    for left, right in pairs:
        before[right.removesuffix(END) if right.endswith(END) else ""].append(left)
    tails = {w[i:] for w in words for i in range(1, len(w) - LONG + 1)} - more
    found = {t for t in asked if len(t) >= LONG and t in tails}
    found |= {t for t in asked if any(left + t in words for left in before[t])}
    size = -1
    while len(found) > size:  # a fragment is no word for what stands after it
        size, known = len(found), words | (asked - found)
        found |= {t for t in asked if any(left not in known for left in before[t])}
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", type=Path, nargs="+")
    parser.add_argument("--long", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    pairs = [(m.split()[0], m.split()[1]) for m in bpe.merges() if len(m.split()) == 2]
    shipped = set(re.findall("[a-z]+", (CAPTIONS.read_text("utf-8") + CONCEPTS.read_text("utf-8")).lower()))
    found = find_fragments(bpe.vocabulary(), pairs, read_words(given.dictionary) | shipped, read_words(given.long))
    FRAGMENTS.write_text("\n".join(found) + "\n", encoding="ascii")
    print(f"{len(found)} fragments")


if __name__ == "__main__":
    main()
