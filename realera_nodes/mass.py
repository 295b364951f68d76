"""Many concepts at once: MACE, and RealEra inside MACE's frame.

1. Refinement: one closed form over all concepts (core.refinement). ``realera-mass`` adds what was mined around each.
2. A LoRA for each concept, trained alone from the refined weights: by attention suppression (MACE Eq. 3) or by noise
   alignment (RealEra Eq. 8-9, ``realera-mass``). Finished ones are kept on a shelf, so that a stopped run goes on.
3. Fusion of all LoRAs in one closed form (core.fusion), one after the other: memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .core.adapters import Factors, merged
from .core.closed_form import LowRank, Transform
from .core.concepts import Concept, Preserved
from .core.fusion import naive_sum
from .core.training import TrainState
from .mass_config import MassConfig
from .mass_work import Work, fuse, train_concept
from .mining import Mined, Progress, silent
from .outcome import Outcome
from .priors import Prior
from .resume import Answers


class Shelf(Protocol):
    """Where finished concepts wait: a folder, or nothing at all."""

    def load(self, concept: Concept) -> Factors | None: ...

    def save(self, concept: Concept, factors: Factors) -> None: ...


class NoShelf:
    """Keeps nothing: every run starts anew."""

    def load(self, concept: Concept) -> Factors | None:
        return None

    def save(self, concept: Concept, factors: Factors) -> None:
        pass


@dataclass
class MassErasure(Outcome):
    """What a mass erasure made: W0 becomes W0 + W0 (T - I) + up @ down.

    Attributes:
        transform: the closed forms' part; factors: the LoRAs' part
        trained: concepts whose LoRA was trained in this run; the others came from the shelf
        losses: by concept, of the LoRAs that were trained in this run
        condition: of the fusion's matrix, or of the refinement's
    """

    concepts: tuple[Concept, ...]
    config: MassConfig
    retained: tuple[Preserved, ...] = ()
    mined: Mined = field(default_factory=Mined)
    transform: Transform | None = None
    factors: Factors = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def method(self) -> str:  # type: ignore[override]
        return self.config.method

    @cached_property
    def low_rank(self) -> LowRank | None:
        """T - I as thin factors."""
        return self.transform.low_rank() if self.transform is not None else None

    def edits(self, name: str) -> bool:
        """Whether the closed form changes a projection of this name."""
        return self.transform is not None and name.endswith(("attn2.to_k", "attn2.to_v"))

    def touches(self, name: str) -> bool:
        """Whether a projection of this name changes."""
        return self.edits(name) or name in self.factors

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        """The change of one projection (out, d); None where it stays."""
        total = self.transform.delta(weight) if self.transform is not None and self.edits(name) else None
        if name in self.factors:
            lora = merged(self.factors, name).to(weight.device)
            total = lora if total is None else total + lora
        return total


def erase_many(
    backend: Any, concepts: Sequence[Concept], config: MassConfig, retained: Sequence[Preserved] = (),
    progress: Progress = silent, shelf: Shelf | None = None, prior: Prior | None = None,
    on_state: Callable[[Concept, TrainState], None] = lambda concept, state: None, answers: Answers | None = None,
) -> MassErasure:  # fmt: skip
    """Erases all concepts. The model is left as it is; the result says how its weights change.

    ``on_state`` is called after every step of each concept's training; ``answers`` are a stopped run's.

    Raises:
        ErasureError: contradictory lists, settings that admit nothing, a damaged model.
    """
    work = Work(backend, tuple(concepts), tuple(retained), config, progress, prior, answers=answers)
    result = MassErasure(work.concepts, config, work.retained, work.mined)
    if config.fusion == "none":
        result.transform = work.refinement
        return result
    loras = train_missing(work, result, shelf or NoShelf(), on_state)
    result.transform, result.factors = combine(work, loras, work.refinement)
    return result


def combine(
    work: Work, loras: Iterable[tuple[Concept, Factors]], refinement: Transform | None
) -> tuple[Transform | None, Factors]:
    """LoRAs that were trained on ``refinement`` as one edit, by the work's own fusion; one of them at a time is in memory."""
    if work.config.fusion == "sum":
        return refinement, summed(work.backend, loras)
    fused = fuse(work, loras, refinement)
    return fused.transform, fused.factors


def train_missing(
    work: Work, result: MassErasure, shelf: Shelf, on_state: Callable[[Concept, TrainState], None]
) -> Iterator[tuple[Concept, Factors]]:
    """Each concept's LoRA, from the shelf or trained now; one at a time is in memory."""
    total = len(work.concepts)
    for i, concept in enumerate(work.concepts):
        factors = shelf.load(concept)
        if factors is None:
            factors, state = train_concept(work, i, partial(on_state, concept))
            shelf.save(concept, factors)
            result.trained.append(concept.phrase)
            result.losses[concept.phrase] = list(state.losses)
        work.progress("concepts", i + 1, total)
        yield concept, factors


def summed(backend: Any, loras: Iterable[tuple[Concept, Factors]]) -> Factors:
    """The LoRAs' plain sum at full strength (MACE Eq. 6 without its division), the ablation of fusion."""
    shapes = {name: tuple(w.shape) for name, w in backend.projections().items()}
    return _thin(naive_sum(((factors, 1.0) for _, factors in loras), shapes, normalise=False))


def _thin(deltas: dict[str, Tensor]) -> Factors:
    """Full deltas as factors: exact, with an identity on the smaller side."""
    return {n: (d, torch.eye(len(d))) if d.shape[0] <= d.shape[1] else (torch.eye(d.shape[1]), d) for n, d in deltas.items()}
