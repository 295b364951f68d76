"""``python -m realera_nodes.bench.speed closed-form|fusion|training|streaming``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...cli.common import Commands, friendly
from ...core.errors import ErasureError
from ...core.settings import Range, require
from .measure import save

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, cls=Commands,
                  help="What erasing costs, beside the plain way of doing it.")  # fmt: skip
console = Console()
SECONDS = Range(0, 1_000_000)
Out = Annotated[Path | None, typer.Option("--out", help="write the results to this JSON file")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="runs of each measurement; medians are shown")]


@contextmanager
def _friendly() -> Iterator[None]:
    # folders are removed on the way out, so being terminated must be an exception too
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with friendly():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command("closed-form")
def closed_form_command(
    model: Annotated[list[str], typer.Option("--model", help="sd14, sdxl; may be given twice")] = ["sd14", "sdxl"],  # noqa: B006
    concepts: Annotated[list[int], typer.Option("--concepts", min=1, help="may be given often")] = [1, 10, 100, 1000],  # noqa: B006
    layers: Annotated[int, typer.Option("--layers", min=0, help="projections of the model; 0 is all")] = 0,
    repeats: Repeats = 3,
    budget: Annotated[float, typer.Option("--budget", help="seconds above which the plain formula is measured in part")] = 120,
    out: Out = None,
) -> None:
    """Seconds and memory of the closed form for many concepts, against the plain formula and the operation count."""
    from . import closed_form

    with _friendly():
        require("budget", budget, SECONDS)
        unknown = set(model) - set(closed_form.GEOMETRIES)
        if unknown:
            raise ErasureError(
                f"--model {' '.join(sorted(unknown))} is unknown: choose among {', '.join(closed_form.GEOMETRIES)}."
            )
        chosen = [closed_form.GEOMETRIES[name] for name in model]
        if layers:
            chosen = [g.part(layers) for g in chosen]
        save(out, closed_form.run(chosen, sorted(set(concepts)), repeats, budget, console))


@app.command("fusion")
def fusion_command(
    model: Annotated[str, typer.Option("--model", help="sd14 or sdxl")] = "sd14",
    loras: Annotated[list[int], typer.Option("--loras", min=1, help="may be given often")] = [1, 10, 100],  # noqa: B006
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="prompts of 77 tokens a LoRA")] = 30,
    layers: Annotated[int, typer.Option("--layers", min=0, help="projections of the model; 0 is all")] = 0,
    repeats: Repeats = 3,
    budget: Annotated[float, typer.Option("--budget", help="seconds above which the plain formula is measured in part")] = 120,
    out: Out = None,
) -> None:
    """Seconds and memory of fusing many LoRAs, against the plain formula with all text states kept."""
    from . import closed_form, fusion

    with _friendly():
        require("budget", budget, SECONDS)
        if model not in closed_form.GEOMETRIES:
            raise ErasureError(f"--model {model} is unknown: choose among {', '.join(closed_form.GEOMETRIES)}.")
        geometry = closed_form.GEOMETRIES[model]
        chosen = geometry.part(layers) if layers else geometry
        save(out, fusion.run(chosen, sorted(set(loras)), repeats, budget, console, prompts))


@app.command("training")
def training_command(
    width: Annotated[int, typer.Option("--width", min=32, help="channels of SD1.4's geometry, a multiple of 32")] = 128,
    side: Annotated[int, typer.Option("--side", min=8, help="side of its latents, a multiple of 8")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="latents of an odd step")] = 1,
    repeats: Repeats = 10,
    out: Out = None,
) -> None:
    """Seconds of an odd and an even training step, against a plain forward, forward and backward."""
    from . import training

    with _friendly():
        if width % 32 or side % 8:
            raise ErasureError(f"--width {width} --side {side}: they must be multiples of 32 and of 8.")
        save(out, training.run([training.sd14_geometry(width, side), training.EMBEDDED], repeats, batch, console))


@app.command("streaming")
def streaming_command(
    gb: Annotated[float, typer.Option("--gb", help="size of the checkpoint; twice as much space is needed")] = 4.0,
    folder: Annotated[Path | None, typer.Option("--folder", exists=True, file_okay=False, help="where to write")] = None,
    repeats: Repeats = 5,
    out: Out = None,
) -> None:
    """Speed and memory of writing an edited checkpoint, against cp."""
    from . import streaming

    with _friendly():
        require("gb", gb, Range(0.001, 100_000))
        save(out, streaming.run(gb, folder, repeats, console))


if __name__ == "__main__":
    app()
