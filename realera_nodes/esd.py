"""ESD (core.esd) on a backend: training of whole weights, of cross-attention (x) or of all else (u)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .backends.full_weights import esd
from .core.concepts import Concept
from .core.esd import EsdConfig
from .core.training import TrainState
from .mining import Mined, Progress, silent
from .outcome import Outcome


@dataclass
class EsdErasure(Outcome):
    """What ESD learned: differences of parameters by diffusers' name."""

    concepts: tuple[Concept, ...]
    config: EsdConfig
    weights: dict[str, Tensor]
    losses: list[float]
    mined: Mined = field(default_factory=Mined)
    transform: None = None
    whole = True

    @property
    def method(self) -> str:  # type: ignore[override]
        return f"esd-{self.config.variant}"

    def touches(self, name: str) -> bool:
        return name in self.weights

    def names(self, projections: Iterable[str]) -> list[str]:
        return list(self.weights)

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        return self.weights.get(name)

    def deltas(self, projections: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The projections' part; of ESD-u there is none."""
        return {name: self.weights[f"{name}.weight"] for name in projections if f"{name}.weight" in self.weights}

    def on(self, backend: Any) -> AbstractContextManager[None]:
        return backend.edited(self.weights)

    @property
    def anchors(self) -> tuple[str, ...]:
        """ESD leads away from a concept, to nothing that has a name."""
        return ("",) * len(self.concepts)

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"ESD-{self.config.variant} changes whole weights, which no LoRA holds exactly: only the checkpoint carries it.",
            "ESD leads away from a concept and keeps nothing by name: anchors and preserved phrases were for this report alone.",
        )


def erase_esd(
    backend: Any, concepts: Sequence[Concept], config: EsdConfig, progress: Progress = silent,
    state: TrainState | None = None, on_state: Callable[[TrainState], None] | None = None,
) -> EsdErasure:  # fmt: skip
    """Erases concepts. The model is left as it is; ``state`` goes on from a stopped run's last whole step.

    Raises:
        ErasureError: contradictory concepts, a loss that is not finite, or a model that ESD cannot train.
    """

    def on_step(now: TrainState) -> None:
        progress("training", now.step, config.steps)
        if on_state:
            on_state(now)

    done = state.step if state else 0
    progress("training", done, config.steps)
    weights, trained = esd(backend, concepts, config, on_step, state)
    return EsdErasure(tuple(concepts), config, weights, list(trained.losses))
