"""Which concepts of the embedded model are for choosing defaults and which for reporting, from splits.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from ...core.concepts import Concept
from ...core.errors import ErasureError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: splits that one concept at a time is erased of
SPLITS = ("tuning", "test")


@dataclass(frozen=True)
class Split:
    """Concepts to erase, without anything that measures them, and names of further concepts that must stay."""

    name: str
    concepts: tuple[Concept, ...]
    others: tuple[str, ...]


@lru_cache
def table(file: str) -> dict[str, Any]:
    """A data file of this folder."""
    return tomllib.loads((files(__package__) / file).read_text(encoding="utf-8"))


def load_split(name: str) -> Split:
    """The split of a name. ErasureError: there is none."""
    splits = table("splits.toml")
    if name not in splits:
        raise ErasureError(f'there is no split "{name}": choose one of {", ".join(SPLITS)}.')
    rows = splits[name]["concepts"]
    concepts = tuple(Concept(row["name"], row["anchor"], row.get("kind", "object")) for row in rows)
    return Split(name, concepts, tuple(splits[name]["others"]))
