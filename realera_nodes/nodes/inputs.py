"""Inputs that nodes share. A setting's default, type and range come from its config dataclass: here are its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from comfy_api.v0_0_2 import io

from ..core.alignment import AlignmentConfig
from ..core.concepts import TEMPLATES, Concept
from ..core.settings import range_of
from ..job import Job

CATEGORY = "model/erasure"
Concepts = io.Custom("REALERA_CONCEPTS")
Neighbors = io.Custom("REALERA_NEIGHBORS")
SEEDS = 0xFFFFFFFF

MODEL = "The Stable Diffusion model (SD1.x, SD2.x or SDXL), with or without LoRAs. It is never changed: edits are on a copy."
CLIP = "The text encoder of the same checkpoint. Clip skip and LoRAs on it count."
CONCEPTS = "What to erase, from Erasure Concept."
NEIGHBORS = "Mined neighbors, from Mine Neighbor Concepts; they bring their concepts along."
SIZE = "Side of the pictures in pixels that the model is asked about; 0 is the family's own (512, 768 or 1024)."


def default_of(config: type, name: str) -> Any:
    """A setting's default, where it is written."""
    field = next(f for f in fields(config) if f.name == name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def setting(config: type, name: str, tooltip: str, key: str | None = None) -> io.Input:
    """The input of a dataclass's setting: type, default and range from there. ``key`` where another input has its name."""
    value, key = default_of(config, name), key or name
    if isinstance(value, bool):
        return io.Boolean.Input(key, default=value, tooltip=tooltip)
    if isinstance(value, str | tuple):
        return io.String.Input(key, default=value if isinstance(value, str) else ", ".join(value), tooltip=tooltip)
    kind = io.Int if isinstance(value, int) else io.Float
    bounds = range_of(config, name)
    return kind.Input(key, default=value, min=bounds.low, max=bounds.high, step=bounds.step, tooltip=tooltip)


def choice(config: type, name: str, options: Sequence[str], tooltip: str) -> io.Input:
    """The input of a dataclass's setting that is one of a few words."""
    return io.Combo.Input(name, options=list(options), default=default_of(config, name), tooltip=tooltip)


def added(later: io.Input) -> io.Input:
    """A widget that graphs of an earlier version lack: optional, and so after all others, that they still run and load."""
    later.optional = True
    return later


def prompts(config: type) -> io.Input:
    """The input of a method's own ``templates``."""
    tooltip = "Prompts to erase under, one a line, with {} where the phrase goes."
    return io.String.Input("templates", default="\n".join(default_of(config, "templates")), multiline=True, tooltip=tooltip)


def seed(config: type, tooltip: str) -> io.Input:
    """A seed that stays as it is: a changed one would mine or train again at every queue."""
    return io.Int.Input(
        "seed", default=default_of(config, "seed"), min=0, max=SEEDS, control_after_generate=False, tooltip=tooltip
    )


def size() -> io.Input:
    bounds = range_of(Job, "size")
    return io.Int.Input("picture_size", default=0, min=0, max=bounds.high, step=bounds.step, tooltip=SIZE)


def adapter(config: type) -> list[io.Input]:
    """What a LoRA is, and where."""
    return [
        setting(config, "rank", "Rank of the LoRA."),
        setting(config, "alpha", "Alpha of the LoRA; 0 means the same as rank."),
        setting(config, "targets", "Which layers get a LoRA, by the end of their names, with commas between."),
    ]


def runs() -> list[io.Input]:
    """How the anchor's trajectories are made, on which the model is asked and trained."""
    return [
        setting(AlignmentConfig, "trajectories", "Sampling runs of the anchor that noisy latents are drawn from."),
        setting(AlignmentConfig, "trajectory_steps", "Denoising steps of these runs."),
        setting(AlignmentConfig, "guidance", "Their classifier-free guidance."),
    ]


def concept_fields() -> list[io.Input]:
    """The words of one concept."""
    return [
        io.String.Input("phrase", default="", placeholder="airplane", tooltip="The word or phrase to erase."),
        io.String.Input("anchor", default="", placeholder="sky", tooltip="What it becomes: a broader or neutral word."),
        io.Combo.Input(
            "kind", options=list(TEMPLATES), default=default_of(Concept, "kind"),
            tooltip="Which prompts the phrase is erased under: those for an object, a person, a style or explicit content.",
        ),
        io.String.Input(
            "aliases", default="", multiline=True, placeholder="jet\nairliner",
            tooltip="Other phrases for the same concept, one a line. They are erased too.",
        ),
        io.String.Input(
            "preserve", default="", multiline=True, placeholder="bird\nhelicopter: 2",
            tooltip="Phrases that must stay, one a line, with a weight after a colon if you like.",
        ),
    ]  # fmt: skip
