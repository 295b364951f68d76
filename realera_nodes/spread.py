"""A function over many tasks: in this process, in several of this machine, or on a Ray cluster (the ``ray`` extra)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from .core.errors import ErasureError
from .core.settings import Range, require

EXECUTORS = ("local", "ray")
#: processes at a time; no more than there are tasks are ever started
JOBS = Range(1, 1024)


def check_executor(executor: str, jobs: int) -> None:
    """Raises ErasureError: unknown executor, no jobs, or ray is not installed."""
    if executor not in EXECUTORS:
        raise ErasureError(f'there is no executor "{executor}": choose one of {", ".join(EXECUTORS)}.')
    require("jobs", jobs, JOBS)
    if executor == "ray":
        _ray()


def spread(function: Callable[..., Any], tasks: Sequence[tuple], jobs: int, executor: str = "local") -> Iterator[Any]:
    """Results of ``function(*task)`` as they come, ``jobs`` at a time. Tasks must be picklable but for one local job.

    Raises:
        ErasureError: of ``check_executor``, or a worker's own.
    """
    check_executor(executor, jobs)
    if executor == "ray":
        yield from _on_ray(function, tasks, jobs)
        return
    if jobs == 1:
        for task in tasks:
            yield function(*task)
        return
    # 60: Windows cannot wait for more. Spawned: a forked process would inherit torch's threads in an unknown state
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks), 60)), mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(function, *task) for task in tasks]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C no further task begins


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ErasureError('ray is not installed: pip install "realera-nodes[ray]", or use the executor "local".') from error
    return ray


def _on_ray(function: Callable[..., Any], tasks: Sequence[tuple], jobs: int) -> Iterator[Any]:
    ray = _ray()
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False)
    remote = ray.remote(function).options(num_cpus=1)
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
