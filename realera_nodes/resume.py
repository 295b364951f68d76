"""Stopped trainings go on: the state of a run in the user's cache, named by all that decides its result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cache import cached, keep, read_or
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
