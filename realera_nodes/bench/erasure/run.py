"""A benchmark run: every method on every case, resumable at three depths (rows, edits, pictures)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...backends.loading import load_backend, torch_device
from ...core.errors import ErasureError
from ...core.settings import check_settings as check_fields
from ...core.settings import choice, number
from ...formats.architecture import PREDICTIONS
from ...formats.stream import SafetensorsFile, write_tensors
from ...job import DEMO, SIZES, Source, open_source
from ...mining import Progress, silent
from ...presets import load_preset
from ...settings import as_table
from ...spread import check_executor, spread
from .cost import Cost, measured
from .fid import Fid
from .measures import STAYS
from .methods import Edit, Method, check_settings, make_method
from .pictures import PictureStore, Sampler, Shot, distances, draw_missing, shots_of
from .protocols import Case, Protocol, Sizes, make_protocol
from .rows import Ledger
from .scorers import CLIP, Needs, Scorer, make_scorer

#: raised when rows of earlier code are not to be compared with new ones
REVISION = 1


@dataclass(frozen=True)
class Bench:
    """What to run. All of it is small and picklable: a worker gets it whole.

    Attributes:
        methods: names of methods.make_method
        settings: ``section.key=value`` for all methods that have it
        scorer: None is the protocol's own
        steps, guidance: None are the protocol's own
        pictures: folder of the pictures; None is one under ``out``
        keep_edits: keep the weights' changes in ``out``/edits after their row is done
    """

    protocol: str
    methods: tuple[str, ...]
    out: Path
    model: str = DEMO
    sizes: Sizes = field(default_factory=Sizes)
    settings: tuple[str, ...] = ()
    scorer: str | None = None
    steps: int | None = number(None, 1, 1000)
    guidance: float | None = number(None, 0.0, 100.0)
    size: int | None = number(None, *SIZES)
    prediction: str | None = choice(None, PREDICTIONS)
    device: str | None = None
    batch: int = number(16, 1, 1024)
    pictures: Path | None = None
    keep_edits: bool = False
    clip: str = CLIP
    detections: Path | None = None
    real: Path | None = None
    inception: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Task:
    """One row to be: a method on a case, and the name of all that decides it."""

    method: str
    case: int
    key: str


class Worker:
    """What one process holds for a benchmark: checked settings at once, model and scorer when they are first asked for."""

    def __init__(self, bench: Bench):
        if not bench.methods:
            raise ErasureError("no method was named: give --methods at least one.")
        if len(set(bench.methods)) < len(bench.methods):
            raise ErasureError("a method is named twice: keep one.")
        self.bench = bench
        self.protocol: Protocol = make_protocol(bench.protocol, bench.model == DEMO, bench.sizes)
        check_settings(bench.methods, bench.settings)
        self.source: Source = open_source(bench.model)
        self.store = PictureStore(bench.pictures or bench.out / "pictures")
        for name in bench.methods:
            self.method(name, self.protocol.cases[0])

    @cached_property
    def sha256(self) -> str:
        return self.source.checkpoint.sha256()

    @cached_property
    def backend(self) -> Any:
        bench = self.bench
        return load_backend(self.source.load, device=bench.device, size=bench.size, prediction=bench.prediction)

    @cached_property
    def scorer(self) -> Scorer:
        bench, p = self.bench, self.protocol
        return make_scorer(bench.scorer or p.scorer, Needs(p.labels, p.prompt, bench.clip, bench.detections, bench.device))

    @cached_property
    def fid(self) -> Fid | None:
        return Fid(self.bench.real, self.bench.inception, self.bench.device) if self.bench.real else None

    @cached_property
    def sampler(self) -> Sampler:
        bench, p = self.bench, self.protocol
        half = torch_device(bench.device).type == "cuda"
        guidance = p.guidance if bench.guidance is None else bench.guidance
        # a side of 0 is the model's own
        return Sampler(bench.steps or p.steps, guidance, bench.size or 0, "float16" if half else "float32")

    def method(self, name: str, case: Case) -> Method:
        preset = load_preset(case.preset) if case.preset else None
        return make_method(name, case.concepts[0].kind, preset, self.bench.settings)

    def tasks(self) -> list[Task]:
        """All rows, case by case, so that an early stop leaves whole comparisons."""
        cases = self.protocol.cases
        return [Task(m, i, self.key(m, case)) for i, case in enumerate(cases) for m in self.bench.methods]

    def key(self, name: str, case: Case) -> str:
        scored = [self.scorer.name, asdict(self.sampler), self.bench.prediction, str(self.bench.real or "")]
        return _hash([REVISION, self.sha256, self.protocol.name, name.partition("@")[0], self._config(name, case),
                      asdict(case), list(self.protocol.labels), scored])  # fmt: skip

    def _config(self, name: str, case: Case) -> Any:
        config = self.method(name, case).config
        return None if config is None else as_table(config)

    def edit(self, name: str, case: Case, progress: Progress) -> tuple[Edit, Cost]:
        """The method's edit with what it cost, from an earlier run if that was stopped while it drew."""
        method = self.method(name, case)
        if method.config is None:
            return method(self.backend, case.concepts, case.retained, progress), Cost()
        path = self._edit_path(name, case)
        if path.exists():
            file = SafetensorsFile.open(path)
            facts = json.loads(file.metadata["cost"])
            return Edit({n: file.read(n) for n in file.entries}, file.metadata["full"] == "True"), Cost(**facts)
        with measured(self.backend.device) as cost:
            edit = method(self.backend, case.concepts, case.retained, progress)
        kept = Edit({n: d.detach().float().cpu().contiguous() for n, d in edit.deltas.items()}, edit.full)
        write_tensors(path, kept.deltas, {"cost": json.dumps(asdict(cost)), "full": str(edit.full)}, overwrite=True)
        return kept, cost

    def _edit_path(self, name: str, case: Case) -> Path:
        told = [[asdict(c) for c in case.concepts], [asdict(r) for r in case.retained]]
        key = _hash([REVISION, self.sha256, name.partition("@")[0], self._config(name, case), told, self.sampler.dtype])
        return self.bench.out / "edits" / f"{key[:32]}.safetensors"

    def row(self, task: Task, progress: Progress = silent) -> dict[str, Any]:
        """Erases, draws and judges one row."""
        case, store, bench = self.protocol.cases[task.case], self.store, self.bench
        edit, cost = self.edit(task.method, case, progress)
        shots = shots_of(case.asks, self._weights(edit), self.sampler)
        before = shots_of(case.asks, self._weights(Edit({})), self.sampler)
        stays = [s for s in before if s.ask.group in STAYS]
        self._draw("original's pictures", stays, Edit({}), progress)
        self._draw("pictures", shots, edit, progress)
        measures = self._judge(shots, before, progress)
        names = sorted({m for found in measures for m in found})
        whole: dict[str, Any] = {"seconds": cost.seconds, "memory": cost.memory}
        captions = [s for s in shots if s.ask.group == "caption"]
        if self.fid is not None and captions:
            whole["FID"] = self.fid.distance(store.read([s.key for s in part]) for part in self._parts(captions))
        if not bench.keep_edits and self.method(task.method, case).config is not None:
            self._edit_path(task.method, case).unlink(missing_ok=True)
        return {
            "key": task.key, "protocol": self.protocol.name, "method": task.method, "case": case.name,
            "concepts": [[c.phrase, c.anchor] for c in case.concepts], "scorer": self.scorer.name,
            "config": self._config(task.method, case), "sampler": asdict(self.sampler), "row": whole,
            "group": [s.ask.group for s in shots], "label": [s.ask.label for s in shots],
            "cluster": [s.ask.cluster for s in shots], "prompt": [s.ask.prompt for s in shots],
            "seed": [s.seed for s in shots], "picture": [s.key for s in shots],
            "values": {name: [_rounded(found.get(name)) for found in measures] for name in names},
        }  # fmt: skip

    def _draw(self, stage: str, shots: Sequence[Shot], edit: Edit, progress: Progress) -> None:
        def drawn(done: int, total: int) -> None:
            progress(stage, done, total)

        draw_missing(self.backend, self.store, shots, self.sampler, self.bench.batch, lambda: edit.on(self.backend), drawn)

    def _weights(self, edit: Edit) -> str:
        return _hash([self.sha256, self.bench.prediction, edit.hash()])

    def _judge(self, shots: Sequence[Shot], before: Sequence[Shot], progress: Progress) -> list[dict[str, float]]:
        """Measures of each shot, a batch of pictures in memory at a time."""
        found: list[dict[str, float]] = []
        for part, old in zip(self._parts(shots), self._parts(before), strict=True):
            pictures = self.store.read([s.key for s in part])
            scored = [dict(s) for s in self.scorer.score(pictures, part)]
            stay = [i for i, s in enumerate(part) if s.ask.group in STAYS]
            if stay:
                far = distances(self.backend, pictures[stay], self.store.read([old[i].key for i in stay]))
                for i, pixel, latent in zip(stay, *far, strict=True):
                    scored[i] |= {"pixel": pixel, "latent": latent}
            found += scored
            progress("judging", len(found), len(shots))
        return found

    def _parts(self, shots: Sequence[Shot]) -> Iterator[Sequence[Shot]]:
        yield from (shots[i : i + self.bench.batch] for i in range(0, len(shots), self.bench.batch))


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


