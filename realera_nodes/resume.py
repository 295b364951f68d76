"""Stopped jobs go on: answers of mining and the training's state in the user's cache, named by all that decides the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import cached, forget, keep, read_or
from .core.concepts import Concept
from .core.training import TrainState
from .formats.stream import SafetensorsFile, write_tensors

if TYPE_CHECKING:
    from .job import Job

#: steps between saved states
EVERY = 20


def state_path(job: Job, base_sha256: str) -> Path:
    """Where a job's training state lives: same model, concepts and settings, same file."""
    method = [type(job.config).__name__, asdict(job.config), job.size, job.prediction, [asdict(p) for p in job.retained]]
    facts = json.dumps([base_sha256, [described(c) for c in job.concepts], method], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:24]
    return cached("training", f"{key}.safetensors")


def answers_path(job: Job, base_sha256: str) -> Path:
    """The folder of what the model answered in a job, beside its training's state."""
    return state_path(job, base_sha256).with_suffix(".answers")


class Answers:
    """What a model answered in a job that may be stopped: a file for each question, until the job is done.

    A file that is lost, damaged or cannot be written costs its time again and nothing else (cache.read_or, cache.keep).

    Args:
        folder: where they are kept; None keeps nothing
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def once(self, question: list[Any], ask: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The answer, kept or asked for now. ``question`` holds plain values, all that the answer depends on beside the job's."""
        if self.folder is None:
            return dict(ask())
        path = self.folder / f"{hashlib.sha256(json.dumps(question).encode()).hexdigest()[:24]}.safetensors"
        found = read_or(path, _tensors, "what the model answered before")
        if found is not None:
            return found
        answer = {name: value.detach().cpu() for name, value in ask().items()}
        keep(path, lambda where: write_tensors(where, answer, {}, overwrite=True), "what the model answered")
        return answer

    def forget(self) -> None:
        """The job is done."""
        if self.folder is not None:
            forget(self.folder)


def _tensors(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile.open(path)
    return {name: file.read(name) for name in file.entries}


def described(concept: Concept) -> dict[str, Any]:
    """A concept for a name: pictures by their hash."""
    words = asdict(replace(concept, images=None, masks=None))
    for name in ("images", "masks"):
        pixels = getattr(concept, name)
        if pixels is not None:
            words[name] = hashlib.sha256(pixels.float().contiguous().numpy().tobytes()).hexdigest()
    return words


def save_state(state: TrainState, path: Path) -> None:
    """Writes a state, whole or not at all. Where it cannot be kept, the training goes on and cannot be continued."""
    tensors = {f"{kind}.{i}": t.detach() for kind in ("parameters", "first", "second")
               for i, t in enumerate(getattr(state, kind))}  # fmt: skip
    assert state.generator is not None
    tensors["generator"] = state.generator
    facts = {"step": str(state.step), "losses": json.dumps(state.losses), "held": json.dumps(state.held)}
    keep(path, lambda p: write_tensors(p, tensors, facts, overwrite=True), "the training's state")


def load_state(path: Path) -> TrainState | None:
    """The saved state, or None where there is none that can be read."""
    return read_or(path, _read_state, "the state of a stopped training")


def _read_state(path: Path) -> TrainState:
    file = SafetensorsFile.open(path)
    parts: dict[str, list[torch.Tensor]] = {"parameters": [], "first": [], "second": []}
    for kind, tensors in parts.items():
        while f"{kind}.{len(tensors)}" in file.entries:
            tensors.append(file.read(f"{kind}.{len(tensors)}"))
    return TrainState(
        int(file.metadata["step"]), json.loads(file.metadata["losses"]), json.loads(file.metadata["held"]),
        parts["parameters"], parts["first"], parts["second"], file.read("generator"),
    )  # fmt: skip
