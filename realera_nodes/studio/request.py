"""What a user of the panel asks for, in the words of the page; and what it is in the words of the engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..cli.erase import concepts_of
from ..core.concepts import Concept, Preserved, check_lists, check_together
from ..core.errors import ErasureError
from ..core.phrases import spelled, told
from ..core.settings import check_settings, choice, number
from ..erasure import ErasureConfig
from ..job import Job
from ..mass_config import METHODS, MassConfig
from ..methods import mass_config
from ..presets import load_preset
from ..presets.settings import preset_config
from ..settings import with_settings

#: method -> how the page calls it
METHOD_NAMES = {
    "realera": "RealEra: closed form, then a trained LoRA",
    "edit": "Closed form alone (no training)",
    "lora": "Trained LoRA alone",
    "mace": "MACE: for many concepts at once",
    "realera-mass": "RealEra in MACE's frame",
}


@dataclass(frozen=True)
class Request:
    """A look, a preview or an erasure.

    Attributes:
        model: its name in the list of models
        concepts, anchors: as the command line takes them: one anchor for all, or one for each
        keep: phrases that must stay
        also: words that are erased as well, "word" or "2:word" for the second concept's
        settings: "section.key=value"
        preset: of the papers' sets; its settings hold for MACE, its retained list for all
        strength: of the closed form: 0 is the original model, 1 the edit
        checkpoint: write the whole model, not only LoRAs
    """

    model: str = "demo"
    concepts: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    kind: str = "object"
    keep: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    method: str = choice("realera", tuple(METHOD_NAMES))
    strength: float = number(1.0, 0, 10, 0.05)
    settings: tuple[str, ...] = ()
    preset: str = ""
    checkpoint: bool = True
    pictures: int = number(2, 1, 64)
    sampling_steps: int = number(20, 1, 1000)
    seed: int = number(0, 0, 2**32 - 1)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("concepts", "anchors", "keep", "also"):
            object.__setattr__(self, name, tuple(map(spelled, getattr(self, name))))

    @property
    def title(self) -> str:
        """Such as "airplane -> sky"."""
        shown = ", ".join(self.concepts[:3]) + (f" and {len(self.concepts) - 3} more" if len(self.concepts) > 3 else "")
        return f"{shown or 'nothing'} → {', '.join(dict.fromkeys(self.anchors)) or 'nothing'}"


def words_of(text: str) -> tuple[str, ...]:
    """Phrases between commas, semicolons or lines."""
    return tuple(dict.fromkeys(anchors_of(text)))


def anchors_of(text: str) -> tuple[str, ...]:
    """The same, but of anchors a repeated one counts: there may be one for each concept."""
    return tuple(w for w in map(spelled, re.split(r"[,;\n]", text)) if w)


def to_table(request: Request) -> dict[str, Any]:
    return asdict(request)


def from_table(table: Mapping[str, Any]) -> Request:
    """A request from JSON. ErasureError: an unknown key, or a value of another type."""
    known = {f.name: getattr(Request, f.name) for f in fields(Request)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ErasureError(f'a request has no "{key}": choose from {", ".join(known)}.')
        if isinstance(known[key], tuple):
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise ErasureError(f"{key} must be a list of words, not {told(value)}: mend the value.")
            value = tuple(value)
        elif isinstance(known[key], float) and type(value) in (int, float):
            value = float(value)
        elif type(value) is not type(known[key]):
            raise ErasureError(f"{key} must be {type(known[key]).__name__}, not {told(value)}: mend the value.")
        values[key] = value
    return Request(**values)


def concepts(request: Request) -> tuple[Concept, ...]:
    """The concepts with their aliases and what is kept. ErasureError: they contradict each other."""
    if not request.concepts:
        raise ErasureError("nothing to erase was named: write a concept, such as airplane.")
    if not request.anchors:
        raise ErasureError(f'the anchor of "{request.concepts[0]}" is empty: write what it should become, such as "sky".')
    found = list(concepts_of(list(request.concepts), list(request.anchors), request.kind, list(request.keep), {}))
    for entry in request.also:
        number, colon, word = entry.partition(":")
        index = int(number) - 1 if colon and number.isdigit() else 0
        if not 0 <= index < len(found):
            raise ErasureError(f'"{entry}" belongs to concept {index + 1}, but there are {len(found)}: look around again.')
        alias = word if colon and number.isdigit() else entry
        found[index] = replace(found[index], aliases=(*found[index].aliases, alias))
    check_together(found)
    return tuple(found)


def config(request: Request, erased: tuple[Concept, ...]) -> ErasureConfig | MassConfig:
    """The method's settings: defaults or the preset's, then the user's. ErasureError: an unknown name or a wrong value."""
    if request.method in METHODS:
        base = (
            preset_config(load_preset(request.preset), request.method) if request.preset else mass_config(request.method, erased)
        )
        return with_settings(base, request.settings)
    parts = ErasureConfig(closed_form_on=request.method != "lora", alignment_on=request.method != "edit")
    parts = replace(parts, closed_form=replace(parts.closed_form, strength=request.strength))
    return with_settings(parts, request.settings)


def job(request: Request, checkpoint: str, out: Path) -> Job:
    """The job that the command line would make of it. ``checkpoint`` is the engine's name of the model."""
    erased = concepts(request)
    chosen = config(request, erased)
    retained: tuple[Preserved, ...] = ()
    if request.preset:
        named = {p.phrase for c in erased for p in c.preserve}
        retained = tuple(Preserved(p) for p in load_preset(request.preset).retained if p not in named)
    if isinstance(chosen, MassConfig):
        check_lists(erased, retained)
    elif retained:
        erased = tuple(replace(c, preserve=(*c.preserve, *retained)) for c in erased)
    return Job(
        checkpoint, erased, out, chosen, pictures=request.pictures, sampling_steps=request.sampling_steps, seed=request.seed,
        save_checkpoint=request.checkpoint, retained=retained if isinstance(chosen, MassConfig) else (),
    )  # fmt: skip


def lines_of(text: str) -> tuple[str, ...]:
    """Settings, one a line; # begins a remark."""
    return tuple(line for line in (part.split("#")[0].strip() for part in text.splitlines()) if line)


def unique(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
