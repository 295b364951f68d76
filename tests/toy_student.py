"""A linear toy network for the noise alignment: teacher without, student with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from realera_nodes.core.adapters import Factors, HookAdapters, initial_factors
from realera_nodes.core.alignment import AlignmentConfig, Trajectories, align_noise
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.spans import ErasurePair, TextStates
from realera_nodes.core.training import TrainState

WIDTH, LENGTH, START, SIZE = 12, 6, 2, 4


@dataclass
class Call:
    mode: str
    z: Tensor
    t: Tensor
    text: TextStates
    noise: Tensor


@dataclass
class Toy:
    """noise = z / 10 + a linear function of the mean text state (and of t): teacher without, student with adapters."""

    rank: int = 2
    mode: str = "none"
    calls: list[Call] = field(default_factory=list)
    spoil_after: int = 10**9

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(11)
        self.layer = nn.Linear(WIDTH, 4 * SIZE * SIZE, bias=False).requires_grad_(False)
        self.layer.weight.copy_(torch.randn(self.layer.weight.shape, generator=g))
        shapes = {"attn2.to_k": (4 * SIZE * SIZE, WIDTH)}
        self.adapters = HookAdapters({"attn2.to_k": self.layer}, initial_factors(shapes, self.rank, g))
        self.adapters.attach()

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        noise = z / 10 + self.layer(text.states.mean(1)).reshape(-1, 4, SIZE, SIZE) * (1 + t / 1000)[:, None, None, None]
        if len(self.calls) >= self.spoil_after:
            noise = noise * float("nan")
        self.calls.append(Call(self.mode, z.clone(), t.clone(), text, noise.detach().clone()))
        assert noise.requires_grad == (self.mode == "student" and torch.is_grad_enabled())
        return noise

    @contextmanager
    def _as(self, mode: str, on: bool) -> Iterator[None]:
        self.mode, self.adapters.on = mode, on
        try:
            yield
        finally:
            self.mode, self.adapters.on = "none", False

    def teacher(self):
        return self._as("teacher", False)

    def student(self):
        return self._as("student", True)

    def parameters(self) -> list[nn.Parameter]:
        return self.adapters.parameters()

    def factors(self) -> Factors:
        return self.adapters.factors()


def text(seed: int) -> TextStates:
    return TextStates(torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)), [[seed] * LENGTH])


def pair(seed: int) -> ErasurePair:
    anchor = text(100 + seed)
    return ErasurePair(f"p{seed}", f"p*{seed}", text(seed), anchor, START, START + 1, anchor.states[0])


def run(seed: int, steps: int = 5) -> Trajectories:
    g = torch.Generator().manual_seed(200 + seed)
    return Trajectories(torch.randn(3, steps, 4, SIZE, SIZE, generator=g), torch.arange(steps) * 100 + seed)


PAIRS, RUNS = [pair(0), pair(1)], [run(0), run(1)]
MINING = NeighborConfig(m=10, n=30)
CONFIG = AlignmentConfig(steps=6, lr=1e-2, batch=2)


def train(model: Toy, config: AlignmentConfig = CONFIG, **more) -> TrainState:
    return align_noise(model, PAIRS, RUNS, MINING, config, **more)
