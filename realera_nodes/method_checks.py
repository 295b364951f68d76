"""What each method refuses before it begins, which prompts it will encode, and what memory its settings take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .core.alignment import AlignmentConfig
from .core.concepts import Concept, Preserved, check_lists, same
from .core.errors import ErasureError
from .core.esd import EsdConfig
from .core.neighbors import NeighborConfig, sample_neighbors
from .core.prior import captions
from .core.templates import CONTEXTS, contexts_of
from .core.uce import UceConfig
from .erasure import ErasureConfig, make_pairs
from .mass_config import MassConfig
from .memory import ASKED, FORWARD, TRAINED, Need, latent

#: samples that bounds are tried with
TRIED = 16


@dataclass(frozen=True)
class Checks:
    """What is to be known of a method before it begins.

    Attributes:
        targets: ends of the names of layers that get a LoRA, by config
        refuse: refuses a config, concepts and retained phrases, with a prior file or without, before the model is loaded
        prompts: (template, phrase) that it will encode, by config, concepts and retained phrases
        try_out: refuses what shows with the text encoder alone, by config, concepts and backend
        needs: memory that depends on settings, by config, number of concepts and backend
    """

    targets: Callable[[Any], tuple[str, ...]]
    refuse: Callable[[Any, Sequence[Concept], Sequence[Preserved], bool], None]
    prompts: Callable[[Any, Sequence[Concept], Sequence[Preserved]], Iterable[tuple[str, str]]]
    try_out: Callable[[Any, Sequence[Concept], Any], None]
    needs: Callable[[Any, int, Any], list[Need]]


def checks_of(config: Any) -> Checks:
    """The checks of the method that a config is for."""
    return _CHECKS[type(config)]


def _require_strength(name: str, strength: float) -> None:
    """An edit may be put on a model the other way round, as any LoRA; what is called erased may not."""
    if strength < 0:
        raise ErasureError(f"{name} is {strength:g}, which strengthens the concept: it must be 0 or more to erase.")


def _require_captions(concepts: Sequence[Concept], weight: str) -> None:
    if not captions([p for c in concepts for p in c.phrases]):
        raise ErasureError(
            f"every caption of the general prior holds an erased phrase: erase more particular ones, or set {weight} to 0."
        )


def _refuse_realera(config: ErasureConfig, concepts: Sequence[Concept], retained: Sequence[Preserved], prior: bool) -> None:
    if not (config.closed_form_on or config.alignment_on):
        raise ErasureError("closed_form_on and alignment_on are both off: nothing would be erased; switch one of them on.")
    if config.closed_form_on:
        _require_strength("closed_form.strength", config.closed_form.strength)
        if config.closed_form.prior:
            _require_captions(concepts, "closed_form.prior")


def _refuse_mass(config: MassConfig, concepts: Sequence[Concept], retained: Sequence[Preserved], prior: bool) -> None:
    own = config.refinement
    if not prior and (own.lambda_1 or own.lambda_2):
        _require_captions(concepts, "refinement.lambda_1 and lambda_2")


def _refuse_uce(config: UceConfig, concepts: Sequence[Concept], retained: Sequence[Preserved], prior: bool) -> None:
    _require_strength("strength", config.strength)
    for phrase in (p for c in concepts for p in c.phrases):
        if not config.to_anchor and same(phrase, config.guide):
            raise ErasureError(f'"{phrase}" is both erased and the guide: choose another guide.')


def _refuse_esd(config: EsdConfig, concepts: Sequence[Concept], retained: Sequence[Preserved], prior: bool) -> None:
    check_lists(concepts, retained)


Prompts = Iterator[tuple[str, str]]


def _prompts_of_realera(config: ErasureConfig, concepts: Sequence[Concept], retained: Sequence[Preserved]) -> Prompts:
    for c in concepts:
        yield from _in(c.prompts, (*c.phrases, c.anchor, *(k.phrase for k in (*c.preserve, *retained))))


def _prompts_of_mass(config: MassConfig, concepts: Sequence[Concept], retained: Sequence[Preserved]) -> Prompts:
    contexts = config.refinement.contexts
    for c in concepts:
        yield from _in(contexts_of(c, contexts), (*c.phrases, c.anchor))
        yield from _in(CONTEXTS[c.kind][:contexts], [k.phrase for k in (*c.preserve, *retained)])
        yield from _in(c.prompts, (*c.phrases, c.anchor))


def _prompts_of_uce(config: UceConfig, concepts: Sequence[Concept], retained: Sequence[Preserved]) -> Prompts:
    for c in concepts:
        guide = c.anchor if config.to_anchor else config.guide
        yield from _in(config.templates, (*c.phrases, guide, *(k.phrase for k in (*c.preserve, *retained))))


def _prompts_of_esd(config: EsdConfig, concepts: Sequence[Concept], retained: Sequence[Preserved]) -> Prompts:
    for c in concepts:
        yield from _in(config.templates, c.phrases)


def _in(templates: Iterable[str], phrases: Sequence[str]) -> Prompts:
    return ((template, phrase) for template in templates for phrase in phrases)


def _try_samples(backend: Any, concepts: Sequence[Concept], config: NeighborConfig, m: int, n: int) -> None:
    """Whether the bounds of Eq. 3-6 admit anything around the first concept. ErasureError: which one excludes."""
    if m or n:
        pair = make_pairs(backend, concepts[:1])[0][0]
        tried = replace(config, m=min(m, TRIED), n=min(n, TRIED))
        sample_neighbors(pair, tried, torch.Generator().manual_seed(config.seed))


def _try_realera(config: ErasureConfig, concepts: Sequence[Concept], backend: Any) -> None:
    mining = config.neighbors
    _try_samples(backend, concepts, mining, mining.m if config.neighbors_on else 0, mining.n if config.beyond_on else 0)


def _try_mass(config: MassConfig, concepts: Sequence[Concept], backend: Any) -> None:
    if config.method == "realera-mass":
        trains = config.fusion != "none"
        _try_samples(backend, concepts, config.neighbors, config.neighbors.m, config.neighbors.n if trains else 0)


def _nothing(config: Any, concepts: Sequence[Concept], backend: Any) -> None:
    pass


def _samples(config: NeighborConfig, backend: Any) -> Need:
    rows = (config.m + config.n) * 77.0 * backend.context_width * 4
    return Need(4 * rows, f"drawing {config.m + config.n} samples around a prompt", "lower neighbors.m or neighbors.n", False)


def _alignment(
    config: AlignmentConfig, mining: NeighborConfig, asks: bool, trains: bool, concepts: int, backend: Any
) -> list[Need]:
    found = []
    if asks or trains:
        height = backend.side // backend.pipe.vae_scale_factor
        kept = concepts * config.trajectories * config.trajectory_steps * 16.0 * height * height
        what = f"keeping {config.trajectories} trajectories of {config.trajectory_steps} steps for {concepts} concepts"
        found.append(Need(kept, what, "lower alignment.trajectories, alignment.trajectory_steps or size", False))
    if asks:
        found.append(Need(ASKED * latent(backend, FORWARD), f"asking the model about {ASKED} latents at a time", "lower size"))
    if trains:
        size = config.batch * latent(backend, TRAINED)
        found.append(Need(size, f"training on {config.batch} latents at a time", "lower alignment.batch or size"))
    return found


def _needs_of_realera(config: ErasureConfig, concepts: int, backend: Any) -> list[Need]:
    asks = config.neighbors_on and config.neighbors.words > 0
    found = _alignment(config.alignment, config.neighbors, asks, config.alignment_on, concepts, backend)
    return [*found, _samples(config.neighbors, backend)] if config.neighbors_on or config.beyond_on else found


def _needs_of_mass(config: MassConfig, concepts: int, backend: Any) -> list[Need]:
    trains = config.fusion != "none"
    if config.method == "realera-mass":
        asks = config.neighbors.words > 0
        return [
            *_alignment(config.alignment, config.neighbors, asks, trains, concepts, backend),
            _samples(config.neighbors, backend),
        ]
    own = config.suppression
    size = own.batch * latent(backend, TRAINED)
    return [Need(size, f"training on {own.batch} latents at a time", "lower suppression.batch or size")] if trains else []


def _needs_of_uce(config: UceConfig, concepts: int, backend: Any) -> list[Need]:
    return []


def _needs_of_esd(config: EsdConfig, concepts: int, backend: Any) -> list[Need]:
    size = config.batch * latent(backend, TRAINED)
    return [Need(size, f"training on {config.batch} latents at a time", "lower batch or size")]


def _no_targets(config: Any) -> tuple[str, ...]:
    return ()


_CHECKS = {
    ErasureConfig: Checks(
        lambda c: c.alignment.targets if c.alignment_on else (),
        _refuse_realera, _prompts_of_realera, _try_realera, _needs_of_realera,
    ),
    MassConfig: Checks(
        lambda c: c.training.targets if c.fusion != "none" else (), _refuse_mass, _prompts_of_mass, _try_mass, _needs_of_mass
    ),
    UceConfig: Checks(_no_targets, _refuse_uce, _prompts_of_uce, _nothing, _needs_of_uce),
    EsdConfig: Checks(_no_targets, _refuse_esd, _prompts_of_esd, _nothing, _needs_of_esd),
}  # fmt: skip
