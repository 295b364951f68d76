"""Text widgets to concepts and settings."""

from __future__ import annotations

import re
from typing import Any

from ..core.concepts import Concept, Preserved
from ..core.errors import ErasureError
from ..core.phrases import phrase_of, spelled
from ..core.settings import range_of, require

_WEIGHTED = re.compile(r"(?P<phrase>.*\S)\s*:\s*(?P<weight>[0-9]*\.?[0-9]+)")


def lines(text: str) -> tuple[str, ...]:
    """Lines that are not empty, without surrounding spaces."""
    return tuple(line for line in (part.strip() for part in text.splitlines()) if spelled(line))


def ends(text: str) -> tuple[str, ...]:
    """Ends of layers' names, with commas between."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def targets_refusal(targets: str | None) -> bool | str:
    """True, or the sentence for a list of layers that is empty; one that is wired up (None) is known later only."""
    empty = targets is not None and not ends(targets)
    return "targets is empty: name at least one projection, such as attn2.to_v." if empty else True


def preserved(text: str) -> tuple[Preserved, ...]:
    """One phrase a line, ``phrase`` or ``phrase: weight``. Raises ErasureError: a weight of 0."""
    found = []
    for line in lines(text):
        match = _WEIGHTED.fullmatch(line)
        found.append(Preserved(match["phrase"], float(match["weight"])) if match else Preserved(line))
    return tuple(found)


def concept(phrase: str, anchor: str, kind: str, aliases: str = "", preserve: str = "", templates: str = "") -> Concept:
    """A concept from a node's widgets. Raises ErasureError: see ``Concept``."""
    return Concept(phrase, anchor, kind, lines(aliases), preserved(preserve), lines(templates) or None)


def words(text: str) -> tuple[str, ...]:
    """Phrases, one a line. Raises ErasureError: one that is none."""
    return tuple(phrase_of(line, "a phrase is empty: write words.") for line in lines(text))


def within(config: type, **given: float) -> None:
    """Raises ErasureError for inputs outside of their settings' ranges: of those that are wired up the host checks nothing."""
    for name, value in given.items():
        require(name, value, range_of(config, name))


def refusal(config: type, **given: Any) -> bool | str:
    """True, or what a config says against its widgets' values; those that are wired up (None) are known later only."""
    values = {k: lines(v) if k == "templates" else v for k, v in given.items() if v is not None}
    try:
        config(**values)
    except ErasureError as error:
        return str(error)
    return True
