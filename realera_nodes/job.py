"""A whole erasure job: check, load, draw, erase, draw again, export, report. One engine for shell, panel and benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .cache import forget
from .checks import check_job, check_loaded
from .core.concepts import Concept, Preserved, check_lists
from .core.errors import ErasureError
from .core.phrases import phrase_of
from .core.settings import check_settings, choice, number, seed
from .core.training import TrainState
from .erasure import ErasureConfig
from .exports import MAX_RANK, export_checkpoint, export_lora, loras_of, metadata_of, method_name
from .formats.architecture import PREDICTIONS
from .formats.atomic import Batch, require_space
from .formats.checkpoint import Checkpoint, open_checkpoint, planned_bytes
from .mass_config import MassConfig
from .methods import Config, Task, method_of
from .mining import Progress, silent
from .outcome import Outcome
from .outputs import hints, left_overs
from .priors import Prior, read_prior
from .report.probes import Probe, demo_probes, general_probes, strongest_words
from .report.report import Outcome as Drawn
from .report.report import Scorer, draw, embedding_residue, score, value_drift, write_report
from .resume import Answers, answers_path, state_path
from .settings import as_table
from .shelf import Base, FolderShelf

DEMO = "demo"
#: sides of pictures in pixels
SIZES = (8, 2048)


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        checkpoint: "demo", a .safetensors file or a diffusers folder
        config: of any method, which its type chooses
        residue: phrases that might still evoke the concepts, for the report
        unrelated: prompts that have nothing to do with them; pictures: of each prompt
        seed: of each prompt's first picture
        size: side of the pictures in pixels; None is the model's own
        prediction: "epsilon" or "v_prediction"; None is what the model says
        max_rank: of a LoRA file
        retained: phrases to keep beside the concepts' own
        prior: a file of priors.write_prior in place of the shipped captions, for a mass erasure

    Raises:
        ErasureError: a number out of its range, a residue phrase that is none.
    """

    checkpoint: str
    concepts: tuple[Concept, ...]
    out: Path
    config: Config = field(default_factory=ErasureConfig)
    residue: tuple[str, ...] = ()
    unrelated: int = number(4, 0, 1000)
    pictures: int = number(4, 1, 64)
    sampling_steps: int = number(20, 1, 1000)
    guidance: float = number(5.0, 0, 100, 0.1)
    seed: int = seed()
    size: int | None = number(None, *SIZES, 8)
    prediction: str | None = choice(None, PREDICTIONS)
    device: str | None = None
    max_rank: int = number(MAX_RANK, 1, 2048)
    save_checkpoint: bool = True
    overwrite: bool = False
    retained: tuple[Preserved, ...] = ()
    prior: Path | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        empty = "a residue phrase is empty: write what might still evoke the concept, or leave it out."
        object.__setattr__(self, "residue", tuple(phrase_of(p, empty, "a residue phrase") for p in self.residue))


@dataclass(frozen=True)
class Watch:
    """What a panel sees of a job beside its stages.

    Attributes:
        backend: the job's model where it is loaded already, and is used again afterwards
        on_state: called with it and with the training's state after every step; what it draws there, the student draws
        on_pictures: called with the report's prompts and their pictures before and after
        beside: name -> content of further files, which appear with the job's own
    """

    backend: Any = None
    on_state: Callable[[Any, TrainState], None] = lambda backend, state: None
    on_pictures: Callable[[list[Probe], Drawn, Drawn], None] = lambda probes, before, after: None
    beside: Mapping[str, bytes] = field(default_factory=dict)


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
    for role in method_of(job.config).loras(job.config):
        files[role] = job.out / f"{stem}-{role.replace(' ', '-')}.safetensors"
    return files | {n: job.out / n for n in ("grid.png", "report.json", "report.md")}


def prepare(job: Job) -> Source:
    """Everything that can be refused before any work is done. ErasureError says what to change."""
    prior = prior_of(job)
    check_lists(job.concepts, (*job.retained, *(prior.retained if prior else ())))
    if not job.save_checkpoint and not method_of(job.config).loras(job.config):
        raise ErasureError("the method changes what no LoRA holds, so nothing would be written: let the checkpoint be saved.")
    source = open_source(job.checkpoint)
    files = planned_files(job, source)
    check_job(job, source, files, prior is not None)
    size = planned_bytes(source.checkpoint, files["checkpoint"]) if "checkpoint" in files else 0
    require_space(job.out, size + 64 * 2**20)
    source.checkpoint.prediction(job.prediction)  # of a kind that is supported
    return source


def load(job: Job, source: Source) -> Any:
    """The backend of a job."""
    from .backends.loading import load_backend

    return load_backend(source.load, device=job.device, size=job.size, prediction=job.prediction)


