"""MACE's concept LoRA: pictures of a concept stop looking at its words (Eq. 3-5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .alignment import Student, join
from .attention import AttentionMaps, concept_map, layer_size, resized
from .concept_prompts import ConceptPrompts, Encode, PhraseIds, concept_prompts
from .errors import ErasureError
from .settings import check_settings, choice, layers, number, seed
from .spans import TextStates
from .timesteps import draw, focal_density, uniform_density
from .training import TrainState, record, restore

MASKS = ("attention", "given", "none")
#: noise levels at which the model's own attention is looked at for a mask: shapes stand, details do not yet
MASK_TIMES = (150, 300, 450)


@dataclass(frozen=True)
class SuppressionConfig:
    """Settings of Eq. 3-5. Steps, rates, rank and timesteps are the paper's (Table 10, section 3.2).

    Attributes:
        steps: optimiser steps (explicit content: 120)
        lr: AdamW's rate (paper: 1e-4 for persons and styles, 1e-5 for objects and explicit content)
        rank, alpha: of the LoRA; alpha 0 means alpha = rank
        targets: projections that get adapters, by the end of their name
        batch: noisy pictures per step
        clip: largest norm of the gradient; 0 is off
        cfis: draw timesteps by concept-focal importance sampling (Eq. 5); off, uniformly (explicit content)
        t1, t2, gamma: of Eq. 5
        images, image_steps, guidance: pictures of the concept that the model draws for its training
        prompts: prompts of the concept, at most, of which each noisy picture is asked by a random one, whatever it was drawn
            by (public code: 30); 1 is the picture's own
        mask: where attention is suppressed: "attention" is the model's own, thresholded; "given" comes with the pictures;
            "none" is the whole picture
        mask_threshold: a pixel is in the model's own mask if its attention to the phrase's tokens, averaged over layers,
            heads and MASK_TIMES, is at least this share of the way from the picture's lowest to its highest
        tail: suppress the end token and all padding too, as the public code does; they hold the concept as well
        squared: sum of squares, as Eq. 3 is written; off, the norm of each layer, as the public code has it
    """

    steps: int = number(50, 1, 1_000_000)
    lr: float = number(1e-4, 1e-7, 1, 1e-6)
    rank: int = number(1, 1, 320)
    alpha: float = number(0.0, 0, 1024, 0.5)
    targets: tuple[str, ...] = layers(("attn2.to_k", "attn2.to_v"))
    batch: int = number(1, 1, 64)
    weight_decay: float = number(0.01, 0, 1, 0.001)
    clip: float = number(1.0, 0, 100, 0.1)
    cfis: bool = True
    t1: float = number(200.0, 0, 1000, 1)
    t2: float = number(400.0, 0, 1000, 1)
    gamma: float = number(0.05, 0.001, 10, 0.001)
    images: int = number(8, 1, 64)
    image_steps: int = number(30, 1, 1000)
    guidance: float = number(7.5, 0, 100, 0.1)
    mask: str = choice("attention", MASKS)
    mask_threshold: float = number(0.4, 0.01, 0.99)
    tail: bool = True
    squared: bool = False
    seed: int = seed(0)
    prompts: int = number(30, 1, 30)

    def __post_init__(self) -> None:
        check_settings(self)
        focal_density(self.t1, self.t2, self.gamma)

    @classmethod
    def for_kind(cls, kind: str, **changes: Any) -> SuppressionConfig:
        """The paper's settings for a kind of concept. A style has no place in a picture, so that its mask is none: ours."""
        if kind not in _KINDS:
            raise ErasureError(f'unknown kind "{kind}": choose one of {", ".join(_KINDS)}.')
        return cls(**(_KINDS[kind] | changes))

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (self.alpha or self.rank) / self.rank


_KINDS: dict[str, dict[str, Any]] = {
    "object": {"lr": 1e-5},
    "person": {},
    "style": {"mask": "none"},
    "explicit": {"steps": 120, "lr": 1e-5, "cfis": False},
}


