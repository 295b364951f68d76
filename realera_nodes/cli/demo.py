"""demo and demo-model: the embedded model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..core.phrases import same
from ..formats.atomic import check_target
from .common import console, friendly
from .erase import concepts_of, run_job


class Layout(str, Enum):
    checkpoint = "checkpoint"
    diffusers = "diffusers"
    both = "both"


def demo_model(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to; made if missing.")],
    layout: Annotated[Layout, typer.Option(help="Single-file SD1.x checkpoint, diffusers folder, or both.")] = Layout.both,
) -> None:
    """Write the embedded model, a small Stable Diffusion, as files that ComfyUI and diffusers load."""
    from ..demo.expand import expand

    with friendly():
        with console.status("expanding the embedded model"):
            written = expand(out, layout.value)
        for path in written:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to; made if missing.")] = Path("demo-output"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first picture in each row.")] = 0,
    gallery: Annotated[bool, typer.Option(help="First draw what the model knows.")] = True,
    erasure: Annotated[bool, typer.Option(help="Erase a concept and compare.")] = True,
    concept: Annotated[str, typer.Option("--concept", "-c", help="What to erase.")] = "airplane",
    anchor: Annotated[str, typer.Option("--anchor", "-a", help="What it becomes.")] = "sky",
) -> None:
    """Draw what the embedded model knows, then erase a concept from it and draw again: pictures, numbers, files."""
    from ..demo.gallery import draw_gallery
    from ..job import Job, prepare

    with friendly():
        words = [w for w in ("bird", "ship") if not same(w, concept) and not same(w, anchor)]
        job = Job(
            "demo", concepts_of([concept], [anchor], "object", words, {}), out, sampling_steps=steps, seed=seed, overwrite=True
        )
        prepare(job)
        check_target(out / "gallery.png", overwrite=True)
        if gallery:
            console.print(draw_gallery(out, steps=steps, seed=seed, console=console, each=2))
            console.print(f"pictures in {out.resolve() / 'gallery.png'}", highlight=False, soft_wrap=True)
        if erasure:
            run_job(job, dry_run=False)


def register(app: typer.Typer) -> None:
    app.command("demo-model")(demo_model)
    app.command("demo")(demo)
