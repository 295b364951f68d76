"""What is refused before any picture is drawn, in a dry run and in a run alike.

Of a job as it is asked for (``check_job``: places, settings, words), and of one whose model is loaded (``check_loaded``: the
tokenizer, the text encoder and the memory). The UNet is asked nothing here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.errors import ErasureError
from .core.phrases import shown, spelled
from .core.spans import template_span
from .formats.atomic import check_folder_target, check_target
from .memory import Need, drawing, require_memory
from .method_checks import checks_of
from .methods import method_of
from .report.probes import Probe

if TYPE_CHECKING:
    from .job import Job, Source


def check_job(job: Job, source: Source, files: Mapping[str, Path], prior: bool) -> None:
    """A job without its model.

    Args:
        files: what it is to write, by role
        prior: it has a prior file

    Raises:
        ErasureError: one sentence that says what to change.
    """
    check_places(job.out, files, job.overwrite, source)
    own = checks_of(job.config)
    own.refuse(job.config, job.concepts, job.retained, prior)
    targets = own.targets(job.config)
    if targets:
        _require_peft()
    for target in targets:
        require_layer(target, source.checkpoint.architecture.projections)


def check_places(out: Path, files: Mapping[str, Path], overwrite: bool, source: Source | None = None) -> None:
    """Whether files can be written where they are to go. ErasureError: one cannot be, or would lie in the source."""
    try:
        _check_names(out, files.values())
        if os.path.lexists(out) and not out.is_dir():
            what = "a link that leads nowhere" if out.is_symlink() and not out.exists() else "a file"
            raise ErasureError(f"{out} is {what}: give --out a folder.")
        if source is not None and source.checkpoint.is_folder:
            own = source.checkpoint.path.resolve()
            for path in files.values():
                place = path.parent.resolve() / path.name
                if own == place or own in place.parents or place in own.parents:
                    raise ErasureError(f"{path} lies inside the source folder or around it: choose another folder.")
        for role, path in files.items():
            folder = role == "checkpoint" and source is not None and source.checkpoint.is_folder
            (check_folder_target if folder else check_target)(path, overwrite)
    except OSError as error:
        raise ErasureError(f"{out} cannot be written to ({error.strerror}): choose another folder.") from error


def _check_names(out: Path, paths: Iterable[Path]) -> None:
    """Raises ErasureError for names that no file can have where they are to be, whether their folder is there yet or not."""
    there = out.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    parts = {part for path in (out, *paths) for part in path.absolute().parts[len(there.parts) :]}
    for part in sorted(parts, key=len, reverse=True):
        try:
            os.lstat(there / part)
        except ValueError as error:
            raise ErasureError(f"{shown(ascii(part))} is no name for a file ({error}): choose another one.") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ErasureError(
                    f'the name "{shown(part)}" is too long for a file ({len(os.fsencode(part))} bytes): '
                    "give the checkpoint or the folder a shorter name."
                ) from error


def require_layer(target: str, projections: Iterable[str]) -> None:
    """Raises ErasureError unless every layer of this end of a name reads text: no LoRA file or edit holds others."""
    if not any(f".{name}".endswith(f".{target}") for name in projections):
        raise ErasureError(
            f'targets holds "{shown(target)}", which is no layer that reads text: choose other targets, '
            "such as attn2.to_k and attn2.to_v."
        )
    if target in ("to_k", "to_v"):
        raise ErasureError(f"targets holds {target}, which self-attention has as well: write attn2.{target}.")


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ErasureError("training needs peft, which is not installed: pip install peft.") from error


def check_loaded(job: Job, backend: Any, probes: Sequence[Probe]) -> None:
    """A job with its model: prompts that the encoder can read, samples that the bounds admit, memory.

    Raises:
        ErasureError: one sentence that says what to change.
    """
    own = checks_of(job.config)
    size, purpose = method_of(job.config).memory(job.config, backend)
    needs = drawing(backend, 2 * len(probes) * job.pictures)
    needs.append(Need(size, f"what the method keeps {purpose}", "choose another method"))
    require_memory(backend, [*needs, *own.needs(job.config, len(job.concepts), backend)])
    check_prompts(backend, own.prompts(job.config, job.concepts, job.retained))
    for p in probes:
        backend.token_ids(p.prompt)
        if p.anchor is not None:
            backend.token_ids(p.template.format(p.anchor))
    own.try_out(job.config, job.concepts, backend)


def check_prompts(backend: Any, prompts: Iterable[tuple[str, str]]) -> None:
    """Whether a tokenizer reads phrases as their own words in their templates. ErasureError: no, or a prompt is too long."""
    for template, phrase in dict.fromkeys(prompts):
        ids = backend.token_ids(template.format(phrase))
        if not spelled(phrase):
            continue
        if not backend.phrase_ids(phrase):
            raise ErasureError(f'the model\'s tokenizer reads nothing in "{phrase}": write other words.')
        template_span(ids, template, phrase, backend.phrase_ids)
