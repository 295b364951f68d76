"""Low-rank adapters as forward hooks: on is the student, off the frozen teacher, one resident network.

Hooks leave modules and weights alone, so they also suit hosts that quantise, offload or share a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]


class AdapterSettings(Protocol):
    """What a training's config says of its adapters. ``scale`` is alpha / rank; ``targets`` are ends of projections' names."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

    @property
    def scale(self) -> float: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def seed(self) -> int: ...


def initial_factors(shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator) -> Factors:
    """down (r, in) ~ N(0, 1/r^2), up (out, r) = 0, for each name's (out, in), drawn in the order of names.

    The Gaussian is RealEra's (section 3.2); its deviation is MACE's. peft's Kaiming default is about 25 times smaller at
    width 768, and 200 steps at the paper's rate hardly move it.
    """
    return {
        name: (torch.randn(rank, n_in, generator=generator) / rank, torch.zeros(n_out, rank))
        for name, (n_out, n_in) in sorted(shapes.items())
    }


def merged(factors: Factors, name: str) -> Tensor:
    """up @ down, (out, in)."""
    down, up = factors[name]
    return up @ down


class HookAdapters:
    """LoRA on linear modules by forward hooks: W x + scale up down x."""

    def __init__(self, modules: Mapping[str, nn.Module], factors: Factors, scale: float = 1.0):
        self.scale = scale
        self.parts = {
            name: (nn.Parameter(factors[name][0].clone()), nn.Parameter(factors[name][1].clone())) for name in sorted(modules)
        }
        self.modules = dict(modules)
        self.on = False
        self.handles: list = []

    def parameters(self) -> list[nn.Parameter]:
        return [p for pair in self.parts.values() for p in pair]

    def attach(self) -> None:
        """Hooks the modules; attached once, however often it is called."""
        self.remove()
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, name: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.on:
                return None
            down, up = self.parts[name]
            x = inputs[0]
            return output + (self.scale * ((x.to(down) @ down.T) @ up.T)).to(output)

        return add

    @contextmanager
    def enabled(self) -> Iterator[None]:
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before

    def factors(self) -> Factors:
        return {name: (down.detach().clone(), up.detach().clone()) for name, (down, up) in self.parts.items()}

    def load(self, factors: Factors) -> None:
        with torch.no_grad():
            for name, (down, up) in self.parts.items():
                down.copy_(factors[name][0])
                up.copy_(factors[name][1])
