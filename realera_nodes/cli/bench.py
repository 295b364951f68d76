"""bench: the erasure benchmark, one command a protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..core.errors import ErasureError
from ..spread import EXECUTORS
from .common import Commands, console, friendly

if TYPE_CHECKING:
    from ..bench.erasure.run import Bench

#: what is compared where nothing else is asked for
DEFAULTS = {
    "objects": "original,uce-new,uce-old,esd-x,esd-u,mace,realera",
    "ablation": "original,closed-form,+alignment,+neighbors,+beyond,+named-neighbors,realera",
    "mass": "original,uce-new,mace-refinement,mace-sum,mace-sum-cfis,mace-no-cfis,mace,realera-mass",
    "styles": "original,uce-new,mace,realera-mass",
    "celebrities": "original,uce-new,mace,realera-mass",
    "explicit": "original,uce-new,esd-u,mace,realera",
    "coco": "original,uce-new,esd-x,mace,realera",
}
TITLES = {
    "objects": "Objects, one at a time (MACE Table 1): Acc_e, Acc_s, Acc_g, H_o, residue.",
    "ablation": "RealEra's components (its Table 3), or surfaces of two settings (its Figure 5).",
    "mass": "CIFAR-10's ten classes at once: closed forms, sums of LoRAs, fusion (after MACE Table 4).",
    "styles": "Artistic styles (MACE Table 3); on the embedded model its own four styles.",
    "celebrities": "Celebrities (MACE Figure 7, Table 4); on the embedded model its persons.",
    "explicit": "Explicit content on I2P (MACE Table 2).",
    "coco": "Regular content: FID and CLIP score on MS-COCO captions; distances on the embedded model.",
}
app = typer.Typer(
    no_args_is_help=True, cls=Commands, help="The erasure benchmark: what is gone and what stays, every method in one run."
)


def words_of(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(w.strip() for w in text.split(",") if w.strip())


def numbers_of(text: str) -> tuple[float, ...]:
    """Numbers between commas. ErasureError: one is none."""
    try:
        return tuple(float(w) for w in words_of(text))
    except ValueError as error:
        raise ErasureError(f'"{text}" must be numbers between commas, such as 0.3,0.6,0.9.') from error


def make_command(protocol: str) -> Callable[..., None]:
    """The command of a protocol. They differ in name and defaults."""

    def command(
        out: Annotated[Path, typer.Option("--out", help="Folder of tables, figures and pictures; a stopped run in it goes on.")],
        model: Annotated[str, typer.Option(help='"demo", a .safetensors checkpoint or a diffusers folder.')] = "demo",
        methods: Annotated[
            str, typer.Option(help="Between commas; name@section.key=value is a row with that setting.")
        ] = DEFAULTS[protocol],
        split: Annotated[str | None, typer.Option(help="Of the embedded model's concepts: tuning or test (default).")] = None,
        concepts: Annotated[str, typer.Option(help="Only these of the protocol's concepts, between commas.")] = "",
        pictures: Annotated[int | None, typer.Option(help="Pictures of each prompt; the paper's number if not given.")] = None,
        others: Annotated[int | None, typer.Option(help="At most so many concepts that must stay.")] = None,
        steps: Annotated[int | None, typer.Option(help="Denoising steps: 20 on the embedded model, else 50.")] = None,
        guidance: Annotated[float | None, typer.Option(help="Guidance: 5 on the embedded model, else 7.5.")] = None,
        seed: Annotated[int, typer.Option(help="First seed of each prompt's pictures.")] = 0,
        settings: Annotated[list[str], typer.Option("--set", help="section.key=value, for all methods that have it.")] = [],  # noqa: B006
        scorer: Annotated[
            str | None, typer.Option(help="embedded, embedded-style, clip, clip-score, nudenet, giphy, none.")
        ] = None,
        accuracy: Annotated[str, typer.Option(help="Shown accuracy: top1 or probability.")] = "top1",
        preset: Annotated[str | None, typer.Option(help="Of celebrities, styles, coco: one of the papers' sets.")] = None,
        setup: Annotated[str, typer.Option(help="Of celebrities and styles: mace or realera.")] = "mace",
        prompts: Annotated[Path | None, typer.Option(help="I2P's CSV, or MS-COCO's captions.")] = None,
        captions: Annotated[int, typer.Option(help="How many captions of coco.")] = 30_000,
        clip: Annotated[str | None, typer.Option(help="CLIP's name or folder; openai/clip-vit-base-patch32 by default.")] = None,
        detections: Annotated[Path | None, typer.Option(help="CSV of the GIPHY Celebrity Detector's outputs.")] = None,
        real: Annotated[Path | None, typer.Option(help="Folder of real pictures, for FID.")] = None,
        inception: Annotated[Path | None, typer.Option(help="Inception's weights for FID, if they cannot be downloaded.")] = None,
        surface: Annotated[str | None, typer.Option(help="Of ablation: d-s or m-n, in place of --methods.")] = None,
        surface_of: Annotated[str, typer.Option(help="The method whose settings a surface varies.")] = "+beyond",
        surface_x: Annotated[str, typer.Option(help="Values of D1, or of M, between commas.")] = "",
        surface_y: Annotated[str, typer.Option(help="Values of S2, or of N, between commas.")] = "",
        size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the model's own if not given.")] = None,
        prediction: Annotated[str | None, typer.Option(help="epsilon or v_prediction, where a file does not say.")] = None,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if torch sees one.")] = None,
        batch: Annotated[int, typer.Option(help="Pictures that are drawn together.")] = 16,
        jobs: Annotated[int, typer.Option(help="Rows that are made at a time.")] = 1,
        executor: Annotated[str, typer.Option(help=" or ".join(EXECUTORS) + ": where they are made.")] = EXECUTORS[0],
        picture_folder: Annotated[Path | None, typer.Option("--cache", help="Folder of the pictures, for several runs.")] = None,
        keep_edits: Annotated[bool, typer.Option("--keep-edits", help="Keep each method's change of the weights.")] = False,
    ) -> None:
        with friendly():
            from ..bench.erasure.figures import surface_methods
            from ..bench.erasure.measures import ACCURACIES
            from ..bench.erasure.protocols import Sizes
            from ..bench.erasure.run import Bench
            from ..bench.erasure.scorers import CLIP

            if accuracy not in ACCURACIES:
                raise ErasureError(f'accuracy is "{accuracy}": choose one of {", ".join(ACCURACIES)}.')
            points = {}
            if surface:
                if protocol != "ablation":
                    raise ErasureError("--surface is for bench ablation: leave it out here.")
                points = surface_methods(surface, surface_of, numbers_of(surface_x), numbers_of(surface_y))
            elif surface_x or surface_y:
                raise ErasureError("--surface-x and --surface-y are values for a --surface: say which, d-s or m-n.")
            sizes = Sizes(pictures, others, words_of(concepts), seed, split, preset, setup, prompts, captions)
            bench = Bench(
                protocol, tuple(points) or words_of(methods), out, model, sizes, tuple(settings), scorer, steps, guidance, size,
                prediction, device, batch, picture_folder, keep_edits, clip or CLIP, detections, real, inception,
            )  # fmt: skip
            perform(bench, accuracy, jobs, executor, surface, points)

    command.__doc__ = TITLES[protocol]
    return command


def perform(bench: Bench, accuracy: str, jobs: int, executor: str, surface: str | None, points: dict) -> None:
    """Runs a benchmark and writes its tables and figures."""
    from ..bench.erasure.figures import draw_grid, draw_surface, draw_tradeoff
    from ..bench.erasure.pictures import PictureStore
    from ..bench.erasure.run import run
    from ..bench.erasure.tables import write_tables

    with _bars() as (progress, on_row):
        rows = run(bench, jobs, executor, progress, on_row)
    title = f"{bench.protocol} on {bench.model}" + (f", {bench.sizes.split} split" if bench.sizes.split else "")
    facts: dict[str, Any] = {"protocol": bench.protocol, "model": bench.model, "split": bench.sizes.split}
    summary = write_tables(bench.out, title, rows, accuracy, facts)
    written = ["table.md", "table.csv", "table.json", "pictures.csv", "grid.png"]
    draw_grid(bench.out / "grid.png", rows, PictureStore(bench.pictures or bench.out / "pictures"))
    if draw_tradeoff(bench.out / "tradeoff.png", summary):
        written.append("tradeoff.png")
    if surface:
        draw_surface(bench.out / "surface.png", surface, points, summary)
        written += ["surface.png", "surface.csv"]
    console.print((bench.out / "table.md").read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    console.print(f"in {bench.out}: {', '.join(written)}", highlight=False, soft_wrap=True)


@contextmanager
def _bars() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[dict, int, int], None]]]:
    """One bar for all rows, one for what is going on, and a line for each row that is done."""
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        whole, now = bars.add_task("rows", total=None), bars.add_task("", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(now, description=stage, completed=done, total=total)

        def on_row(row: dict, done: int, total: int) -> None:
            bars.update(whole, completed=done, total=total)
            bars.console.print(f"{done}/{total} {row['method']}: {row['case']}", highlight=False, markup=False, soft_wrap=True)

        yield progress, on_row


for _name in TITLES:
    app.command(_name)(make_command(_name))


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bench")
