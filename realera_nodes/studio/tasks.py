"""What the worker does with a run: look around a concept, preview the closed form, erase."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor

from .. import job as engine
from ..core.errors import ErasureError
from ..core.training import TrainState
from ..erasure import ErasureConfig
from ..mass_config import MassConfig
from ..neighborhood import Neighborhood, project
from ..plan import forwards
from ..report.grid import to_image
from ..report.probes import GROUPS, Probe, strongest_words
from ..report.report import Outcome
from .desk import Desk
from .export import config_text
from .request import job
from .runs import Run
from .safety import Places
from .worker import Report

#: prompts of a preview, of each group
SHOWN = {"concept": 1, "synonym": 1, "associated": 2, "preserved": 2, "unrelated": 2}
PREVIEW_STEPS = 10
PREVIEW_SEED = 0
#: pictures that are drawn while a LoRA is trained, and how often
LIVE = 5
#: concepts that are looked at together
MOST = 8


class Tasks:
    """Args: places: where models and runs are; desk: the loaded model."""

    def __init__(self, places: Places, desk: Desk):
        self.places, self.desk = places, desk

    def __call__(self, run: Run, report: Report) -> None:
        {"look": self.look, "preview": self.preview, "erase": self.erase}[run.kind](run, report)

    def job_of(self, run: Run) -> engine.Job:
        request = run.request
        return self.desk.of(job(request, self.places.model(request.model), run.files))

    def look(self, run: Run, report: Report) -> None:
        """look.json: the map at once, with samples alone; then with words, after the model was asked."""
        made = self.job_of(run)
        if len(made.concepts) > MOST:
            raise ErasureError(f"{len(made.concepts)} concepts are too many to look at, a minute each: choose {MOST} or fewer; "
                               "erasing takes any number.")  # fmt: skip
        self.desk.model(made, report)
        _, around = self.desk.surveyed(made, report, judge=False)
        run.write("look", {"judged": False, "concepts": [_place(n) for n in around]})
        mining = self.desk._mining(made)
        plan = forwards(replace(made, config=mining), 0)
        report.expect({stage: plan[stage] for stage in ("anchor trajectories", "named neighbors") if stage in plan})
        _, around = self.desk.surveyed(made, report)
        run.write("look", {"judged": True, "concepts": [_place(n) for n in around]})

    def preview(self, run: Run, report: Report) -> None:
        """preview.json: the closed form at a strength, drawn before anything is trained."""
        made = self.job_of(run)
        if isinstance(made.config, ErasureConfig) and not made.config.closed_form_on:
            raise ErasureError(
                "this method has no closed form, so there is nothing to preview before training: choose another one."
            )
        _, backend = self.desk.model(made, report)
        deltas = self.desk.deltas(made, report)
        probes = few(engine.probes_of(made, strongest_words(made.concepts, self.desk.mined(made, report))))
        seeds, scorer = [PREVIEW_SEED + run.request.seed], engine.scorer_of(made)
        prompts = [p.prompt for p in probes]
        done = 0

        def drawn(count: int) -> None:
            nonlocal done
            done += count
            report("pictures", done, total)

        def draw() -> Tensor:
            return backend.pictures(prompts, seeds * len(prompts), PREVIEW_STEPS, made.guidance, on_batch=drawn)

        key = repr((prompts, seeds))
        total = len(prompts) * (1 if key in self.desk._kept.get("pictures", {}) else 2)
        report.expect({"pictures": total})
        report("pictures", 0, total)
        before = self.desk.once("pictures", key, draw)
        with backend.edited(deltas):
            after = draw()
        cards = [
            {"group": p.group, "label": p.label, "prompt": p.prompt, "before": as_uri(b), "after": as_uri(a),
             "seen": [scorer(b[None])[0], scorer(a[None])[0]] if scorer else None}
            for p, b, a in zip(probes, before, after, strict=True)
        ]  # fmt: skip
        closed = made.config.closed_form if isinstance(made.config, ErasureConfig) else None
        run.write(
            "preview",
            {"strength": closed.strength if closed else 1.0, "mass": closed is None, "cards": cards},
        )

    def erase(self, run: Run, report: Report) -> None:
        """The engine's job, under ``files``; live.json while it trains, pictures.json when it has drawn."""
        made = self.job_of(run)
        made = replace(made, overwrite=run.files.exists())  # what an earlier try of this very run left
        _, backend = self.desk.model(made, report)
        report.expect(costs(made))
        training = made.config.training if isinstance(made.config, MassConfig) else self.desk._mining(made).alignment
        total = training.steps
        live = Live(run, self.desk, made, total, report)
        run.write("losses", {"losses": [], "steps": total})
        settings = config_text(run.request, made).encode("utf-8", "replace")
        watch = engine.Watch(
            backend, live, lambda probes, before, after: _keep_pictures(run, probes, before, after), {"erase.toml": settings}
        )
        engine.run(made, report, watch)


