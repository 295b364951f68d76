"""The methods of the benchmark: each is told concepts and what to keep, and answers with an edit of the weights.

A name is a row of the registry, or a row with other settings: ``realera@neighbors.m=20@closed_form.prior=3``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backends.full_weights import edited_parameters
from ...core.concepts import Concept, Preserved, check_lists
from ...core.errors import ErasureError
from ...core.esd import ESD_ORIGINAL, EsdConfig
from ...core.neighbors import NeighborConfig
from ...core.refinement import RefinementConfig
from ...core.suppression import SuppressionConfig
from ...core.uce import UCE_NEW, UCE_OLD, UceConfig
from ...erasure import ErasureConfig, erase
from ...esd import erase_esd
from ...mass import erase_many
from ...mass_config import MassConfig
from ...mining import Progress, silent
from ...presets import Preset
from ...presets.settings import preset_config
from ...settings import sections, with_settings
from ...uce import erase_uce, keeping


@dataclass(frozen=True)
class Edit:
    """What a method changed.

    Attributes:
        deltas: new minus old weights: of projections (out, d) by canonical name, or of any parameters by their own names
        full: whether names are the parameters' own
    """

    deltas: Mapping[str, Tensor]
    full: bool = False

    def on(self, backend: Any) -> AbstractContextManager[None]:
        """Inside, the backend draws with the edit; its weights are put back, whatever happens."""
        return edited_parameters(backend.unet, self.deltas) if self.full else backend.edited(self.deltas)

    def hash(self) -> str:
        """Names the weights' change by its content: equal deltas, equal hash. The original's is that of no deltas."""
        digest = hashlib.sha256()
        for name in sorted(self.deltas):
            value = self.deltas[name].detach().float().cpu().contiguous()
            digest.update(f"{self.full}{name}{tuple(value.shape)}".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        return digest.hexdigest()


#: (backend, concepts, retained, progress, config) -> edit
Run = Callable[[Any, Sequence[Concept], Sequence[Preserved], Progress, Any], Edit]


@dataclass(frozen=True)
class Method:
    """A method with its settings, ready to be called. ``config`` is None where there is nothing to set."""

    name: str
    title: str
    config: Any
    run: Run

    def __call__(
        self, backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved] = (), progress: Progress = silent
    ) -> Edit:
        """The edit; the model is left as it is. ErasureError: contradictory lists, settings that admit nothing."""
        check_lists(concepts, retained)
        return self.run(backend, concepts, retained, progress, self.config)


def _original(backend: Any, concepts: Any, retained: Any, progress: Progress, config: None) -> Edit:
    return Edit({})


def _realera(
    backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved], progress: Progress, config: ErasureConfig
) -> Edit:
    return Edit(erase(backend, keeping(concepts, retained), config, progress).deltas(backend.projections()))


def _mass(
    backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved], progress: Progress, config: MassConfig
) -> Edit:
    return Edit(erase_many(backend, concepts, config, retained, progress).deltas(backend.projections()))


def _uce(backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved], progress: Progress, config: UceConfig) -> Edit:
    return Edit(erase_uce(backend, concepts, config, retained, progress).deltas(backend.projections()))


def _esd(backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved], progress: Progress, config: EsdConfig) -> Edit:
    """ESD has no way to keep anything: ``retained`` is not for it."""
    return Edit(erase_esd(backend, concepts, config, progress).weights, full=True)


PAPERS = NeighborConfig(words=0)
#: RealEra's components by row: the four variants of its Table 3 with its own random neighbors, then with named ones
_REALERA = {
    "closed-form": ("closed form alone", ErasureConfig(alignment_on=False, neighbors_on=False, beyond_on=False)),
    "+alignment": ("closed form, noise alignment", ErasureConfig(neighbors_on=False, beyond_on=False)),
    "+neighbors": ("these and the paper's neighbors", ErasureConfig(beyond_on=False, neighbors=PAPERS)),
    "+beyond": ("these and beyond-concept samples: RealEra as printed", ErasureConfig(neighbors=PAPERS)),
    "+named-neighbors": ("+neighbors with named neighbors", ErasureConfig(beyond_on=False)),
    "realera": ("RealEra with named neighbors", ErasureConfig()),
    "realera-edit": ("the same without noise alignment", ErasureConfig(alignment_on=False)),
}
_MASS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mace": ("MACE", "mace", {}, {}),
    "mace-refinement": ("MACE's closed-form refinement alone", "mace", {"fusion": "none"}, {}),
    "mace-sum": ("LoRAs summed, uniform timesteps", "mace", {"fusion": "sum"}, {"cfis": False}),
    "mace-sum-cfis": ("LoRAs summed", "mace", {"fusion": "sum"}, {}),
    "mace-no-cfis": ("MACE with uniform timesteps", "mace", {}, {"cfis": False}),
    "realera-mass": ("RealEra inside MACE's frame", "realera-mass", {}, {}),
}
_OTHERS: dict[str, tuple[str, Any, Run]] = {
    "original": ("the model as it is", None, _original),
    "uce-new": ("UCE, last token of the subject", UCE_NEW, _uce),
    "uce-old": ("UCE, tokens aligned to the end", UCE_OLD, _uce),
    "esd-x": ("ESD on cross-attention", ESD_ORIGINAL, _esd),
    "esd-u": ("ESD on all but cross-attention", replace(ESD_ORIGINAL, variant="u"), _esd),
}
METHODS = (*_OTHERS, *_REALERA, *_MASS)


def make_method(name: str, kind: str = "object", preset: Preset | None = None, settings: Sequence[str] = ()) -> Method:
    """The method of a name, with settings for a kind of concept.

    Args:
        name: of the registry, each ``@section.key=value`` after it one setting
        kind: of the concepts; MACE has other settings for each
        preset: a paper's set, whose printed settings MACE takes
        settings: ``section.key=value``, each for the methods that have it; those of the name win

    Raises:
        ErasureError: unknown name or setting, or a value out of range.
    """
    base, *own = name.split("@")
    if base in _OTHERS:
        title, config, run = _OTHERS[base]
    elif base in _REALERA:
        (title, config), run = _REALERA[base], _realera
    elif base in _MASS:
        title, method, changes, training = _MASS[base]
        config, run = replace(_mass_config(method, kind, preset), **changes), _mass
        config = replace(config, suppression=replace(config.suppression, **training))
    else:
        raise ErasureError(f'there is no method "{base}": choose among {", ".join(METHODS)}.')
    if own and config is None:
        raise ErasureError(f'"{base}" has no settings: leave out what follows the @.')
    # together, as some ranges only hold together, and of two for one setting the last holds
    chosen = [s for s in settings if config is not None and has_setting(config, s)]
    if chosen or own:
        config = with_settings(config, [*chosen, *own])
    return Method(name, title if not own else f"{title}, {', '.join(own)}", config, run)


def _mass_config(method: str, kind: str, preset: Preset | None) -> MassConfig:
    if preset is not None:
        return preset_config(preset, method)
    return MassConfig(method, refinement=RefinementConfig.for_kind(kind), suppression=SuppressionConfig.for_kind(kind))


def has_setting(config: Any, setting: str) -> bool:
    """Whether ``section.key=value`` names a setting of a config; its value is not looked at."""
    section, dot, key = setting.partition("=")[0].strip().partition(".")
    if not dot:
        return hasattr(config, section) and section not in sections(config)
    return section in sections(config) and hasattr(getattr(config, section), key)


def check_settings(methods: Iterable[str], settings: Sequence[str]) -> None:
    """Raises ErasureError for a setting that none of the methods has."""
    configs = [make_method(name).config for name in methods]
    for setting in settings:
        if "=" not in setting:
            raise ErasureError(f'"{setting}" is not a setting: write section.key=value, such as neighbors.m=20.')
        if not any(c is not None and has_setting(c, setting) for c in configs):
            raise ErasureError(
                f'none of the chosen methods has the setting "{setting.partition("=")[0]}": mend it or leave it out.'
            )
