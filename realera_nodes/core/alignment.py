"""RealEra's prediction noise alignment: a LoRA that draws the concept's noise to the anchor's (Eq. 8-9, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Factors
from .errors import ErasureError
from .neighbors import NeighborConfig, sample_neighbors
from .settings import check_settings, layers, number, seed
from .spans import ErasurePair, TextStates
from .training import TrainState, record, restore


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of Eq. 8-9. Steps and rate are the paper's; rank, batch and the rest it leaves open.

    Attributes:
        steps: optimiser steps (paper: 200 "epochs")
        lr: AdamW's rate (paper: 1e-5, which moves the embedded model's output by next to nothing in 200 steps)
        rank, alpha: of the LoRA; alpha 0 means alpha = rank
        targets: projections that get adapters, by the end of their name
        batch: noisy latents per step
        accumulate: steps whose gradients are summed before an update
        neighbors: even steps train on perturbed concepts (Eq. 9); without, every step is Eq. 8
        beyond: Eq. 9's second term, which keeps what lies outside of the neighborhood
        gamma_1, gamma_2: weights of Eq. 9's two terms (paper: 0.3 and 0.7, meaning not given)
        clip: largest norm of the gradient; 0 is off
        patience: stop when the held-out loss has not fallen for so many checks; 0 is off
        check_every: steps between checks
        trajectories, trajectory_steps, guidance: how z_t is made, from the anchor's prompts under the original model
    """

    steps: int = number(200, 1, 1_000_000)
    lr: float = number(1e-4, 1e-7, 1, 1e-6)
    rank: int = number(4, 1, 320)
    alpha: float = number(0.0, 0, 1024, 0.5)
    targets: tuple[str, ...] = layers(("attn2.to_k", "attn2.to_v"))
    batch: int = number(2, 1, 64)
    accumulate: int = number(1, 1, 64)
    neighbors: bool = True
    beyond: bool = True
    gamma_1: float = number(0.3, 0, 10)
    gamma_2: float = number(0.7, 0, 10)
    weight_decay: float = number(0.01, 0, 1, 0.001)
    clip: float = number(1.0, 0, 100, 0.1)
    patience: int = number(0, 0, 1000)
    check_every: int = number(20, 1, 1000)
    trajectories: int = number(4, 1, 64)
    trajectory_steps: int = number(20, 1, 1000)
    guidance: float = number(5.0, 0, 100, 0.1)
    seed: int = seed(0)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (self.alpha or self.rank) / self.rank


