"""Erased Stable Diffusion (ESD): the network learns to steer away from a concept, in its own weights.

    || eps(x_t, c) - [eps0(x_t, "") - eta (eps0(x_t, c) - eps0(x_t, ""))] ||^2

eps is tuned, eps0 frozen, and x_t is what the network itself draws for c, denoised part of the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alignment import join
from .concepts import Concept, check_together
from .errors import ErasureError
from .settings import check_settings, choice, number, prompts, seed
from .spans import TextStates
from .training import TrainState, record, restore

DAMAGED = ("the model predicts NaN or infinite noise: its weights are damaged, or overflow in half precision; "
           "load another file, or compute in float32.")  # fmt: skip
VARIANTS, ORIGINS, DRAWN_BY = ("x", "u"), ("empty", "concept"), ("tuned", "frozen")
LEFT_OUT = ("ends", "norms", "nothing")
#: first parts of the names (diffusers') of what the first code never trains: how time comes in, and what gives the prediction out
ENDS = ("time_embedding", "conv_norm_out", "conv_out")


@dataclass(frozen=True)
class EsdConfig:
    """Settings of ESD. The defaults are the original ones; ``ESD_NEWER`` are those of the later code.

    Attributes:
        variant: "x" trains cross-attention alone, "u" all but cross-attention and what ``left_out`` says
        eta: how far the target lies beyond the origin, away from the concept
        origin: what the target is measured from: "empty", the formula above, or "concept", the later code's
            eps0(c) - eta (eps0(c) - eps0("")), whose eta 2 is the formula's eta 1, and whose eta 0 changes nothing
        steps, lr, batch: of Adam, without decay of weights
        sampling_steps, guidance: how x_t is drawn (DDIM)
        drawn_by: whose x_t: of the "tuned" network, or of the "frozen" one
        clip: largest norm of the gradient; 0 is off
        templates: prompts of a concept; {} is the phrase
        left_out: what of the rest "u" does not train: "ends", the time embedding and the output layers (first code), "norms",
            all normalisation (later code, which trains linear layers and convolutions), or "nothing"
    """

    variant: str = choice("x", VARIANTS)
    eta: float = number(1.0, -100, 100, 0.1)
    origin: str = choice("empty", ORIGINS)
    steps: int = number(1000, 1, 1_000_000)
    lr: float = number(1e-5, 1e-7, 1, 1e-6)
    batch: int = number(1, 1, 64)
    sampling_steps: int = number(50, 1, 999)
    guidance: float = number(3.0, -100, 100, 0.1)
    drawn_by: str = choice("tuned", DRAWN_BY)
    clip: float = number(0.0, 0, 100, 0.1)
    templates: tuple[str, ...] = prompts(("{}",))
    seed: int = seed(0)
    left_out: str = choice("ends", LEFT_OUT)

    def __post_init__(self) -> None:
        check_settings(self)

    def trains(self, name: str) -> bool:
        """Whether a parameter of this (diffusers) name is trained."""
        parts = name.split(".")
        if self.variant == "x" or "attn2" in parts:
            return ("attn2" in parts) == (self.variant == "x")
        if self.left_out == "ends":
            return parts[0] not in ENDS
        return self.left_out == "nothing" or not any("norm" in part for part in parts)


ESD_ORIGINAL = EsdConfig()
ESD_NEWER = EsdConfig(eta=2.0, origin="concept", steps=200, lr=5e-5, drawn_by="frozen", left_out="norms")


def esd_prompts(concepts: Sequence[Concept], config: EsdConfig) -> list[str]:
    """Every phrase of every concept in every template. ErasureError: concepts contradict each other."""
    check_together(tuple(concepts))
    return [template.format(phrase) for c in concepts for phrase in c.phrases for template in config.templates]


class Predictor(Protocol):
    """A model that tells noise from latents."""

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        """eps (B, 4, h, w), for eps- and v-models alike."""


class FullStudent(Predictor, Protocol):
    """What ESD needs of a model: one network that predicts inside ``frozen`` or ``tuned``.

    Attributes:
        latent_shape: (4, h, w) of one latent
        loss_scale: what the loss is multiplied by, so that gradients stay in the range of half precision
    """

    latent_shape: tuple[int, ...]
    loss_scale: float

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """DDIM's timesteps (S,) int64, noisiest first, and the share of signal alpha_bar (S,) at each, on the CPU."""

    def frozen(self) -> AbstractContextManager[None]:
        """The original weights."""

    def tuned(self) -> AbstractContextManager[None]:
        """The weights in training, as they are on entering; with gradients if they are on."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, always in the same order."""


def esd_loss(tuned: Tensor, concept: Tensor, empty: Tensor, eta: float, origin: str = "empty") -> Tensor:
    """||eps(c) - [o - eta (eps0(c) - eps0(""))]||^2, mean over elements; o is eps0("") or eps0(c)."""
    start = empty if origin == "empty" else concept
    target = start - eta * (concept - empty)
    return F.mse_loss(tuned.float(), target.float())


