"""erase-many: a list or a preset of concepts by MACE or realera-mass, resumable, in as many processes as are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.concepts import Preserved
from ..core.errors import ErasureError
from ..core.phrases import phrase_of, spelled
from ..core.templates import CONTEXTS
from ..mass_config import METHODS
from ..methods import mass_config
from ..presets import load_preset, preset_names
from ..presets.settings import preset_config
from ..settings import concepts_from, config_from, read_toml, retained_from, with_settings
from ..spread import EXECUTORS, check_executor
from .common import console, friendly, progress_bars
from .erase import CheckpointArg, OutOpt, SetOpt, run_job

ListArg = Annotated[
    Path | None, typer.Argument(metavar="[LIST.toml]", help="[[concepts]], retain = [...], and the method's sections.")
]


def erase_many_command(
    checkpoint: CheckpointArg,
    out: OutOpt,
    concepts_file: ListArg = None,
    preset: Annotated[str | None, typer.Option(help="One of the papers' sets: see the command presets.")] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".")] = METHODS[0],
    settings: SetOpt = [],  # noqa: B006
    prior: Annotated[Path | None, typer.Option(help="A file of the command prior, in place of the shipped captions.")] = None,
    jobs: Annotated[int, typer.Option(help="Concepts that are trained at a time.")] = 1,
    executor: Annotated[str, typer.Option(help=" or ".join(EXECUTORS) + ": where they are trained.")] = EXECUTORS[0],
    pictures: Annotated[int, typer.Option(help="Pictures per prompt in the report.")] = 2,
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
) -> None:
    """Erase many concepts at once (MACE). A stopped run goes on: finished concepts are not trained again."""
    from ..checks import check_loaded
    from ..job import Job, load, prepare, probes_of
    from ..memory import free_memory
    from ..parallel import shelf_of, train_all

    with friendly():
        if (preset is None) == (concepts_file is None):
            raise ErasureError(f"give either a LIST.toml or --preset: {', '.join(preset_names())}.")
        if preset is not None:
            chosen = load_preset(preset)
            concepts, retained = chosen.concepts, tuple(Preserved(p) for p in chosen.retained)
            config, table = preset_config(chosen, method), {}
        else:
            assert concepts_file is not None
            table = read_toml(concepts_file)
            concepts, retained = tuple(concepts_from(table.get("concepts", []))), retained_from(table.get("retain", ()))
            config = mass_config(str(table.get("method", method)), concepts)
        config = with_settings(config_from(table, config), settings)
        job = Job(
            checkpoint, concepts, out, pictures=pictures, sampling_steps=sampling_steps, guidance=guidance, seed=seed,
            size=size, prediction=prediction, device=device, save_checkpoint=checkpoint_file, overwrite=overwrite,
            config=config, retained=retained, prior=prior,
        )  # fmt: skip
        source = prepare(job)
        check_executor(executor, jobs)
        if config.fusion != "none":
            shelf = shelf_of(job)
            there = sum(shelf.path(c).exists() for c in concepts)
            if there < len(concepts):
                check_loaded(job, load(job, source), probes_of(job))  # before hours of training
                free_memory()  # the processes that train load the model themselves
            console.print(f"{len(concepts)} concepts, {there} of them finished earlier", highlight=False)
            train_all(job, jobs, executor, _line)
        run_job(job, dry_run=False)


def _line(phrase: str, done: int, total: int) -> None:
    console.print(f"{done}/{total} {phrase}", highlight=False, soft_wrap=True)


def prior_command(
    checkpoint: CheckpointArg,
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    retain: Annotated[list[str], typer.Option("--retain", help="A phrase that must stay; repeat.")] = [],  # noqa: B006
    without: Annotated[list[str], typer.Option("--without", help="A phrase to be erased: its captions are left out.")] = [],  # noqa: B006
    captions: Annotated[Path | None, typer.Option(help="A text file of your own captions, one a line.")] = None,
    kind: Annotated[list[str], typer.Option(help="Prompts that --retain is kept under; repeat.")] = ["object"],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if torch sees one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:  # fmt: skip
    """Sum up once what mass erasures keep, for any model with the same text encoder."""
    from ..checks import check_prompts
    from ..formats.atomic import check_target
    from ..job import Job, load, open_source
    from ..priors import build_prior, write_prior

    with friendly(), progress_bars() as progress:
        check_target(out, overwrite)
        phrases = tuple(Preserved(p) for p in retain)
        empty = "a phrase of --without is empty: write a word or phrase, or leave it out."
        banned = tuple(phrase_of(p, empty, "a phrase of --without") for p in without)
        own = _lines(captions)
        unknown = [k for k in kind if k not in CONTEXTS]
        if unknown:
            raise ErasureError(f'unknown kind "{unknown[0]}": choose one of {", ".join(CONTEXTS)}.')
        source = open_source(checkpoint)
        backend = load(Job(checkpoint, (), out, device=device), source)
        check_prompts(backend, ((t, p.phrase) for k in kind for t in CONTEXTS[k] for p in phrases))
        prior = build_prior(backend, phrases, kind, banned, own, progress=progress)
        write_prior(out, prior, overwrite)
    console.print(f"wrote {out}: {prior.captions} captions, {len(phrases)} retained phrases", highlight=False, soft_wrap=True)


def _lines(path: Path | None) -> list[str] | None:
    """Lines of a text file that are not empty. ErasureError: it cannot be read."""
    if path is None:
        return None
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ErasureError(f"{path} is no file: give --captions a text file.")
    try:
        found = [line for line in map(spelled, path.read_text(encoding="utf-8-sig").splitlines()) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ErasureError(f"{path} cannot be read as text ({error}): give --captions a UTF-8 file.") from error
    if not found:
        raise ErasureError(f"{path} is empty: give --captions a file with a caption on each line.")
    return found


def presets_command() -> None:
    """The papers' sets of concepts that --preset takes."""
    for name in preset_names():
        p = load_preset(name)
        console.print(f"{name}: {p.description} ({len(p.concepts)} to erase, {len(p.retained)} to keep)",
                      highlight=False, soft_wrap=True)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command("erase-many")(erase_many_command)
    app.command("prior")(prior_command)
    app.command("presets")(presets_command)
