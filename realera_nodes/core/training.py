"""What any training here keeps to go on after a stop: parameters, AdamW's moments, losses and random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class TrainState:
    """All that a stopped training needs to go on."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    generator: Tensor | None = None


def record(
    state: TrainState, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Puts the live tensors of a training into its state, after a step."""
    state.parameters = [p.detach() for p in parameters]
    moments = [optimizer.state[p] for p in parameters if p in optimizer.state]
    state.first, state.second = [m["exp_avg"] for m in moments], [m["exp_avg_sq"] for m in moments]
    state.generator = generator.get_state()


def restore(
    state: TrainState, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Sets a training to where its state was recorded."""
    assert state.generator is not None
    with torch.no_grad():
        for p, saved in zip(parameters, state.parameters, strict=True):
            p.copy_(saved)
    for p, first, second in zip(parameters, state.first, state.second, strict=True):
        optimizer.state[p] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": first.to(p, copy=True),  # a saved state comes back on the CPU
            "exp_avg_sq": second.to(p, copy=True),
        }
    generator.set_state(state.generator)