class AttendingStudent(Student, Protocol):
    """A network in training whose attention to the text can be read."""

    def attention(self, z: Tensor, t: Tensor, text: TextStates, columns: Tensor | None = None) -> AttentionMaps:
        """Probabilities of all text attention layers for a forward pass, (B, heads, pixels, tokens) by layer.

        core.attention.AttentionProbe around ``predict_noise``; ``columns`` are the tokens that are wanted.
        """


@dataclass(frozen=True)
class ConceptPictures:
    """Pictures of a concept to train on.

    Attributes:
        latents: (N, 4, h, w), noiseless, as the model's own sampling ends
        text, phrase, tail: the N prompts that they belong to, as ``ConceptPrompts`` has them
        masks: (N, H, W) in [0, 1], 1 on the concept, at any resolution; None: the whole picture
        asked: prompts that training draws from, any picture's; None: each picture is asked by its own
    """

    latents: Tensor
    text: TextStates
    phrase: Tensor
    tail: Tensor
    masks: Tensor | None = None
    asked: ConceptPrompts | None = None

    def __post_init__(self) -> None:
        n = len(self.latents)
        sizes = {n, len(self.text), len(self.phrase), len(self.tail), n if self.masks is None else len(self.masks)}
        if len(sizes) != 1 or not n:
            raise ErasureError(f"there are {n} pictures of the concept for {len(self.text)} prompts and "
                               f"{'no' if self.masks is None else len(self.masks)} masks: give as many of each.")  # fmt: skip
        if self.masks is not None:
            empty = [str(i + 1) for i, mask in enumerate(self.masks) if not float(mask.max()) > 0]
            if empty:
                raise ErasureError(f"the mask of picture {', '.join(empty)} is empty: mark the concept, or leave the masks out.")


def concept_pictures(
    latents: Tensor, templates: Sequence[str], phrase: str, encode: Encode, phrase_ids: PhraseIds, masks: Tensor | None = None,
    asked: ConceptPrompts | None = None,
) -> ConceptPictures:  # fmt: skip
    """Pictures with the token positions of their prompts: of the phrase in ``templates``, one a picture."""
    own = concept_prompts(templates, phrase, encode, phrase_ids)
    return ConceptPictures(latents, own.text, own.phrase, own.tail, masks, asked)