def train_esd(
    model: FullStudent,
    concepts: TextStates,
    empty: TextStates,
    config: EsdConfig,
    on_step: Callable[[TrainState], None] | None = None,
    state: TrainState | None = None,
    on_denoise: Callable[[int, int], None] | None = None,
) -> TrainState:
    """Trains the model's weights. ``concepts``: one row for each prompt that is erased; ``empty``: the empty prompt's.

    Every step draws a moment of denoising and, for each of the batch, a prompt and start noise. ``on_step`` is called after
    every step, ``on_denoise(done, total)`` before each denoising step on the way to x_t (up to ``sampling_steps`` of them a
    training step): what either raises ends the training, and ``state``, if given, goes on from the last whole step. The
    state's tensors are the live ones: copy to keep them.

    Raises:
        ErasureError: the loss is not finite, the model is damaged, or its schedule begins without any signal.
    """
    state = state or TrainState()
    parameters = model.parameters()
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    generator = torch.Generator().manual_seed(config.seed)
    if state.step:
        restore(state, parameters, optimizer, generator)
    timesteps, alphas = model.schedule(config.sampling_steps)
    if not float(alphas.min()) > 0:
        raise ErasureError(
            "the model's noise schedule begins with pure noise (zero terminal SNR), from which no noise prediction leads on: "
            "choose a method without sampling, such as UCE."
        )
    while state.step < config.steps:
        until = int(torch.randint(len(timesteps), (1,), generator=generator))
        chosen = torch.randint(len(concepts), (config.batch,), generator=generator).tolist()
        noise = torch.randn(config.batch, *model.latent_shape, generator=generator)
        text, nothing = join([concepts[i] for i in chosen]), join([empty] * config.batch)
        with torch.no_grad(), model.tuned() if config.drawn_by == "tuned" else model.frozen():
            z = partly_denoised(model, noise, text, nothing, timesteps[: until + 1], alphas, config.guidance, on_denoise)
        t = timesteps[until].expand(config.batch)
        with torch.no_grad(), model.frozen():
            # one at a time: in a batch of another size rounding differs, and Adam takes whole steps along rounding errors
            concept, unprompted = (model.predict_noise(z, t, x) for x in (text, nothing))
        with model.tuned():
            loss = esd_loss(model.predict_noise(z, t, text), concept, unprompted, config.eta, config.origin)
            if not torch.isfinite(loss):
                if not (state.step or torch.isfinite(concept + unprompted).all()):  # nothing was trained yet
                    raise ErasureError(DAMAGED)
                now = f"lower lr (now {config.lr:g}) or eta (now {config.eta:g})"
                raise ErasureError(f"the loss is not finite at step {state.step + 1}: {now}.")
            (loss * model.loss_scale).backward()
        _unscale(parameters, model.loss_scale)
        if config.clip:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.losses.append(float(loss.detach()))
        record(state, parameters, optimizer, generator)
        if on_step:
            on_step(state)
    return state


def _unscale(parameters: Sequence[nn.Parameter], scale: float) -> None:
    """Takes the loss's scale off the gradients. ErasureError: they overflowed."""
    if scale == 1:
        return
    for p in parameters:
        if p.grad is not None:
            if not torch.isfinite(p.grad).all():
                raise ErasureError("the gradients overflow half precision: compute in float32 or bfloat16, or lower batch.")
            p.grad.div_(scale)


def denoised(
    model: Predictor, noise: Tensor, text: TextStates, empty: TextStates, timesteps: Tensor, alphas: Tensor, guidance: float
) -> Tensor:  # fmt: skip
    """DDIM all the way: clean latents (B, 4, h, w) from ``noise`` at the first of ``timesteps``."""
    ends = torch.cat([timesteps, timesteps.new_zeros(1)]), torch.cat([alphas, alphas.new_ones(1)])
    return partly_denoised(model, noise, text, empty, *ends, guidance)


def partly_denoised(
    model: Predictor, noise: Tensor, text: TextStates, empty: TextStates, timesteps: Tensor, alphas: Tensor,
    guidance: float, on_denoise: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """DDIM from ``noise`` (B, 4, h, w) at the first of ``timesteps`` to the last: x_t (B, 4, h, w) there.

    With eps = eps("") + guidance (eps(c) - eps("")), each step is the deterministic
    x <- sqrt(a') (x - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps.
    """
    z, total = noise, len(timesteps) - 1
    for i in range(total):
        if on_denoise:
            on_denoise(i, total)
        t = timesteps[i].expand(len(z))
        both = model.predict_noise(torch.cat([z, z]), torch.cat([t, t]), join([text, empty]))
        concept, nothing = both.chunk(2)
        eps = nothing + guidance * (concept - nothing)
        a, b = float(alphas[i]), float(alphas[i + 1])
        clean = (z.to(eps) - math.sqrt(1 - a) * eps) / math.sqrt(a)
        z = math.sqrt(b) * clean + math.sqrt(1 - b) * eps
    return z
