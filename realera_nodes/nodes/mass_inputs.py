"""Inputs of the nodes for many concepts: priors, lists, and MACE's settings."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..core.concepts import Concept
from ..core.errors import ErasureError
from ..core.refinement import RefinementConfig
from ..core.suppression import MASKS, SuppressionConfig
from .inputs import adapter, added, setting
from .parsing import concept, ends, lines, targets_refusal, within

Loras = io.Custom("REALERA_LORAS")
PriorSocket = io.Custom("REALERA_PRIOR")
R, S = RefinementConfig, SuppressionConfig

PRIOR = "From Build Prior or Load Prior; without it the shipped captions that hold no erased word are the prior."
PAPER = io.Boolean.Input(
    "paper_settings", default=True,
    tooltip="On: the paper's settings for this kind of concept (Table 10). Off: the settings below.",
)  # fmt: skip
RETAINED = io.String.Input(
    "retained", default="", multiline=True, placeholder="bird\nship: 2",
    tooltip="Phrases that must stay, one a line, with a weight after a colon if you like: the domain prior.",
)  # fmt: skip


def priors(weight: str) -> list[io.Input]:
    """Weights of a closed form of MACE; ``weight`` is the one of its general prior."""
    return [
        setting(R, weight, f"Weight of the general prior ({weight} of the paper)."),
        setting(R, "lambda_3", "Weight of the retained phrases (lambda_3 of Table 10)."),
        setting(R, "mu", "Weight of ||W' - W||^2 in place of the general prior: the paper's way for objects."),
        setting(R, "contexts", "Prompts in which each phrase is seen, at most; 30 is all."),
        setting(R, "ridge", "Pull towards the start; raise it if the sum is refused as badly conditioned."),
    ]


SUPPRESSION = [
    setting(S, "steps", "Optimiser steps (the paper's 50; explicit content 120)."),
    setting(S, "lr", "AdamW's rate (paper: 1e-4 for persons and styles, 1e-5 for objects)."),
    *adapter(S),
    setting(S, "batch", "Noisy pictures of a step."),
    setting(S, "weight_decay", "AdamW's weight decay."),
    setting(S, "clip", "Largest norm of the gradient; 0 is off.", key="clip_norm"),
    setting(S, "cfis", "Draw timesteps by concept-focal importance sampling (Eq. 5); off, uniformly."),
    setting(S, "t1", "Lower edge of the favoured timesteps (Eq. 5)."),
    setting(S, "t2", "Upper edge of the favoured timesteps (Eq. 5)."),
    setting(S, "gamma", "Steepness of both edges (Eq. 5)."),
    setting(S, "images", "Pictures of the concept that the model draws for its training."),
    setting(S, "image_steps", "Denoising steps of these pictures."),
    setting(S, "guidance", "Their classifier-free guidance."),
    io.Combo.Input(
        "mask", options=[m for m in MASKS if m != "given"], default=S().mask,
        tooltip="Where attention is suppressed: the model's own attention, thresholded, or none. Masks on the concept go first.",
    ),
    setting(S, "mask_threshold", "Share of the way from lowest to highest attention from which a pixel is masked."),
    setting(S, "tail", "Suppress attention to the end token and padding too."),
    setting(S, "squared", "Sum of squares, as Eq. 3 is written; off, the norm of each layer, as the public code has it."),
]  # fmt: skip

#: comes after all other widgets of a node
PROMPTS = added(setting(
    S, "prompts", "Prompts of the concept of which each noisy picture is asked by one, at most; 1 is its own."
))  # fmt: skip


def refinement_config(kind: str, paper_settings: bool, weight: str, given: dict[str, Any]) -> RefinementConfig:
    """MACE's weights: the paper's for a kind, or the widgets'. Prompts and ridge are the widgets' in both."""
    if paper_settings:
        return R.for_kind(kind, contexts=given["contexts"], ridge=given["ridge"])
    names = [i.id for i in priors(weight)]
    values = {name: given[name] for name in names}
    return R(**(values | {"lambda_1": values[weight], "lambda_2": values[weight]}))


def suppression_config(kind: str, paper_settings: bool, seed: int, given: dict[str, Any]) -> SuppressionConfig:
    """The paper's settings for a kind, or the widgets'. What is drawn and how often is the widgets' in both."""
    values = {i.id: given[i.id] for i in SUPPRESSION} | {"prompts": given.get("prompts", S().prompts)}
    values["clip"] = values.pop("clip_norm")
    values["targets"] = ends(values["targets"])
    if paper_settings:
        own = ("targets", "batch", "images", "image_steps", "guidance", "prompts")
        return S.for_kind(kind, seed=seed, **{k: values[k] for k in own})
    return S(seed=seed, **values)


def suppression_refusal(targets: str | None, t1: float | None, t2: float | None) -> bool | str:
    """True, or what is wrong with widgets of a suppression; those that are wired up are known later only."""
    found = targets_refusal(targets)
    if found is not True:
        return found
    try:
        within(S, **{name: value for name, value in (("t1", t1), ("t2", t2)) if value is not None})
    except ErasureError as error:
        return str(error)
    return "t1 must be below t2." if t1 is not None and t2 is not None and t1 >= t2 else True


def concept_list(text: str, kind: str) -> tuple[Concept, ...]:
    """Lines of ``phrase -> anchor`` as concepts. Raises ErasureError: a line without an arrow is named."""
    found = []
    for line in lines(text):
        phrase, arrow, anchor = line.partition("->")
        if not arrow:
            raise ErasureError(f'"{line}" says no anchor: write lines such as airplane -> sky.')
        found.append(concept(phrase, anchor, kind))
    return tuple(found)