@dataclass(frozen=True)
class Trajectories:
    """Latents of sampling runs at every step: latents (K, S, 4, h, w), timesteps (S,), one run a row."""

    latents: Tensor
    timesteps: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` random (z_t, t): (count, 4, h, w), (count,)."""
        k = torch.randint(len(self.latents), (count,), generator=generator)
        s = torch.randint(len(self.timesteps), (count,), generator=generator)
        return self.latents[k, s], self.timesteps[s]


class Student(Protocol):
    """What training needs of a model: one network that is teacher or student by turns."""

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor: ...

    def teacher(self) -> AbstractContextManager[None]:
        """The original weights, adapters off."""

    def student(self) -> AbstractContextManager[None]:
        """The edited weights, adapters on."""

    def parameters(self) -> list[nn.Parameter]: ...

    def factors(self) -> Factors: ...


def noise_alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||eps(z_t, t, p) - eps_hat(z_t, t, p*)||^2, mean over elements (Eq. 8)."""
    return F.mse_loss(student.float(), teacher.float())


def align_noise(
    model: Student,
    pairs: Sequence[ErasurePair],
    trajectories: Sequence[Trajectories],
    mining: NeighborConfig,
    config: AlignmentConfig,
    on_step: Callable[[TrainState], None] | None = None,
    state: TrainState | None = None,
    kept: TextStates | None = None,
    near: Sequence[ErasurePair] = (),
    near_trajectories: Sequence[Trajectories] = (),
) -> TrainState:
    """Trains the model's adapters. ``trajectories[i]`` belongs to ``pairs[i]``'s anchor.

    Odd steps map the concept's prompt to the anchor's (Eq. 8); even steps map fresh neighbors and keep fresh
    beyond-concept samples (Eq. 9). ``kept`` are further prompts to keep (the user's preserved concepts), drawn in
    turn with the beyond-concept samples, and ``near`` named neighbors, drawn in turn with the random ones. ``on_step`` is
    called after every step; what it raises ends the training. The state's tensors are the live ones: copy to keep them.

    Raises:
        ErasureError: the loss is not finite.
    """
    state = state or TrainState()
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    if state.step:
        restore(state, parameters, optimizer, generator)
    one = replace(mining, m=1, n=int(config.beyond))
    while state.step < config.steps:
        odd = state.step % 2 == 0 or not config.neighbors  # Algorithm 1 counts from 1
        total = 0.0
        for _ in range(config.accumulate):
            if odd:
                loss = concept_loss(model, pairs, trajectories, config, generator)
            else:
                loss = neighbor_loss(model, pairs, trajectories, one, config, generator, kept, near, near_trajectories)
            loss = loss / config.accumulate
            if not torch.isfinite(loss):
                raise ErasureError(f"the loss is not finite at step {state.step + 1}: lower lr (now {config.lr:g}).")
            loss.backward()
            total += float(loss.detach())
        if config.clip:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.losses.append(total)
        record(state, parameters, optimizer, generator)
        if config.patience and state.step % config.check_every == 0:
            state.held.append(_held_loss(model, pairs, trajectories, config))
        if on_step:
            on_step(state)
        if config.patience and state.held and len(state.held) - 1 - state.held.index(min(state.held)) >= config.patience:
            break
    return state


def _draw(pairs, trajectories, config, generator) -> tuple[list[int], Tensor, Tensor]:
    """A batch: which pairs, and a noisy latent of each one's anchor."""
    chosen = torch.randint(len(pairs), (config.batch,), generator=generator).tolist()
    draws = [trajectories[i].draw(1, generator) for i in chosen]
    return chosen, torch.cat([d[0] for d in draws]), torch.cat([d[1] for d in draws])


def concept_loss(model: Student, pairs, trajectories, config: AlignmentConfig, generator: torch.Generator) -> Tensor:
    """Eq. 8: the concept's prompt under the student, the anchor's under the teacher."""
    chosen, z, t = _draw(pairs, trajectories, config, generator)
    with model.teacher(), torch.no_grad():
        target = model.predict_noise(z, t, join([pairs[i].anchor for i in chosen]))
    with model.student():
        return noise_alignment_loss(model.predict_noise(z, t, join([pairs[i].text for i in chosen])), target)


def neighbor_loss(
    model: Student, pairs, trajectories, one: NeighborConfig, config: AlignmentConfig, generator: torch.Generator,
    kept: TextStates | None, near: Sequence[ErasurePair], near_trajectories: Sequence[Trajectories],
) -> Tensor:  # fmt: skip
    """Eq. 9: fresh neighbors to the anchor (weight gamma_1), fresh beyond-concept samples kept (gamma_2)."""

    def heads() -> bool:
        return float(torch.rand(1, generator=generator)) < 0.5

    named = bool(near) and heads()
    source, runs = (near, near_trajectories) if named else (pairs, trajectories)
    chosen, z, t = _draw(source, runs, config, generator)
    samples = [sample_neighbors(source[i], one, generator) for i in chosen]
    erased = [source[i].text if named else _with(source[i].text, s.neighbors) for i, s in zip(chosen, samples, strict=True)]
    asked, targets = erased, [source[i].anchor for i in chosen]
    if config.beyond:
        away = [
            kept[int(torch.randint(len(kept), (1,), generator=generator))]
            if kept is not None and heads()
            else _with(source[i].text, s.beyond)
            for i, s in zip(chosen, samples, strict=True)
        ]
        asked, targets, z, t = asked + away, targets + away, torch.cat([z, z]), torch.cat([t, t])
    with model.teacher(), torch.no_grad():
        target = model.predict_noise(z, t, join(targets))
    with model.student():
        predicted = model.predict_noise(z, t, join(asked))
    n = config.batch
    loss = config.gamma_1 * noise_alignment_loss(predicted[:n], target[:n])
    if config.beyond:
        loss = loss + config.gamma_2 * noise_alignment_loss(predicted[n:], target[n:])
    return loss


def _held_loss(model, pairs, trajectories, config) -> float:
    """Eq. 8 on fixed draws that training does not choose: a generator of its own."""
    generator = torch.Generator().manual_seed((config.seed + 1_000_003) % 2**64)
    with torch.no_grad():
        return float(torch.stack([concept_loss(model, pairs, trajectories, config, generator) for _ in range(8)]).mean())


def _with(text: TextStates, states: Tensor) -> TextStates:
    return TextStates(states[:1], text.ids, text.pooled)


def join(texts: Sequence[TextStates]) -> TextStates:
    """One batch of several."""
    pooled = [t.pooled for t in texts]
    return TextStates(
        torch.cat([t.states for t in texts]),
        [row for t in texts for row in t.ids],
        torch.cat([p for p in pooled if p is not None]) if all(p is not None for p in pooled) else None,
    )
