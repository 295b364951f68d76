"""The methods a job can be done by: what each is called, writes, costs, and how it is run. A config's type is its method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .core.alignment import AlignmentConfig
from .core.concepts import Concept, Preserved
from .core.errors import ErasureError
from .core.esd import EsdConfig
from .core.neighbors import NeighborConfig
from .core.refinement import RefinementConfig
from .core.suppression import MASK_TIMES, SuppressionConfig
from .core.training import TrainState
from .core.uce import UceConfig
from .erasure import ErasureConfig, erase
from .esd import erase_esd
from .mass import Shelf, erase_many
from .mass_config import METHODS as MASS
from .mass_config import MassConfig
from .mining import Progress
from .outcome import Outcome
from .priors import Prior
from .resume import EVERY, Answers, load_state, save_state
from .uce import erase_uce, keeping

Config = ErasureConfig | MassConfig | UceConfig | EsdConfig
METHODS = ("realera", *MASS, "uce", "esd-x", "esd-u")
#: a trained state is saved so often at least in a run; ESD's holds three times its weights
SAVES = 10


def config_of(method: str, concepts: Sequence[Concept]) -> Config:
    """A method's settings, as it has them where nothing is set. ErasureError: unknown method."""
    if method not in METHODS:
        raise ErasureError(f'there is no method "{method}": choose one of {", ".join(METHODS)}.')
    if method in MASS:
        return mass_config(method, concepts)
    if method == "uce":
        return UceConfig()
    return ErasureConfig() if method == "realera" else EsdConfig(variant=method[-1])


def mass_config(method: str, concepts: Sequence[Concept]) -> MassConfig:
    """A mass method with its paper's settings for the concepts' kind; of several kinds, the first one's."""
    kind = concepts[0].kind if concepts else "object"
    return MassConfig(method, refinement=RefinementConfig.for_kind(kind), suppression=SuppressionConfig.for_kind(kind))


@dataclass(frozen=True)
class Task:
    """What a method is run on.

    Attributes:
        retained: phrases to keep beside the concepts' own
        kept: file of a training's state, from which a stopped run goes on; answers: what the model told it before
        shelf: where a mass erasure's finished concepts wait
        prior: what a mass erasure keeps, in place of the shipped captions
        on_state: sees the state after every training step
    """

    backend: Any
    concepts: tuple[Concept, ...]
    config: Any
    retained: tuple[Preserved, ...]
    progress: Progress
    kept: Path
    shelf: Shelf | None = None
    prior: Prior | None = None
    on_state: Callable[[TrainState], None] = lambda state: None
    answers: Answers = field(default_factory=Answers)


@dataclass(frozen=True)
class Method:
    """How a job deals with one method.

    Attributes:
        aims: whether concepts become their anchors, by config
        loras: roles of the LoRA files that hold its outcome, by config: "lora", "edit lora"
        forwards: UNet forwards by stage for so many concepts, in units of one forward of one latent; a backward counts for two
        memory: what it needs beside the model, by config and backend: (bytes, what for)
        run: does it
    """

    aims: Callable[[Any], bool]
    loras: Callable[[Any], tuple[str, ...]]
    forwards: Callable[[Any, int], dict[str, float]]
    memory: Callable[[Any, Any], tuple[int, str]]
    run: Callable[[Task], Outcome]


def method_of(config: Config) -> Method:
    """The method that a config is for."""
    return _METHODS[type(config)]


def _remembering(task: Task, every: int) -> Callable[[TrainState], None]:
    def remember(state: TrainState) -> None:
        if state.step % every == 0:
            save_state(state, task.kept)
        task.on_state(state)

    return remember


def _realera(task: Task) -> Outcome:
    concepts = keeping(task.concepts, task.retained)
    state, remember = load_state(task.kept), _remembering(task, EVERY)
    return erase(task.backend, concepts, task.config, task.progress, state, remember, task.answers)


def _mass(task: Task) -> Outcome:
    return erase_many(
        task.backend, task.concepts, task.config, task.retained, task.progress, task.shelf, task.prior,
        lambda concept, state: task.on_state(state), task.answers,
    )  # fmt: skip


def _uce(task: Task) -> Outcome:
    return erase_uce(task.backend, task.concepts, task.config, task.retained, task.progress)


def _esd(task: Task) -> Outcome:
    every = max(EVERY, task.config.steps // SAVES)
    return erase_esd(
        task.backend, task.concepts, task.config, task.progress, load_state(task.kept), _remembering(task, every)
    )  # fmt: skip


def _alignment(
    alignment: AlignmentConfig, mining: NeighborConfig, concepts: int, on: bool, neighbors: bool, beyond: bool
) -> dict[str, float]:
    """Stages of RealEra: ``on`` is the training, ``neighbors`` and ``beyond`` are components C and D."""
    plan, asks = {}, neighbors and mining.words > 0
    if on or asks:
        plan["anchor trajectories"] = concepts * 2.0 * alignment.trajectories * alignment.trajectory_steps
    if asks:
        plan["named neighbors"] = concepts * 2.0 * mining.candidates
    if on:
        even = 2 if beyond and alignment.beyond else 1
        per_step = 4 * ((1 + even) / 2 if neighbors and alignment.neighbors else 1)
        plan["noise alignment"] = per_step * alignment.steps * alignment.batch * alignment.accumulate
    return plan


def _realera_forwards(config: ErasureConfig, concepts: int) -> dict[str, float]:
    c = config
    return _alignment(c.alignment, c.neighbors, concepts, c.alignment_on, c.neighbors_on, c.beyond_on)


def _mass_forwards(config: MassConfig, concepts: int) -> dict[str, float]:
    trains, own = config.fusion != "none", config.suppression
    if config.method == "realera-mass":
        plan = _alignment(config.alignment, config.neighbors, concepts, trains, True, True)
        return plan | ({"noise alignment": concepts * plan["noise alignment"]} if trains else {})
    if not trains:
        return {}
    masks = len(MASK_TIMES) if own.mask == "attention" else 0
    return {
        "concepts' pictures": concepts * float(own.images) * (2 * own.image_steps + masks),
        "suppression": concepts * 3.0 * own.steps * own.batch,
    }


def _esd_forwards(config: EsdConfig, concepts: int) -> dict[str, float]:
    steps = float(config.steps * config.batch)
    return {"ways to x_t": steps * (config.sampling_steps - 1), "training": 5 * steps}


def _closed_form_memory(config: Any, backend: Any) -> tuple[int, str]:
    return 6 * backend.context_width**2 * 8, "for the closed form"


def _esd_memory(config: EsdConfig, backend: Any) -> tuple[int, str]:
    trained = [p for name, p in backend.unet.named_parameters() if config.trains(name)]
    count = sum(p.numel() for p in trained)
    size = sum(p.numel() * (16 + p.element_size()) for p in trained)
    return size, f"for differences, gradients, Adam's moments and sums of {count / 1e6:.1f} million weights"


_METHODS = {
    ErasureConfig: Method(
        lambda c: True,
        lambda c: ("lora",) * c.alignment_on + ("edit lora",) * c.closed_form_on,
        _realera_forwards, _closed_form_memory, _realera,
    ),
    MassConfig: Method(lambda c: True, lambda c: ("lora",), _mass_forwards, _closed_form_memory, _mass),
    UceConfig: Method(lambda c: c.to_anchor, lambda c: ("lora",), lambda c, concepts: {}, _closed_form_memory, _uce),
    EsdConfig: Method(lambda c: False, lambda c: (), _esd_forwards, _esd_memory, _esd),
}  # fmt: skip
