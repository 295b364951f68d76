"""Concept LoRAs of a mass erasure in several processes: each is independent, and each lands on the shelf.

Workers of a Ray cluster must see the checkpoint and the shelf's folder under the same paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .job import Job, load, open_source, prior_of
from .mass_config import MassConfig
from .mass_work import Work, train_concept
from .mining import silent
from .shelf import Base, FolderShelf
from .spread import check_executor, spread

#: called with (concept, how many are finished, of how many)
OnConcept = Callable[[str, int, int], None]


def shelf_of(job: Job, folder: Path | None = None) -> FolderShelf:
    """The shelf of a job's concepts, without loading the model."""
    assert isinstance(job.config, MassConfig)
    base = Base.of(open_source(job.checkpoint).checkpoint, prediction=job.prediction, size=job.size)
    return FolderShelf.of(job.concepts, job.retained, job.config, base, folder, prior_of(job))


#: what a worker has loaded, by the shelf's key: it serves one erasure after another concept
_LOADED: dict[str, Work] = {}


def train_one(job: Job, shelf: FolderShelf, index: int, threads: int) -> str:
    """Trains and shelves one of a job's concepts in this process, if the shelf lacks it; returns its phrase. Runs in a worker."""
    import torch

    assert isinstance(job.config, MassConfig)
    concept = job.concepts[index]
    if not shelf.path(concept).exists():
        torch.set_num_threads(threads)
        if shelf.key not in _LOADED:
            _LOADED.clear()
            backend = load(job, open_source(job.checkpoint))
            _LOADED[shelf.key] = Work(backend, job.concepts, job.retained, job.config, silent, prior_of(job))
        shelf.save(concept, train_concept(_LOADED[shelf.key], index)[0])
    return concept.phrase


def train_all(job: Job, jobs: int, executor: str = "local", on_concept: OnConcept | None = None) -> None:
    """Trains what the shelf lacks, ``jobs`` concepts at a time.

    Raises:
        ErasureError: unknown executor, ray is not installed, or a worker's own.
    """
    check_executor(executor, jobs)
    shelf = shelf_of(job)
    missing = [i for i, c in enumerate(job.concepts) if not shelf.path(c).exists()]
    done, threads = len(job.concepts) - len(missing), max(1, (os.cpu_count() or 1) // jobs)
    try:
        for phrase in spread(train_one, [(job, shelf, i, threads) for i in missing], jobs, executor) if missing else ():
            done += 1
            if on_concept:
                on_concept(phrase, done, len(job.concepts))
    finally:
        _LOADED.clear()  # what one job trains in this process
