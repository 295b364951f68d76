"""Text widgets to concepts."""

from __future__ import annotations

import re

from ..core.concepts import Concept, Preserved

_WEIGHTED = re.compile(r"(?P<phrase>.*\S)\s*:\s*(?P<weight>[0-9]*\.?[0-9]+)")


def lines(text: str) -> tuple[str, ...]:
    """Lines that are not empty, without surrounding spaces."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def preserved(text: str) -> tuple[Preserved, ...]:
    """One phrase a line, ``phrase`` or ``phrase: weight``. Raises ErasureError: a weight of 0."""
    found = []
    for line in lines(text):
        match = _WEIGHTED.fullmatch(line)
        found.append(Preserved(match["phrase"], float(match["weight"])) if match else Preserved(line))
    return tuple(found)


def concept(phrase: str, anchor: str, kind: str, aliases: str = "", preserve: str = "", templates: str = "") -> Concept:
    """A concept from a node's widgets. Raises ErasureError: see ``Concept``."""
    return Concept(phrase.strip(), anchor.strip(), kind, lines(aliases), preserved(preserve), lines(templates) or None)
