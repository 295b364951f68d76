"""The one loaded model, and what was found out about it: a slider asks again and again. Used by the worker's thread alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..core.concepts import Concept, same
from ..erasure import Erasure, ErasureConfig, edit, make_pairs
from ..job import Job, Source, load, open_source
from ..mass import MassErasure, erase_many
from ..mass_config import MassConfig
from ..mining import Mined, Progress
from ..neighborhood import Neighborhood, survey
from ..resume import described

T = TypeVar("T")
#: results of each sort that are kept
KEPT = 4


class Desk:
    """Args: device, size, prediction: of all jobs, as the command line takes them."""

    def __init__(self, device: str | None = None, size: int | None = None, prediction: str | None = None):
        self.options: dict[str, Any] = {"device": device, "size": size, "prediction": prediction}
        self._model: tuple[Any, Source, Any] | None = None
        self._kept: dict[str, dict[str, Any]] = {}

    def of(self, job: Job) -> Job:
        """The job with this machine's options."""
        return replace(job, **self.options)

    def model(self, job: Job, progress: Progress) -> tuple[Source, Any]:
        """The job's model, loaded unless it is already. ErasureError: missing, damaged or unsupported."""
        key = job.checkpoint, _age(job.checkpoint)
        if self._model is None or self._model[0] != key:
            progress("loading the model", 0, 1)
            self._model = None  # two models may not fit
            self._kept.clear()
            source = open_source(job.checkpoint)
            self._model = key, source, load(job, source)
            progress("loading the model", 1, 1)
        return self._model[1], self._model[2]

    def surveyed(self, job: Job, progress: Progress, judge: bool = True) -> tuple[Mined, list[Neighborhood]]:
        """The neighborhood of the job's concepts as named: what the user ticked afterwards is not asked again."""
        bare = tuple(replace(c, aliases=(), preserve=()) for c in job.concepts)
        extra = [p for c in job.concepts for p in (*c.aliases, *(k.phrase for k in c.preserve))] if judge else []
        config = self._mining(job)
        key = self._key("survey", judge, bare, config, sorted(extra))
        _, backend = self.model(job, progress)
        return self.once("survey", key, lambda: survey(backend, bare, config, extra, progress, judge=judge))

    def mined(self, job: Job, progress: Progress) -> Mined:
        """Words around the concepts without those that the user put on a list, as the job's own mining leaves them out."""
        config = self._mining(job)
        if isinstance(job.config, MassConfig) or not (config.neighbors_on and config.neighbors.words):
            return Mined()
        bare = tuple(replace(c, aliases=(), preserve=()) for c in job.concepts)
        self.model(job, progress)
        known = self._kept.get("survey", {})
        key = next((k for k in known if k.startswith(self._key("survey", True, bare, config, None)[:-1])), None)
        mined = known[key][0] if key else self.surveyed(replace(job, concepts=bare), progress)[0]
        taken = [p for c in job.concepts for p in (*c.phrases, c.anchor, *(k.phrase for k in c.preserve))]
        return without(mined, taken, bare)

    def edited(self, job: Job, progress: Progress) -> Erasure | MassErasure:
        """The job's closed form, at strength 1 where it has one."""
        _, backend = self.model(job, progress)
        if isinstance(job.config, MassConfig):
            alone = replace(job.config, fusion="none")
            key = self._key("edit", job.config, job.concepts, alone, [p.phrase for p in job.retained])
            return self.once("edit", key, lambda: erase_many(backend, job.concepts, alone, job.retained, progress))
        own = _realera(job)
        config = replace(own, alignment_on=False, closed_form=replace(own.closed_form, strength=1.0))
        mined = self.mined(job, progress)

        def solve() -> Erasure:
            made = Erasure(job.concepts, config, mined)
            made.transform = edit(backend, make_pairs(backend, job.concepts), job.concepts, mined, config, progress)
            return made

        return self.once("edit", self._key("edit", "", job.concepts, config, mined.words), solve)

    def deltas(self, job: Job, progress: Progress) -> dict[str, Tensor]:
        """The closed form's change of the weights at the job's strength."""
        made = self.edited(job, progress)
        _, backend = self.model(job, progress)
        if isinstance(made, Erasure):
            closed = replace(made.config.closed_form, strength=_realera(job).closed_form.strength)
            made = replace(made, config=replace(made.config, closed_form=closed))
        return made.deltas(backend.projections())

    def once(self, sort: str, key: str, make: Callable[[], T]) -> T:
        """A result that is kept as long as the model is, the last few of each sort."""
        kept = self._kept.setdefault(sort, {})
        if key not in kept:
            kept[key] = make()
            while len(kept) > KEPT:
                del kept[next(iter(kept))]
        return kept[key]

    @staticmethod
    def _mining(job: Job) -> ErasureConfig:
        if isinstance(job.config, MassConfig):
            return ErasureConfig(neighbors=job.config.neighbors, alignment=job.config.alignment)
        return _realera(job)

    @staticmethod
    def _key(sort: str, flag: Any, concepts: Sequence[Concept], config: Any, rest: Any) -> str:
        settings = asdict(config)
        if sort == "survey":
            settings = {k: settings[k] for k in ("neighbors", "alignment")}
            a = settings["alignment"]  # steps and rates do not change what lies around a concept
            settings["alignment"] = [a[k] for k in ("trajectories", "trajectory_steps", "guidance", "seed")]
        facts = [str(flag), settings, [described(c) for c in concepts]]
        return json.dumps([*facts, *([rest] if rest is not None else [])], default=str, sort_keys=True)


def _realera(job: Job) -> ErasureConfig:
    """The settings of RealEra, which the panel's other methods are not asked for here."""
    assert isinstance(job.config, ErasureConfig)
    return job.config


def without(mined: Mined, taken: Sequence[str], concepts: Sequence[Concept]) -> Mined:
    """Words that stand on none of the user's lists."""

    def free(word: str) -> bool:
        return not any(same(word, t) for t in taken)

    near = [(n, w) for n, w in zip(mined.near, mined.words, strict=True) if free(w)]
    listed = {c.prompts[0].format(t) for c in concepts for t in taken}
    return Mined(mined.named, [n for n, _ in near], [p for p in mined.far if p not in listed], [w for _, w in near])


def _age(checkpoint: str) -> float:
    path = Path(checkpoint)
    return path.stat().st_mtime if path.exists() else 0.0
