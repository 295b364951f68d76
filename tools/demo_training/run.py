"""What the training stages share: starting two processes, logging to CSV, saving atomically, averaging."""

from __future__ import annotations

import csv
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

#: keep freed memory instead of returning it to the system at each step; about 7% faster
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(128 << 20)}


def launch(worker: Callable, args, world: int = 2) -> None:
    """Runs ``worker(rank, world, args)`` in ``world`` single-threaded processes joined by gloo."""
    os.environ.update(MALLOC, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    torch.multiprocessing.spawn(_enter, args=(worker, world, args), nprocs=world)


def _enter(rank: int, worker: Callable, world: int, args) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        worker(rank, world, args)
    finally:
        dist.destroy_process_group()


class Log:
    """Appends rows to a CSV file and prints them."""

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.columns = path, columns
        if not path.exists():
            with path.open("w", newline="", encoding="utf-8") as f:
                csv.writer(f).writerow(columns)

    def row(self, *values) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as f:
            csv.writer(f).writerow(values)
        print("  ".join(f"{c} {v}" for c, v in zip(self.columns, values, strict=True)), flush=True)


def save_atomic(value, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")  # a suffix of its own, for "x.pt" and "x.0" side by side
    torch.save(value, temporary)
    temporary.replace(path)


@torch.no_grad()
def reduce_sum(tensors: list[Tensor], scale: float = 1.0) -> None:
    """Replaces tensors by ``scale`` times their sum over the processes, in one message."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat *= scale
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