class Live:
    """Called after every training step: losses on disk, and now and then what the student draws."""

    def __init__(self, run: Run, desk: Desk, made: engine.Job, steps: int, report: Report):
        self.run, self.desk, self.report, self.steps = run, desk, report, steps
        first = made.concepts[0]
        self.prompts = [first.prompts[0].format(p) for p in (first.phrase, *(k.phrase for k in first.preserve[:1]))]
        self.labels = [first.phrase, *(k.phrase for k in first.preserve[:1])]
        self.guidance, self.seed = made.guidance, made.seed
        self.every = max(1, steps // LIVE)
        self.before: list[str] | None = None
        self.frames: list[dict[str, Any]] = []
        self._written = 0.0

    def __call__(self, backend: Any, state: TrainState) -> None:
        now = time.time()
        last = state.step == self.steps
        if state.step < 2 or now - self._written > 0.5 or last:
            self._written = now
            self.run.write("losses", {"losses": list(state.losses), "steps": self.steps})
        # the first of a concept, and of a training that goes on from a saved state
        if state.step == 1 or not self.frames or state.step % self.every == 0 or last:
            drawn = backend.pictures(self.prompts, [self.seed] * len(self.prompts), PREVIEW_STEPS, self.guidance)
            self.frames.append({"step": state.step, "pictures": [as_uri(p) for p in drawn]})
            self.run.write("live", {"labels": self.labels, "frames": self.frames})


def costs(made: engine.Job) -> dict[str, float]:
    """Forwards of the network by stage, as the plan counts them."""
    return forwards(made, len(engine.probes_of(made)))


def few(probes: Sequence[Probe]) -> list[Probe]:
    """Some of each group, in the report's order."""
    return [p for group in GROUPS for p in [p for p in probes if p.group == group][: SHOWN[group]]]


def as_uri(picture: Tensor, side: int = 256) -> str:
    """(3, H, W) in [0, 1] as a data address of a small JPEG."""
    image = to_image(picture, min(side, picture.shape[-1]))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _place(around: Neighborhood) -> dict[str, Any]:
    """A neighborhood as plain values: points of the map by role, words with what the model said of them."""
    at = {role: [[round(v, 4) for v in point] for point in points.tolist()] for role, points in project(around).items()}
    facts = {w.word: w for w in around.mined.named.get(around.concept.phrase, [])}
    near = set(around.mined.words)
    far = set(around.mined.far)
    template = around.concept.prompts[0]
    words = [
        {"word": w, "near": w in near, "far": template.format(w) in far,
         "cosine": facts[w].cosine if w in facts else None, "response": facts[w].response if w in facts else None}
        for w in around.words
    ]  # fmt: skip
    return {"concept": around.concept.phrase, "anchor": around.concept.anchor, "at": at, "words": words,
        "preserved": around.preserved,
            "near": len(near), "kept": len(far)}  # fmt: skip


def _keep_pictures(run: Run, probes: Sequence[Probe], before: Outcome, after: Outcome) -> None:
    """A sheet of all seeds for each prompt, before and after, for the page's slider."""
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    table = []
    for i, p in enumerate(probes):
        names = []
        for when, outcome in (("before", before), ("after", after)):
            names.append(f"pictures/{i:02}-{when}.png")
            _sheet(outcome.pictures[i]).save(run.folder / names[-1])
        seen = [sorted(set(o.seen[i])) for o in (before, after)] if after.seen else None
        table.append(
            {"group": p.group, "label": p.label, "prompt": p.prompt, "before": names[0], "after": names[1], "seen": seen}
        )
    run.write("pictures", table)


def _sheet(pictures: Tensor, width: int = 768) -> Image.Image:
    """Pictures side by side, up to four in a row, at least 256 pixels each."""
    columns = min(len(pictures), 2 if len(pictures) <= 4 else 4)
    side = max(pictures.shape[-1], width // columns)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(to_image(picture, side), (i % columns * side, i // columns * side))
    return sheet
