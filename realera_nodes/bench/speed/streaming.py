"""Writing an edited checkpoint beside ``cp`` of the same file.

``write_edited`` returns when the file is on the disk (fsync), ``cp`` when the kernel has taken the bytes. So both are
timed twice: until everything is written, and until it is on the disk (``cp`` followed by fsync). The two take turns; the
source stays in the page cache as far as memory allows, nothing is dropped from it, and dirty pages are flushed before each
turn.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...core.closed_form import Transform
from ...core.errors import ErasureError
from ...formats.atomic import require_space
from ...formats.checkpoint import open_checkpoint, write_edited
from ...formats.header import Entry, encode_header
from ...formats.stream import SafetensorsFile
from ...formats.windows import sync
from .measure import in_fresh_process, peak_bytes, verdict

WIDTH = 768
GOAL_SPEED, GOAL_MEMORY = 0.6, 1e9
#: output width by LDM block with cross-attention, as in SD1.4
ATTENTION = {
    **{f"input_blocks.{i}": out for i, out in ((1, 320), (2, 320), (4, 640), (5, 640), (7, 1280), (8, 1280))},
    "middle_block": 1280,
    **{f"output_blocks.{i}": {3: 1280, 4: 1280, 5: 1280, 6: 640, 7: 640, 8: 640}.get(i, 320) for i in range(3, 12)},
}
BLOCKS = [*(f"input_blocks.{i}" for i in range(12)), "middle_block", *(f"output_blocks.{i}" for i in range(12))]
FOREIGN = [f"first_stage_model.padding.{i}" for i in range(4)] + [f"unknown.padding.{i}" for i in range(4)]


def layout(nbytes: int) -> dict[str, Entry]:
    """Tensors of a float16 checkpoint of about ``nbytes``: SD1.4's 32 projections, between other weights of one size.

    Raises:
        ErasureError: the projections alone are larger.
    """
    projections = 2 * 2 * WIDTH * sum(ATTENTION.values())
    pad = (nbytes - projections) // (2 * (len(BLOCKS) + len(FOREIGN)))
    if pad < 1:
        raise ErasureError(f"a checkpoint with SD1.4's projections has {projections / 1e9:.3f} GB at least: raise --gb.")
    shapes: dict[str, tuple[int, ...]] = {}
    for block in BLOCKS:
        last = "op" if block in ("input_blocks.3", "input_blocks.6", "input_blocks.9") else "in_layers.2"
        shapes[f"model.diffusion_model.{block}.0.{last}.weight"] = (pad,)
        if block in ATTENTION:
            stem = f"model.diffusion_model.{block}.1.transformer_blocks.0.attn2"
            shapes |= {f"{stem}.to_{p}.weight": (ATTENTION[block], WIDTH) for p in "kv"}
    shapes |= dict.fromkeys(FOREIGN, (pad,))
    entries, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        entries[name] = Entry("F16", shape, at, end)
        at = end
    return entries


def make_checkpoint(path: Path, nbytes: int) -> None:
    """Writes a random checkpoint tensor by tensor; the same bytes for the same size."""
    generator = torch.Generator().manual_seed(0)
    entries = layout(nbytes)
    noise = torch.randn(8 << 20, generator=generator).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(encode_header(entries, {}))
        for entry in entries.values():
            left = entry.nbytes
            while left:
                left -= file.write(memoryview(noise)[:left])
        file.flush()
        os.fsync(file.fileno())


def edit() -> Transform:
    """A transform like that of an edit: all that matters here is its size."""
    change = 0.01 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Transform(change, 1.0, 0.0)


def measure_ours(source: Path, target: Path) -> dict[str, float]:
    """Seconds until written and until on the disk, peak memory in bytes and its growth. To be run in a fresh process."""
    transform, written = edit(), 0.0
    torch.randn(WIDTH, WIDTH) @ transform.change.float()  # threads
    before, start = peak_bytes(), time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal written
        if done == total:
            written = time.perf_counter() - start

    checkpoint = open_checkpoint(source)
    changes = {name: lambda w: w + transform.delta(w) for name in checkpoint.architecture.projections}
    write_edited(checkpoint, target, changes, {}, progress=progress)
    on_disk = time.perf_counter() - start
    return {"written": written, "on_disk": on_disk, "peak": peak_bytes(), "growth": peak_bytes() - before}


def measure_cp(source: Path, target: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "--", str(source), str(target)], check=True)
    written = time.perf_counter() - start
    sync(target)
    return {"written": written, "on_disk": time.perf_counter() - start}


def check(source: Path, target: Path) -> float:
    """The largest difference of a written projection from its edit in float64, relative to the edit.

    Raises:
        RuntimeError: the target's tensors are others than the source's.
    """
    a, b = SafetensorsFile.open(source), SafetensorsFile.open(target)
    if a.entries != b.entries:
        raise RuntimeError("the written checkpoint has other tensors than its source")
    change, gaps = edit().change, []
    for key in open_checkpoint(source).architecture.projections.values():
        wanted = (w := a.read(key).double()) @ change
        gaps.append(float((b.read(key).double() - w - wanted).norm() / wanted.norm()))
    return max(gaps)


def run(gigabytes: float, folder: Path | None, repeats: int, console: Console) -> dict[str, Any]:
    """Measures in a new folder inside ``folder`` (default: the system's temporary one), which is removed in any case."""
    nbytes = round(gigabytes * 1e9)
    layout(nbytes)
    ours: list[dict[str, float]] = []
    cp: list[dict[str, float]] = []
    gap = 0.0
    with tempfile.TemporaryDirectory(prefix="realera-speed-", dir=folder) as name:
        source, target = Path(name) / "source.safetensors", Path(name) / "target.safetensors"
        require_space(Path(name), 2 * nbytes)
        console.print(f"writing a random checkpoint of {gigabytes:g} GB to {name}")
        make_checkpoint(source, nbytes)
        for i in range(repeats):
            console.print(f"run {i + 1} of {repeats}: cp, then ours")
            for runs in (cp, ours):
                os.sync()
                runs.append(measure_cp(source, target) if runs is cp else in_fresh_process(measure_ours, source, target))
                if runs is ours and i == 0:
                    gap = check(source, target)
                target.unlink()
        size = source.stat().st_size
    table = Table(
        title=f"Writing {size / 1e9:.2f} GB: {repeats} runs in turn, medians; cp is the limit (each byte read and written once)"
    )
    for column in ("until", "ours", "cp", "ours", "cp", f"share of cp's speed (goal {GOAL_SPEED:.0%})"):
        table.add_column(column, justify="right")
    share = {}
    for until, label in (("written", "written"), ("on_disk", "on the disk")):
        a, b = median(r[until] for r in ours), median(r[until] for r in cp)
        share[until] = b / a
        table.add_row(label, f"{a:.2f} s", f"{b:.2f} s", f"{size / a / 1e9:.2f} GB/s", f"{size / b / 1e9:.2f} GB/s",
                      f"{share[until]:.0%} {verdict(share[until] >= GOAL_SPEED)}")  # fmt: skip
    console.print(table)
    peak, growth = max(r["peak"] for r in ours), max(r["growth"] for r in ours)
    console.print(f"peak memory {peak / 1e6:.0f} MB, of which {growth / 1e6:.0f} MB for writing (goal under 1 GB): "
                  f"{verdict(peak < GOAL_MEMORY)}; projections differ from a float64 edit by {gap:.1e} of the edit")  # fmt: skip
    return {"bytes": size, "ours": ours, "cp": cp, "share": share, "peak": peak, "growth": growth, "difference": gap}
