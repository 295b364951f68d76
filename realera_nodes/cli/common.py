"""What the commands share: consoles, one-sentence errors, progress bars."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..core.errors import ErasureError

for stream in (sys.stdout, sys.stderr):  # a console or file of one code page lacks letters: better a ? than a traceback
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
console = Console()
errors = Console(stderr=True)


def fail(error: Exception) -> typer.Exit:
    """One sentence on stderr and exit code 1."""
    errors.print("[red]error:[/red]", end=" ")
    errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


@contextmanager
def friendly() -> Iterator[None]:
    """Turns what users can mend into a sentence and exit code 1; 130 after Ctrl-C."""
    try:
        yield
    except (ErasureError, OSError) as error:
        raise fail(error) from error
    except ModuleNotFoundError as error:
        raise fail(RuntimeError(f'{error.name} is not installed: run pip install "realera-nodes[headless]".')) from error
    except KeyboardInterrupt as error:
        errors.print("cancelled: no file is half-written, the model is untouched.")
        raise typer.Exit(130) from error


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total) that draws a bar with time left for each stage."""
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
