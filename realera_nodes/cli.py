"""``python -m realera_nodes ...``: the command line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Erase concepts from Stable Diffusion.")  # fmt: skip
console = Console()
errors = Console(stderr=True)

Out = Annotated[Path, typer.Option("--out", help="Folder to write to; made if missing.")]


class Layout(str, Enum):
    checkpoint = "checkpoint"
    diffusers = "diffusers"
    both = "both"


def fail(error: Exception) -> typer.Exit:
    """One sentence on stderr and exit code 1."""
    errors.print(f"[red]error:[/red] {error}", highlight=False)
    return typer.Exit(1)


@app.callback()
def main() -> None:
    """Erase concepts from Stable Diffusion."""


@app.command("demo-model")
def demo_model(
    out: Out,
    layout: Annotated[Layout, typer.Option(help="Single-file SD1.x checkpoint, diffusers folder, or both.")] = Layout.both,
) -> None:
    """Write the embedded model, a small Stable Diffusion, as files that ComfyUI and diffusers load."""
    from .demo.expand import DemoAssetError, expand

    try:
        with console.status("expanding the embedded model"):
            written = expand(out, layout.value)
    except (DemoAssetError, OSError) as error:
        raise fail(error) from error
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Out = Path("demo-output"),
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first picture in each row.")] = 0,
) -> None:
    """Draw what the embedded model knows: a labelled grid of its concepts, synonyms, styles and characters."""
    from .demo.expand import DemoAssetError
    from .demo.gallery import draw_gallery

    try:
        table = draw_gallery(out, steps=steps, seed=seed, console=console)
    except (DemoAssetError, OSError) as error:
        raise fail(error) from error
    except ImportError as error:
        raise fail(RuntimeError(f'{error.name} is not installed: run pip install "realera-nodes\\[headless]".')) from error
    console.print(table)
    console.print(f"pictures in {out.resolve() / 'gallery.png'}", highlight=False, soft_wrap=True)