def noised(latents: Tensor, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise, with the schedule's cumulative products a (steps,)."""
    a = alphas.to(latents)[t.to(latents.device)][:, None, None, None]
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def suppression_loss(
    maps: AttentionMaps, tokens: Tensor, masks: Tensor | None, size: tuple[int, int], squared: bool = False
) -> Tensor:
    """Eq. 3: sum over layers of ||A * M|| over heads, pixels and the concept's tokens; the mean over a batch.

    Args:
        maps: (B, heads, pixels, n) by layer
        tokens: (B, n), 1 for each token that is suppressed
        masks: (B, H, W) in [0, 1]; a layer's pixel counts by the share that it covers
        size: (h, w) of the latents
        squared: the paper's Frobenius norm squared
    """
    total: Tensor | float = 0.0
    for p in maps.values():
        seen = p * tokens.to(p)[:, None, None, :]
        if masks is not None:
            seen = seen * resized(masks, layer_size(p.shape[2], size)).to(p).flatten(1)[:, None, :, None]
        norm = torch.linalg.vector_norm(seen.flatten(1), dim=1)
        total = total + (norm.square() if squared else norm)
    return torch.as_tensor(total).mean()


@torch.no_grad()
def attention_masks(model: AttendingStudent, pictures: ConceptPictures, alphas: Tensor, config: SuppressionConfig) -> Tensor:
    """Where the original model sees the concept in its pictures: (N, h, w) of 0 and 1, by ``mask_threshold``'s rule."""
    generator = torch.Generator().manual_seed((config.seed + 1_000_003) % 2**64)  # training's own draws stay the same
    size = (pictures.latents.shape[2], pictures.latents.shape[3])
    found = []
    with model.teacher():
        for i in range(len(pictures.latents)):
            z, columns = pictures.latents[i : i + 1], pictures.phrase[i].nonzero()[:, 0]
            seen: Tensor | float = 0.0
            for level in MASK_TIMES:
                t = torch.tensor([level * len(alphas) // 1000])
                noise = torch.randn(z.shape, generator=generator)
                maps = model.attention(noised(z, noise, t, alphas), t, pictures.text[i], columns)
                seen = seen + concept_map(maps, torch.ones(1, len(columns)), size)
            seen = torch.as_tensor(seen)
            found.append((seen >= seen.min() + config.mask_threshold * (seen.max() - seen.min())).float())
    return torch.cat(found)


def with_masks(model: AttendingStudent, pictures: ConceptPictures, alphas: Tensor, config: SuppressionConfig) -> ConceptPictures:
    """The pictures with the masks that ``config.mask`` asks for.

    Raises:
        ErasureError: masks should be given, and are not.
    """
    if config.mask == "attention":
        return replace(pictures, masks=attention_masks(model, pictures, alphas, config))
    if config.mask == "none":
        return replace(pictures, masks=None)
    if pictures.masks is None:
        raise ErasureError('mask is "given", and the pictures have none: connect masks, or set mask to "attention".')
    return pictures


def suppress(
    model: AttendingStudent, pictures: ConceptPictures, alphas: Tensor, config: SuppressionConfig,
    on_step: Callable[[TrainState], None] | None = None, state: TrainState | None = None,
) -> TrainState:  # fmt: skip
    """Trains the model's adapters on one concept (Eq. 3): noised pictures, attention to its tokens pressed down under the mask.

    ``alphas`` are the cumulative products of the noise schedule, (steps,). ``on_step`` is called after every step; what it
    raises ends the training. The state's tensors are the live ones: copy to keep them. With a state of an earlier run it
    goes on from there, to the same result.

    Raises:
        ErasureError: the loss is not finite, or masks are missing.
    """
    state = state or TrainState()
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    if state.step:
        restore(state, parameters, optimizer, generator)
    pictures = with_masks(model, pictures, alphas, config)
    steps = len(alphas)
    density = focal_density(config.t1, config.t2, config.gamma, steps) if config.cfis else uniform_density(steps)
    while state.step < config.steps:
        loss = picture_loss(model, pictures, alphas, density, config, generator)
        if not torch.isfinite(loss):
            raise ErasureError(f"the loss is not finite at step {state.step + 1}: lower lr (now {config.lr:g}).")
        loss.backward()
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


def picture_loss(
    model: AttendingStudent, pictures: ConceptPictures, alphas: Tensor, density: Tensor, config: SuppressionConfig,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Eq. 3 for random pictures, prompts, timesteps of ``density`` (steps,) and noise."""
    picked = chosen = torch.randint(len(pictures.latents), (config.batch,), generator=generator).tolist()
    asked = pictures.asked
    if asked is None:
        asked = ConceptPrompts(pictures.text, pictures.phrase, pictures.tail)
    else:
        picked = torch.randint(len(asked.text), (config.batch,), generator=generator).tolist()
    t = draw(config.batch, generator, density)
    z = pictures.latents[chosen]
    z = noised(z, torch.randn(z.shape, generator=generator).to(z), t, alphas)
    tokens = asked.phrase[picked] | (asked.tail[picked] & config.tail)
    columns = tokens.any(0).nonzero()[:, 0]
    masks = None if pictures.masks is None else pictures.masks[chosen]
    with model.student():
        maps = model.attention(z, t, join([asked.text[i] for i in picked]), columns)
        return suppression_loss(maps, tokens[:, columns], masks, (z.shape[2], z.shape[3]), config.squared)