#: the worker of this process: it serves one row after another
_WORKERS: dict[Bench, Worker] = {}


def do_row(bench: Bench, task: Task, threads: int | None = None, progress: Progress = silent) -> dict[str, Any]:
    """One row in this process. Runs in a worker."""
    if threads:
        torch.set_num_threads(threads)
    if bench not in _WORKERS:
        _WORKERS.clear()
        _WORKERS[bench] = Worker(bench)
    return _WORKERS[bench].row(task, progress)


def run(
    bench: Bench, jobs: int = 1, executor: str = "local", progress: Progress = silent,
    on_row: Callable[[dict[str, Any], int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Does what is not done yet, and returns all rows of this benchmark. ``on_row(row, done, total)`` after each new one.

    Raises:
        ErasureError: something the user can change; before any work, where it can be known before.
    """
    check_executor(executor, jobs)
    bench = replace(bench, out=bench.out.absolute(), pictures=bench.pictures and bench.pictures.absolute())
    worker = Worker(bench)
    _ = worker.scorer, worker.fid  # what they need is asked for before hours of drawing
    if bench.out.exists() and not bench.out.is_dir():
        raise ErasureError(f"{bench.out} is a file: give --out a folder.")
    ledger, tasks = Ledger(bench.out / "rows.jsonl"), worker.tasks()
    missing = [t for t in tasks if t.key not in ledger.rows]
    done = len(tasks) - len(missing)
    _WORKERS.clear()
    if jobs == 1 and executor == "local":
        _WORKERS[bench] = worker
        work = [(bench, t, None, progress) for t in missing]
    else:
        work = [(bench, t, max(1, (os.cpu_count() or 1) // jobs)) for t in missing]  # type: ignore[misc]
    try:
        for row in spread(do_row, work, jobs, executor) if work else ():
            ledger.add(row)
            done += 1
            if on_row:
                on_row(row, done, len(tasks))
    finally:
        _WORKERS.clear()
    return [ledger.rows[t.key] for t in tasks]
