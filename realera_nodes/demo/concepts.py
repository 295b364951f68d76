"""The concepts of the embedded model, read from concepts.json (the one place where they are written)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).parent / "concepts.json"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class DemoConcept:
    """One concept. Only ``name`` may reach an eraser; the rest measures what an erasure missed."""

    name: str
    slug: str  # of its drawing in the icon sets
    kind: str  # "object" or "person"
    synonyms: tuple[str, ...]  # trained; generality (Acc_g) is measured over them
    associated: tuple[str, ...]  # trained; residue is measured over them
    unseen: tuple[str, ...]  # in no training caption

    @property
    def trained(self) -> tuple[str, ...]:
        """Every phrase that the model was trained to draw as this concept."""
        return (self.name, *self.synonyms, *self.associated)


@lru_cache
def demo_concepts() -> tuple[DemoConcept, ...]:
    rows = json.loads(FILE.read_text(encoding="utf-8"))["concepts"]
    return tuple(
        DemoConcept(r["name"], r["slug"], r["kind"], tuple(r["synonyms"]), tuple(r["associated"]), tuple(r["unseen"]))
        for r in rows
    )


def eraser_inputs() -> tuple[str, ...]:
    """All that an eraser or a benchmark's erasing side may be told of the embedded model: the concepts' names."""
    return tuple(c.name for c in demo_concepts())
