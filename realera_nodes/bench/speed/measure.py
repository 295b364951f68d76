"""How things are measured: fresh processes, peak memory, the machine's own rates, and what the machine is."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...core.errors import ErasureError


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a new interpreter, so that its peak memory is its own. All must be picklable.

    Raises:
        ErasureError: the process was killed, as the kernel does when memory runs out.
        RuntimeError: the function raised; with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        done, value = receiver.recv()
    except EOFError as error:
        process.join()
        raise ErasureError(
            f"a measurement ended with exit code {process.exitcode}, probably for want of memory: measure a smaller case."
        ) from error
    except BaseException:
        process.kill()
        process.join()
        raise
    process.join()
    if not done:
        raise RuntimeError(f"a measurement failed:\n{value}")
    return value


def _child(sender: Any, function: Callable[..., Any], args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent ends this process
    try:
        sender.send((True, function(*args)))
    except Exception:
        sender.send((False, traceback.format_exc()))


def peak_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux: VmHWM, as ru_maxrss of a new process begins at its parent's. Raises ErasureError on Windows.
    """
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8", errors="replace"))
        if match:
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError as error:
        raise ErasureError("peak memory can be measured on Linux and macOS only: run the benchmark there.") from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Seconds by stage, summed: ``with clock("solve"): ...``. What runs between the blocks is not counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def matmul_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Floating point operations a second of a square product on the CPU: the median of ``repeats``."""
    a = torch.randn(size, size, dtype=torch.float32).to(dtype)
    b, times = a @ a, []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a, out=b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times)


def machine() -> dict[str, Any]:
    """Processor, cores, threads and versions, for the results' file."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8", errors="replace")) if info.exists() else None
    return {
        "processor": match[1] if match else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def save(out: Path | None, results: Any) -> None:
    """Results with the machine's description as JSON, if a file is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {out}")


def verdict(met: bool) -> str:
    return "[green]met[/green]" if met else "[red]missed[/red]"
