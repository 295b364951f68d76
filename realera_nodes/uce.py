"""UCE (core.uce) on a backend: one closed form, seconds, no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from .core.adapters import Factors
from .core.closed_form import LowRank, Transform
from .core.concepts import Concept, Preserved
from .core.uce import UceConfig, uce
from .mining import Mined, Progress, silent
from .outcome import Outcome


@dataclass
class UceErasure(Outcome):
    """What UCE made: W0 becomes W0 + strength W0 (T - I)."""

    concepts: tuple[Concept, ...]
    config: UceConfig
    transform: Transform
    mined: Mined = field(default_factory=Mined)
    factors: Factors = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    method = "uce"

    @cached_property
    def low_rank(self) -> LowRank:
        """strength (T - I) as thin factors."""
        found = self.transform.low_rank()
        return replace(found, left=self.config.strength * found.left)

    def edits(self, name: str) -> bool:
        """Whether a projection of this name changes."""
        return name.endswith(("attn2.to_k", "attn2.to_v")) and self.config.edits(name)

    def touches(self, name: str) -> bool:
        return self.edits(name)

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        return self.transform.delta(weight, self.config.strength) if self.edits(name) else None

    @property
    def anchors(self) -> tuple[str, ...]:
        """Each concept's own, or the guide for all; the empty prompt has no name."""
        return super().anchors if self.config.to_anchor else (self.config.guide.strip(),) * len(self.concepts)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.config.to_anchor:
            return ()
        guide = f'"{self.config.guide.strip()}"' if self.config.guide.strip() else "the empty prompt"
        return (f"Every concept became {guide}, the guide; anchors were not used.",)


def erase_uce(
    backend: Any, concepts: Sequence[Concept], config: UceConfig, retained: Sequence[Preserved] = (), progress: Progress = silent
) -> UceErasure:
    """Erases concepts; ``retained`` are kept beside what the concepts themselves preserve. The model is left as it is.

    Raises:
        ErasureError: contradictory concepts, settings that admit nothing, a damaged text encoder.
    """
    kept = keeping(concepts, retained)
    progress("closed form", 0, 1)
    transform = uce(backend.encode, backend.phrase_ids, kept, config, backend.context_width)
    progress("closed form", 1, 1)
    return UceErasure(kept, config, transform)


def keeping(concepts: Sequence[Concept], retained: Sequence[Preserved]) -> tuple[Concept, ...]:
    """Concepts that carry what is to be kept; the closed forms take each phrase once."""
    return tuple(replace(c, preserve=(*c.preserve, *retained)) for c in concepts)