def prior_of(job: Job) -> Prior | None:
    """A mass job's prior file. ErasureError: it is not there, or holds no prior."""
    return read_prior(job.prior) if job.prior else None


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
    start = time.perf_counter()
    progress("loading the model", 0, 1)
    backend = load(job, source) if watch.backend is None else watch.backend
    progress("loading the model", 1, 1)
    check_loaded(job, backend, probes_of(job))
    loaded = time.perf_counter()
    sha256 = source.checkpoint.sha256()
    kept, answers = state_path(job, sha256), Answers(answers_path(job, sha256))
    erasure = _erase(job, backend, source, sha256, progress, watch, answers)
    erased = time.perf_counter()
    probes = probes_of(job, strongest_words(job.concepts, erasure.mined))
    deltas = erasure.deltas(backend.projections())
    aims = method_of(job.config).aims(job.config)
    seeds = [job.seed + i for i in range(job.pictures)]
    total, done = 2 * len(probes) * len(seeds), 0

    def drawn(n: int) -> None:
        nonlocal done
        done += n
        progress("pictures", done, total)

    scorer = scorer_of(job)
    before = score(draw(backend, probes, seeds, job.sampling_steps, job.guidance, drawn), scorer)
    with erasure.on(backend):
        after = score(draw(backend, probes, seeds, job.sampling_steps, job.guidance, drawn), scorer)
    shown = time.perf_counter()
    watch.on_pictures(probes, before, after)
    facts: dict[str, Any] = {
        "concepts": [{"concept": c.phrase, "anchor": a} for c, a in zip(erasure.concepts, erasure.anchors, strict=True)],
        "named_neighbors": {phrase: [w.word for w in erasure.mined.near_of(phrase)] for phrase in erasure.mined.named},
        "value_drift": value_drift(backend, probes, deltas),
        # it measures the way to anchors, where they are what the method aims at
        "embedding_residue": embedding_residue(backend, probes, deltas) if aims else {},
        "condition": erasure.transform.condition if erasure.transform else None,
        "method": method_name(erasure),
        "loss": erasure.losses,
        "notes": [*source.checkpoint.prediction(job.prediction).doubts, *erasure.notes],
        "config": as_table(erasure.config),
    }  # fmt: skip
    title = "Erased: " + ", ".join(c.phrase for c in job.concepts)
    with Batch(job.overwrite) as batch:
        written, rank = export(job, source, erasure, sha256, progress, batch)
        gone = _left_overs(job, source, erasure, sha256)
        for path in gone:
            batch.remove(path)
        facts |= {
            "rank": rank,
            "seconds": {"load": loaded - start, "erase": erased - loaded, "pictures": shown - erased,
                        "export": time.perf_counter() - shown},
            "files": [p.name for p in written],
            "removed": [p.name for p in gone],
        }  # fmt: skip
        table = write_report(job.out, title, probes, before, after, facts, job.overwrite, batch)
        for name, data in watch.beside.items():
            with batch.file(job.out / name) as f:
                f.write(data)
    forget(kept)
    answers.forget()
    return table


def _erase(
    job: Job, backend: Any, source: Source, sha256: str, progress: Progress, watch: Watch, answers: Answers
) -> Outcome:  # fmt: skip
    """The job's method, from where an earlier run of it stopped."""
    shelf, prior = None, prior_of(job)
    if isinstance(job.config, MassConfig):
        base = Base.of(source.checkpoint, sha256, job.prediction, job.size)
        shelf = FolderShelf.of(job.concepts, job.retained, job.config, base, prior=prior)
    task = Task(
        backend, job.concepts, job.config, job.retained, progress, state_path(job, sha256), shelf, prior,
        partial(watch.on_state, backend), answers,
    )  # fmt: skip
    return method_of(job.config).run(task)


def _left_overs(job: Job, source: Source, erasure: Outcome, sha256: str) -> list[Path]:
    """What ``--overwrite`` takes away beside what it replaces."""
    if not job.overwrite:
        return []
    stem = job.out / f"{source.name}-erased"
    return left_overs(planned_files(job, source), stem, metadata_of(erasure, source.checkpoint, sha256))


def export(
    job: Job, source: Source, erasure: Outcome, sha256: str, progress: Progress = silent, batch: Batch | None = None
) -> tuple[list[Path], dict[str, Any]]:
    """Writes LoRAs and checkpoint; returns the paths, and ranks and loss of the LoRA that holds the closed form.

    Without a ``batch`` they appear together when the last of them is written.
    """
    if batch is None:
        with Batch(job.overwrite) as own:
            return export(job, source, erasure, sha256, progress, own)
    files, base = planned_files(job, source), source.checkpoint
    written, rank, loras = [], {}, loras_of(erasure, source.checkpoint, job.max_rank)
    made, told = metadata_of(erasure, base, sha256), hints(files, base.path.name)
    common: dict[str, Any] = {"prediction": job.prediction, "batch": batch, "made": made}
    for role, lora in loras.items():
        export_lora(erasure, lora.factors, base, files[role], sha256, job.overwrite, hint=told[role], **common)
        written.append(files[role])
    if erasure.transform is not None:
        holding = loras.get("edit lora") or loras["lora"]
        low_rank = getattr(erasure, "low_rank", None)
        rank = {"edit": low_rank.rank if low_rank else 0, "lora": holding.rank, "dropped": holding.dropped}
    if "checkpoint" in files:
        export_checkpoint(erasure, base, files["checkpoint"], sha256, job.overwrite,
                          lambda done, total: progress("writing the checkpoint", done, total), **common)  # fmt: skip
        written.append(files["checkpoint"])
    return written, rank
