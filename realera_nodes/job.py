"""A whole erasure job: check, load, draw, erase, draw again, export, report. One engine for shell, panel and benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .core.concepts import Concept, Preserved, check_together
from .core.errors import ErasureError
from .core.training import TrainState
from .erasure import Erasure, ErasureConfig, erase
from .exports import MAX_RANK, edit_lora, export_checkpoint, export_lora, method_name, whole_lora
from .formats.atomic import require_space
from .formats.checkpoint import Checkpoint, open_checkpoint
from .mass import MassConfig, MassErasure, check_mass, erase_many
from .mining import Progress, silent
from .report.probes import Probe, demo_probes, general_probes, strongest_words
from .report.report import Outcome, Scorer, draw, embedding_residue, score, value_drift, write_report
from .resume import EVERY, load_state, save_state, state_path
from .settings import as_table
from .shelf import FolderShelf

DEMO = "demo"


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        checkpoint: "demo", a .safetensors file or a diffusers folder
        config: of RealEra; with ``mass`` the concepts are erased by that method instead, and ``retained`` are kept
    """

    checkpoint: str
    concepts: tuple[Concept, ...]
    out: Path
    config: ErasureConfig = field(default_factory=ErasureConfig)
    residue: tuple[str, ...] = ()
    unrelated: int = 4
    pictures: int = 4
    sampling_steps: int = 20
    guidance: float = 5.0
    seed: int = 0
    size: int | None = None
    prediction: str | None = None
    device: str | None = None
    max_rank: int = MAX_RANK
    save_checkpoint: bool = True
    overwrite: bool = False
    mass: MassConfig | None = None
    retained: tuple[Preserved, ...] = ()


@dataclass(frozen=True)
class Watch:
    """What a panel sees of a job beside its stages.

    Attributes:
        backend: the job's model where it is loaded already, and is used again afterwards
        on_state: called with it and with the training's state after every step; what it draws there, the student draws
        on_pictures: called with the report's prompts and their pictures before and after
    """

    backend: Any = None
    on_state: Callable[[Any, TrainState], None] = lambda backend, state: None
    on_pictures: Callable[[list[Probe], Outcome, Outcome], None] = lambda probes, before, after: None


@dataclass(frozen=True)
class Source:
    """The model of a job: what is loaded to compute with, and the file or folder that is exported in its layout."""

    name: str
    load: Path
    checkpoint: Checkpoint


def open_source(checkpoint: str) -> Source:
    """Finds and checks the model without loading it. ErasureError: missing, damaged or unsupported."""
    if checkpoint == DEMO:
        from .demo.expand import checkpoint_path, pipeline_path

        return Source("realera-demo", pipeline_path(), open_checkpoint(checkpoint_path()))
    path = Path(checkpoint)
    return Source(path.stem if path.suffix == ".safetensors" else path.name, path, open_checkpoint(path))


def planned_files(job: Job, source: Source) -> dict[str, Path]:
    """What the job will write, by role."""
    stem = f"{source.name}-erased"
    files = {}
    if job.save_checkpoint:
        files["checkpoint"] = job.out / (stem if source.checkpoint.is_folder else f"{stem}.safetensors")
    if job.mass or job.config.alignment_on:
        files["lora"] = job.out / f"{stem}-lora.safetensors"
    if not job.mass and job.config.closed_form_on:
        files["edit lora"] = job.out / f"{stem}-edit-lora.safetensors"
    return files | {n: job.out / n for n in ("grid.png", "report.json", "report.md")}


def prepare(job: Job) -> Source:
    """Everything that can be refused before any work is done. ErasureError says what to change."""
    if job.mass:
        check_mass(job.concepts, job.retained)
    else:
        check_together(job.concepts)
    if not 1 <= job.pictures <= 64 or not 1 <= job.sampling_steps <= 1000:
        raise ErasureError("pictures must lie between 1 and 64 and sampling steps between 1 and 1000.")
    source = open_source(job.checkpoint)
    if job.out.exists() and not job.out.is_dir():
        raise ErasureError(f"{job.out} is a file: give --out a folder.")
    if not job.overwrite:
        for path in planned_files(job, source).values():
            if path.exists():
                raise ErasureError(f"{path} already exists: choose another name or folder, or allow overwriting (--overwrite).")
    size = sum(f.path.stat().st_size for f in source.checkpoint.files) if job.save_checkpoint else 0
    require_space(job.out, size + 64 * 2**20)
    return source


def load(job: Job, source: Source) -> Any:
    """The backend of a job."""
    from .backends.loading import load_backend

    return load_backend(source.load, device=job.device, size=job.size, prediction=job.prediction)


def scorer_of(job: Job) -> Scorer | None:
    """The embedded model's own classifier; other checkpoints have none here."""
    if job.checkpoint != DEMO:
        return None
    from .demo.gallery import judge, load_classifier

    net = load_classifier()
    return lambda pictures: judge(net, pictures)[0]


def probes_of(job: Job, named: Mapping[str, str] | None = None) -> list[Probe]:
    return (
        demo_probes(job.concepts, job.unrelated) if job.checkpoint == DEMO else general_probes(job.concepts, job.residue, named)
    )


