"""What an erasure costs: seconds, and the most memory it held at once."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Seconds, and the peak in bytes, the model itself included: of the GPU where one computes, else resident on the CPU.

    ``memory`` is None where the system cannot start counting anew (Linux can): an earlier method's peak would be shown.
    """

    seconds: float = 0.0
    memory: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Fills the cost in when the block ends."""
    cost, gpu = Cost(), device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    counts = gpu or _restart()
    start = time.perf_counter()
    yield cost
    if gpu:
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - start
    if counts:
        cost.memory = torch.cuda.max_memory_allocated(device) if gpu else _peak()


def _restart() -> bool:
    """Sets this process's peak resident set back to its present size; False where that is not possible."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8", errors="replace"))
    return int(found[1]) * 1024 if found else None
