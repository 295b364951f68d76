"""What the commands share: consoles, one-sentence errors, progress bars."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from ..core.errors import ErasureError, says_out_of_memory

CANCELLED = "cancelled: no file is half-written, the model is untouched."
#: phrases, folders and files are shown as they are: [bold] and :airplane: are words like others
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


def fail(error: Exception) -> typer.Exit:
    """One sentence on stderr and exit code 1."""
    with suppress(OSError):  # nobody listens there either
        errors.print("error:", style="red", end=" ")
        errors.print(str(error), soft_wrap=True)
    return typer.Exit(1)


def explained(error: BaseException) -> Exception | None:
    """What a user can mend, as an error that says it in a sentence; None for an error of the program."""
    if isinstance(error, ModuleNotFoundError):
        return RuntimeError(f'{error.name} is not installed: run pip install "realera-nodes[headless]".')
    if isinstance(error, MemoryError) or says_out_of_memory(error):
        return RuntimeError("there is too little memory for this: lower --size, --pictures or a batch, or close other programs.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return RuntimeError("there is no space left to write to: free some, or choose another place.")
    return error if isinstance(error, ErasureError | OSError) else None


@contextmanager
def friendly() -> Iterator[None]:
    """Turns what users can mend into a sentence and exit code 1; 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        with suppress(OSError):
            errors.print(CANCELLED)
        raise typer.Exit(130) from error
    except BrokenPipeError as error:  # who reads has seen enough, as head has
        silence(sys.stdout)
        raise typer.Exit(1) from error
    except Exception as error:
        told = explained(error)
        if told is None:
            raise
        raise fail(told) from error


def silence(stream: Any) -> None:
    """Nothing more is written to a stream that cannot be written to, not at the end of the process either."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Commands(TyperGroup):
    """Commands whose errors are sentences, whatever they do before their own ``friendly`` begins."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command whose help is shown as it is written: typer takes [[concepts]] in it for markup."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and getattr(command, "rich_markup_mode", None) == "rich" and not hasattr(command, "plain"):
            command.plain = True  # type: ignore[attr-defined]
            for part in (command, *command.params):
                if getattr(part, "help", None):
                    part.help = escape(part.help)  # type: ignore[attr-defined]
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a console or file of one code page lacks letters of words and of files' names
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with friendly():
            return super().invoke(ctx)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total) that draws a bar with time left for each stage."""
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<22}", markup=False),
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