def run(job: Job, progress: Progress = silent, watch: Watch | None = None) -> dict[str, Any]:
    """Does the job and returns its report's table. The model's files are only read.

    Raises:
        ErasureError: something the user can change; nothing half-written stays.
    """
    source, watch = prepare(job), watch or Watch()
    try:
        job.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ErasureError(f"{job.out} cannot be made ({error.strerror}): choose another folder.") from error
    start = time.perf_counter()
    progress("loading the model", 0, 1)
    backend = load(job, source) if watch.backend is None else watch.backend
    progress("loading the model", 1, 1)
    loaded = time.perf_counter()
    sha256 = source.checkpoint.sha256()
    kept = state_path(job, sha256)
    erasure = _erase(job, backend, source, sha256, progress, watch)
    erased = time.perf_counter()
    probes = probes_of(job, strongest_words(job.concepts, erasure.mined))
    deltas = erasure.deltas(backend.projections())
    seeds = [job.seed + i for i in range(job.pictures)]
    total, done = 2 * len(probes) * len(seeds), 0

    def drawn(n: int) -> None:
        nonlocal done
        done += n
        progress("pictures", done, total)

    scorer = scorer_of(job)
    before = score(draw(backend, probes, seeds, job.sampling_steps, job.guidance, drawn), scorer)
    with backend.edited(deltas):
        after = score(draw(backend, probes, seeds, job.sampling_steps, job.guidance, drawn), scorer)
    shown = time.perf_counter()
    watch.on_pictures(probes, before, after)
    written, rank = export(job, source, erasure, sha256, progress)
    facts = {
        "concepts": [{"concept": c.phrase, "anchor": c.anchor} for c in job.concepts],
        "named_neighbors": {c.phrase: [w.word for w in erasure.mined.near_of(c.phrase)] for c in job.concepts},
        "value_drift": value_drift(backend, probes, deltas),
        "embedding_residue": embedding_residue(backend, probes, deltas),
        "condition": erasure.transform.condition if erasure.transform else None,
        "rank": rank,
        "method": method_name(erasure),
        "loss": _losses(erasure),
        "seconds": {"load": loaded - start, "erase": erased - loaded, "pictures": shown - erased,
                    "export": time.perf_counter() - shown},
        "files": [p.name for p in written],
        "config": as_table(erasure.config),
    }  # fmt: skip
    title = "Erased: " + ", ".join(c.phrase for c in job.concepts)
    table = write_report(job.out, title, probes, before, after, facts, job.overwrite)
    kept.unlink(missing_ok=True)
    return table


def _erase(job: Job, backend: Any, source: Source, sha256: str, progress: Progress, watch: Watch) -> Erasure | MassErasure:
    """The job's method, from where an earlier run of it stopped."""
    if job.mass:
        shelf = FolderShelf.of(job.concepts, job.retained, job.mass, source.checkpoint, sha256)
        return erase_many(backend, job.concepts, job.mass, job.retained, progress, shelf, lambda s: watch.on_state(backend, s))
    kept = state_path(job, sha256)

    def remember(state: TrainState) -> None:
        if state.step % EVERY == 0:
            save_state(state, kept)
        watch.on_state(backend, state)

    return erase(backend, job.concepts, job.config, progress, load_state(kept), remember)


def _losses(erasure: Erasure | MassErasure) -> Any:
    """Loss by step; of a mass erasure, by concept."""
    if isinstance(erasure, MassErasure):
        return erasure.losses
    return erasure.state.losses if erasure.state else []


def export(
    job: Job, source: Source, erasure: Erasure | MassErasure, sha256: str, progress: Progress = silent
) -> tuple[list[Path], dict[str, Any]]:
    """Writes checkpoint and LoRAs; returns the paths, and rank and loss of the closed-form edit's LoRA."""
    files = planned_files(job, source)
    written, rank = [], {}
    base = source.checkpoint
    if isinstance(erasure, MassErasure):
        lora = whole_lora(erasure, base.architecture.projections, base.read_projection, job.max_rank)
        rank = {"lora": lora.rank, "dropped": lora.dropped}
        export_lora(erasure, lora.factors, base, files["lora"], sha256, job.overwrite)
        written.append(files.pop("lora"))
    elif "edit lora" in files:
        lora = edit_lora(erasure, base.architecture.projections, base.read_projection, job.max_rank)
        rank = {"edit": erasure.low_rank.rank if erasure.low_rank else 0, "lora": lora.rank, "dropped": lora.dropped}
        export_lora(erasure, lora.factors, source.checkpoint, files["edit lora"], sha256, job.overwrite)
        written.append(files["edit lora"])
    if "lora" in files:
        export_lora(erasure, erasure.factors, source.checkpoint, files["lora"], sha256, job.overwrite)
        written.append(files["lora"])
    if "checkpoint" in files:
        export_checkpoint(erasure, source.checkpoint, files["checkpoint"], sha256, job.overwrite,
                          lambda done, total: progress("writing the checkpoint", done, total))  # fmt: skip
        written.append(files["checkpoint"])
    return written, rank
