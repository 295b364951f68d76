"""erase, edit, train-lora: one job with all or part of RealEra's components."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from ..core.concepts import Concept, Preserved
from ..core.errors import ErasureError
from ..erasure import ErasureConfig
from ..methods import METHODS, Config, config_of
from ..settings import concepts_from, config_from, read_toml, retained_from, with_settings
from .common import console, friendly, progress_bars

CheckpointArg = Annotated[
    str, typer.Argument(help='"demo", a .safetensors checkpoint (SD1.x, SD2.x, SDXL) or a diffusers folder.')
]
ConceptOpt = Annotated[list[str], typer.Option("--concept", "-c", help="What to erase; repeat for several.")]
AnchorOpt = Annotated[list[str], typer.Option("--anchor", "-a", help="What it becomes: one for all, or one for each concept.")]
KindOpt = Annotated[str, typer.Option(help="Prompt templates: object, person, style or explicit.")]
PreserveOpt = Annotated[
    list[str], typer.Option("--preserve", "-p", help="Concepts that must stay: --preserve bird 'ice cream' ship.")
]
ConfigOpt = Annotated[
    Path | None, typer.Option("--config", help="TOML with [[concepts]] and the method's sections, such as [neighbors].")
]
SetOpt = Annotated[list[str], typer.Option("--set", help="One setting, such as neighbors.m=20 or alignment.lr=3e-5; repeat.")]
MethodOpt = Annotated[str | None, typer.Option(help=", ".join(METHODS) + "; else what the config says, or realera.")]
OutOpt = Annotated[Path, typer.Option("--out", help="Folder to write to; made if missing.")]


def concepts_of(
    phrases: list[str], anchors: list[str], kind: str, preserve: list[str], table: dict[str, Any]
) -> tuple[Concept, ...]:  # fmt: skip
    """Concepts of the command line and of the config's ``[[concepts]]``."""
    if phrases and len(anchors) not in (1, len(phrases)):
        raise ErasureError(
            f"{len(phrases)} concepts and {len(anchors)} anchors: give one --anchor for all, or one for each --concept."
        )
    kept = tuple(Preserved(p) for p in preserve)
    given = anchors * len(phrases) if len(anchors) == 1 else anchors
    concepts = [Concept(p, a, kind, preserve=kept) for p, a in zip(phrases, given, strict=True)]
    for concept in concepts_from(table.get("concepts", [])):
        concepts.append(replace(concept, preserve=concept.preserve + kept) if kept else concept)
    return tuple(concepts)


def run_job(job: Any, dry_run: bool) -> None:
    """Plan or do a job and show its numbers."""
    from ..job import prepare, run
    from ..plan import plan

    if dry_run:
        console.print(plan(job), highlight=False, soft_wrap=True)
        return
    prepare(job)
    with progress_bars() as progress:
        table = run(job, progress)
    if table["after"]:
        shown = Table("", *table["after"], title=", ".join(c["concept"] for c in table["concepts"]) + " erased")
        for row in ("before", "after"):
            shown.add_row(row, *(f"{table[row][k]:.3f}" for k in table["after"]))
        console.print(shown)
    for concept, words in table["named_neighbors"].items():
        console.print(f"goes with {concept}: {', '.join(words) or 'no word of the vocabulary'}", highlight=False, soft_wrap=True)
    for note in table["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    took = table["seconds"]
    console.print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in took.items()), highlight=False)
    for name in table.get("removed", ()):
        console.print(f"removed {job.out / name}, which an earlier run left", highlight=False, markup=False, soft_wrap=True)
    for name in [*table["files"], "grid.png", "report.md", "report.json"]:
        console.print(f"wrote {job.out / name}", highlight=False, soft_wrap=True)


def make_command(closed_form: bool, alignment: bool, title: str):
    def command(
        checkpoint: CheckpointArg,
        out: OutOpt,
        concept: ConceptOpt = [],  # noqa: B006 typer reads it, nothing writes it
        anchor: AnchorOpt = [],  # noqa: B006
        kind: KindOpt = "object",
        preserve: PreserveOpt = [],  # noqa: B006
        residue: Annotated[list[str], typer.Option(help="Phrases that evoke the concept, for the report only.")] = [],  # noqa: B006
        config: ConfigOpt = None,
        settings: SetOpt = [],  # noqa: B006
        method: MethodOpt = None,
        neighbors: Annotated[bool, typer.Option(help="Mine and erase neighbors (Table 3, C).")] = True,
        beyond: Annotated[bool, typer.Option(help="Keep beyond-concept samples (Table 3, D).")] = True,
        pictures: Annotated[int, typer.Option(help="Pictures per prompt in the report.")] = 4,
        sampling_steps: Annotated[int, typer.Option(help="Denoising steps of the report's pictures.")] = 20,
        guidance: Annotated[float, typer.Option(help="Classifier-free guidance of the report's pictures.")] = 5.0,
        seed: Annotated[int, typer.Option(help="First seed of the report's pictures.")] = 0,
        size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the model's own if not given.")] = None,
        prediction: Annotated[str | None, typer.Option(help="epsilon or v_prediction, where a file does not say.")] = None,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if torch sees one.")] = None,
        checkpoint_file: Annotated[
            bool, typer.Option("--save-checkpoint/--no-save-checkpoint", help="Write the whole model.")
        ] = True,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, memory and time, and do nothing.")] = False,
    ) -> None:
        from ..job import Job

        with friendly():
            table = read_toml(config) if config else {}
            concepts = concepts_of(concept, anchor, kind, preserve, table)
            chosen = method or str(table.get("method", METHODS[0]))
            base: Config = config_of(chosen, concepts)
            if isinstance(base, ErasureConfig):
                base = replace(base, closed_form_on=closed_form, alignment_on=alignment, neighbors_on=neighbors, beyond_on=beyond)
            elif not (closed_form and alignment and neighbors and beyond):
                raise ErasureError(f"{chosen} has no such parts: use erase without --no-neighbors and --no-beyond.")
            made = with_settings(config_from({k: v for k, v in table.items() if k != "method"}, base), settings)
            job = Job(
                checkpoint, concepts, out, made, tuple(residue), pictures=pictures, sampling_steps=sampling_steps,
                guidance=guidance, seed=seed, size=size, prediction=prediction, device=device,
                save_checkpoint=checkpoint_file, overwrite=overwrite, retained=retained_from(table.get("retain", ())),
            )  # fmt: skip
            run_job(job, dry_run)

    command.__doc__ = title
    return command


class SeveralWords(TyperCommand):
    """Lets ``--preserve bird ship`` take all words up to the next option, as one would type it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        for word in args:
            if word.startswith("-"):
                option = word if word in ("--preserve", "-p", "--residue") else ""
                spread.append(word)
            elif option and spread[-1] != option:
                spread += [option, word]
            else:
                spread.append(word)
        return super().parse_args(ctx, spread)


def register(app: typer.Typer) -> None:
    app.command("erase", cls=SeveralWords)(
        make_command(True, True, "Erase concepts: mine, edit in closed form, train the LoRA, export, report.")
    )
    app.command("edit", cls=SeveralWords)(
        make_command(True, False, "Only the closed-form edit of W_K and W_V: seconds, no training.")
    )
    app.command("train-lora", cls=SeveralWords)(
        make_command(False, True, "Only the noise-alignment LoRA, on the checkpoint as it is.")
    )
