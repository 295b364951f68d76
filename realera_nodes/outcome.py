"""What a method made of a model, as jobs, exports and nodes see it, whichever method it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from .core.closed_form import Transform
from .core.concepts import Concept
from .mining import Mined


class Outcome:
    """New minus old weights, and what files and reports say of them.

    Attributes:
        concepts, config: what was asked
        mined: words that went along
        transform: of the closed form, where there is one
        losses: of training, by step, or by concept and step
        method: as in ErasureMetadata
        whole: whether parameters of any kind change, not only projections
    """

    whole = False

    concepts: tuple[Concept, ...]
    config: Any
    mined: Mined
    transform: Transform | None
    losses: Any
    method: str

    def touches(self, name: str) -> bool:
        """Whether a weight changes: a projection by its canonical name, or another parameter by diffusers'."""
        raise NotImplementedError

    def names(self, projections: Iterable[str]) -> list[str]:
        """All weights that change, of a model with these projections."""
        return [n for n in projections if self.touches(n)]

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        """The change of a weight that it ``touches``; None where it stays."""
        raise NotImplementedError

    def deltas(self, projections: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changes of projections (out, d), by canonical name."""
        found = {name: self.delta(name, w) for name, w in projections.items()}
        return {name: d for name, d in found.items() if d is not None}

    def on(self, backend: Any) -> AbstractContextManager[None]:
        """Inside, the backend computes with all changes."""
        return backend.edited(self.deltas(backend.projections()))

    @property
    def anchors(self) -> tuple[str, ...]:
        """What each concept became; empty words where the method aims at nothing that has a name."""
        return tuple(c.anchor for c in self.concepts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the report on what the method does not do."""
        return ()
