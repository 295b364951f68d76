"""mine and inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..core.concepts import Concept
from ..core.phrases import phrase_of
from ..core.settings import Range, require
from ..erasure import ErasureConfig
from ..settings import config_from, read_toml, with_settings
from .common import console, friendly, progress_bars
from .erase import CheckpointArg, ConfigOpt, KindOpt, SetOpt


def mine(
    checkpoint: CheckpointArg,
    concept: Annotated[str, typer.Option("--concept", "-c", help="The concept whose neighborhood is looked at.")],
    anchor: Annotated[str, typer.Option("--anchor", "-a", help="What it would become.")] = "a thing",
    kind: KindOpt = "object",
    word: Annotated[list[str], typer.Option(help="A word or phrase of yours to judge as well; repeat.")] = [],  # noqa: B006
    plot: Annotated[Path | None, typer.Option(help="Draw the neighborhood as PNG.")] = None,
    top: Annotated[int, typer.Option(help="How many words to list.")] = 30,
    config: ConfigOpt = None,
    settings: SetOpt = [],  # noqa: B006
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plot of an earlier run.")] = False,
) -> None:
    """Show what lies around a concept: words that go with it, and a map of neighbors, beyond-concept samples and anchor."""
    with friendly():
        from ..backends.loading import load_backend
        from ..formats.atomic import check_target
        from ..job import open_source
        from ..neighborhood import draw_map, survey

        require("top", top, Range(0, 100_000))
        chosen = with_settings(config_from(read_toml(config) if config else {}, ErasureConfig()), settings)
        target = Concept(concept, anchor, kind)
        own = [phrase_of(w, "a --word is empty: write a word or phrase, or leave it out.", "a --word") for w in word]
        if plot:
            check_target(plot, overwrite)
            import matplotlib  # noqa: F401 missing, it is told now
        source = open_source(checkpoint)
        with progress_bars() as progress:
            mined, (around,) = survey(load_backend(source.load), [target], chosen, own, progress)
        shown = Table("word", "cosine", "distance", "in text space", "response", "erased with it")
        erased = set(mined.words)
        words = sorted(mined.named[target.phrase], key=lambda w: -(w.response or 0))
        for w in [*(w for w in words if w.word in own), *(w for w in words[:top] if w.word not in own)]:
            shown.add_row(w.word, f"{w.cosine:.2f}", f"{w.distance:.2f}", "inside" if w.inside else "",
                          f"{w.response:.2f}", "yes" if w.word in erased else "")  # fmt: skip
        console.print(shown)
        if plot:
            draw_map(around, plot, overwrite)
            console.print(f"wrote {plot}", highlight=False, soft_wrap=True)


def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors checkpoint or LoRA, or a diffusers folder.")],
) -> None:
    """Print what a file is and, if it was erased, what was erased from which model and how."""
    with friendly():
        from ..formats.metadata import inspect_file

        console.print_json(json.dumps(inspect_file(file), default=str))


def register(app: typer.Typer) -> None:
    app.command("mine")(mine)
    app.command("inspect")(inspect)
