"""Concept LoRAs of a mass erasure in several processes: each is independent, and each lands on the shelf.

Two executors behind one call: processes of this machine, or the workers of a Ray cluster (the ``ray`` extra), which then
must see the checkpoint and the shelf's folder under the same paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from .core.errors import ErasureError
from .job import Job, load, open_source
from .mass import MassConfig, Work, train_concept
from .mining import silent
from .shelf import FolderShelf

EXECUTORS = ("local", "ray")
#: called with (concept, how many are finished, of how many)
OnConcept = Callable[[str, int, int], None]


def shelf_of(job: Job, folder: Path | None = None) -> FolderShelf:
    """The shelf of a job's concepts, without loading the model."""
    assert isinstance(job.config, MassConfig)
    base = open_source(job.checkpoint).checkpoint
    return FolderShelf.of(job.concepts, job.retained, job.config, base, base.sha256(), folder)


#: what a worker has loaded, by the shelf's key: it serves one erasure after another concept
_LOADED: dict[str, Work] = {}


def train_one(job: Job, folder: Path, index: int, threads: int) -> str:
    """Trains and shelves one of a job's concepts in this process, if the shelf lacks it; returns its phrase. Runs in a worker."""
    import torch

    assert isinstance(job.config, MassConfig)
    concept, shelf = job.concepts[index], shelf_of(job, folder)
    if not shelf.path(concept).exists():
        torch.set_num_threads(threads)
        if shelf.key not in _LOADED:
            _LOADED.clear()
            backend = load(job, open_source(job.checkpoint))
            _LOADED[shelf.key] = Work(backend, job.concepts, job.retained, job.config, silent)
        shelf.save(concept, train_concept(_LOADED[shelf.key], index)[0])
    return concept.phrase


def train_all(job: Job, jobs: int, executor: str = "local", on_concept: OnConcept | None = None) -> None:
    """Trains what the shelf lacks, ``jobs`` concepts at a time.

    Raises:
        ErasureError: unknown executor, ray is not installed, or a worker's own.
    """
    if executor not in EXECUTORS:
        raise ErasureError(f'there is no executor "{executor}": choose one of {", ".join(EXECUTORS)}.')
    if jobs < 1:
        raise ErasureError(f"jobs is {jobs}: it must be 1 or more.")
    shelf = shelf_of(job)
    missing = [i for i, c in enumerate(job.concepts) if not shelf.path(c).exists()]
    done, threads = len(job.concepts) - len(missing), max(1, (os.cpu_count() or 1) // jobs)
    run = _on_ray if executor == "ray" else _here
    for phrase in run([(job, shelf.folder, i, threads) for i in missing], jobs) if missing else ():
        done += 1
        if on_concept:
            on_concept(phrase, done, len(job.concepts))


def _here(tasks: list[tuple], jobs: int) -> Iterator[str]:
    """Results of ``train_one`` for each task's arguments, as they come."""
    if jobs == 1:
        try:
            for task in tasks:
                yield train_one(*task)
        finally:
            _LOADED.clear()
        return
    # spawned: a forked process would inherit torch's threads in an unknown state
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(train_one, *task) for task in tasks]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C no further concept begins


def _on_ray(tasks: list[tuple], jobs: int) -> Iterator[str]:
    try:
        import ray
    except ImportError as error:
        raise ErasureError('ray is not installed: pip install "realera-nodes[ray]", or use the executor "local".') from error
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False)
    remote = ray.remote(train_one).options(num_cpus=1)
    queue: list[tuple] = list(tasks)
    running: list = []
    while queue or running:
        while queue and len(running) < jobs:
            running.append(remote.remote(*queue.pop(0)))
        ready, running = ray.wait(running, num_returns=1)
        try:
            yield ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            for left in running:
                ray.cancel(left)
            raise (error.cause if isinstance(error.cause, ErasureError) else error) from error
