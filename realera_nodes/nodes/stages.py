"""The stages of an erasure one by one, as nodes ask for them: mine, edit, train. Values of the pack's sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import erasure
from ..backends.comfy_edits import with_deltas
from ..core.concepts import Concept, check_together
from ..core.errors import ErasureError
from ..core.neighbors import NeighborConfig
from ..core.training import TrainState
from ..erasure import Erasure, ErasureConfig
from ..exports import EditLora, whole_lora
from ..mass import MassErasure
from ..mining import Mined, Progress
from ..uce import UceErasure
from .words import damage


@dataclass(frozen=True)
class NeighborSet:
    """The value of REALERA_NEIGHBORS: concepts, what was mined around them, and for which model."""

    concepts: tuple[Concept, ...]
    config: NeighborConfig
    mined: Mined
    clip: Any
    model_hash: str
    encoder_hash: str


def require_same(neighbors: NeighborSet, backend: Any) -> None:
    """Raises ErasureError where neighbors were mined for another model or text encoder."""
    if neighbors.model_hash != backend.model_hash() or neighbors.encoder_hash != backend.encoder_hash():
        raise ErasureError(
            "the neighbors were mined for another model or text encoder: mine them from the MODEL and CLIP used here."
        )


def chosen(concepts: Sequence[Concept] | None, neighbors: NeighborSet | None) -> tuple[Concept, ...]:
    """The concepts of a node that takes them from either input. Raises ErasureError: none, or both and different."""
    if neighbors is not None:
        if concepts and tuple(concepts) != neighbors.concepts:
            raise ErasureError("the concepts differ from those that the neighbors were mined for: connect neighbors only.")
        return neighbors.concepts
    if not concepts:
        raise ErasureError("nothing to erase is connected: connect concepts or neighbors.")
    check_together(tuple(concepts))
    return tuple(concepts)


def edit(backend: Any, concepts: tuple[Concept, ...], mined: Mined, config: ErasureConfig, progress: Progress) -> Erasure:
    """The closed form alone, over what was mined."""
    transform = erasure.edit(backend, erasure.make_pairs(backend, concepts), concepts, mined, config, progress)
    return Erasure(concepts, config, mined, transform)


def applied(
    model: Any, backend: Any, erasure: MassErasure | UceErasure, weights: Mapping[str, Any], record: Any
) -> tuple[Any, EditLora, str]:
    """An outcome as a patched clone of the model, as one LoRA, and in words. ``weights``: all projections."""
    deltas, lora = erasure.deltas(weights), whole_lora(erasure, weights, weights.__getitem__)
    return with_deltas(model, deltas, record), lora, damage(backend, erasure, deltas, lora)


def train(
    backend: Any, concepts: tuple[Concept, ...], mined: Mined, config: ErasureConfig, deltas: Mapping[str, Any],
    progress: Progress, on_state: Callable[[TrainState], None],
) -> Erasure:  # fmt: skip
    """The noise alignment alone: the backend's model is the teacher, with ``deltas`` it is where the student starts."""
    groups = erasure.make_pairs(backend, concepts)
    runs = erasure.trajectories(backend, groups, concepts, config.alignment, progress)
    factors, state = erasure.align(backend, groups, concepts, mined, config, runs, deltas, progress, on_state=on_state)
    return Erasure(concepts, config, mined, factors=factors, state=state)
