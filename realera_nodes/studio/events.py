"""What happens on the page: every handler answers at once; work goes to the queue and is read back from disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ..core.errors import ErasureError
from ..presets import load_preset
from . import words
from .export import copy_to
from .panel import EXAMPLES
from .request import Request, anchors_of, job, lines_of, unique, words_of
from .runs import ALIVE, Runs
from .safety import Places
from .views import Updates, Views, word_choices
from .worker import Worker

STATUS = {"look": "look_status", "preview": "preview_status", "erase": "status"}
FORGET_RUN = "() => { const u = new URL(location); u.searchParams.delete('run'); history.replaceState(null, '', u) }"


class Events:
    def __init__(self, ui: SimpleNamespace, places: Places, runs: Runs, worker: Worker):
        self.ui, self.places, self.runs, self.worker = ui, places, runs, worker
        self.views = Views(ui, runs, worker, bool(places.exports))
        self.form = [ui.model, ui.concept, ui.anchor, ui.kind, ui.keep, ui.also, ui.spare, ui.method, ui.strength, ui.steps,
            ui.pictures,
                     ui.sampling, ui.seed, ui.checkpoint, ui.settings, ui.preset]  # fmt: skip

    def wire(self, page: gr.Blocks) -> None:
        ui = self.ui
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # what a user writes or ticks is never an output of the clock: an answer on its way would undo it
        told = [ui.ids, ui.seen, ui.queue, ui.history, ui.look_status, ui.look_cancel, ui.around, ui.looked, ui.preview_status,
                ui.preview_cancel, ui.cards, ui.status, ui.cancel, ui.resume, ui.training, ui.loss, ui.live, ui.compare,
                ui.compare_note, ui.copying, ui.files, ui.copied, ui.finished]  # fmt: skip
        loaded = page.load(self.opened, [ui.ids], [*told, *self.form, ui.form_note], **quiet)
        loaded.then(None, None, None, js=FORGET_RUN)  # else loading the page again would bring it back instead of newer work
        ui.timer.tick(self.tick, [ui.ids, ui.seen], told, **quiet)
        ui.looked.change(self.looked, [ui.looked], [ui.which, ui.map, ui.around_note, ui.also, ui.spare], **quiet)
        ui.finished.change(self.finished, [ui.finished], [ui.prompt, ui.slider, ui.damage, ui.copy_file], **quiet)
        # nor is what was said of it: an answer from before would wipe it away
        problems = [ui.look_problem, ui.preview_problem, ui.erase_problem]
        for kind, buttons in (("look", [ui.look.click]), ("preview", [ui.preview.click]), ("erase", [ui.erase.click])):
            gr.on(buttons, self.start(kind), [ui.ids, ui.seen, *self.form], [*told, *problems], **quiet)
        ui.strength.release(self.redraw, [ui.ids, ui.seen, *self.form], [*told, *problems], **quiet)
        for button, kind in ((ui.look_cancel, "look"), (ui.preview_cancel, "preview"), (ui.cancel, "erase")):
            button.click(self.stop(kind), [ui.ids, ui.seen], told, **quiet)
        ui.resume.click(self.resume, [ui.ids, ui.seen], told, **quiet)
        chosen = [ui.concept, ui.anchor, ui.kind, ui.keep, ui.preset]
        for button, example in zip(ui.examples, EXAMPLES, strict=True):
            button.click(lambda example=example: [*example, ""], None, chosen, **quiet)
        ui.preset.input(self.preset, [ui.preset], [*chosen, ui.method], **quiet)
        ui.refresh.click(self.refresh, [ui.model], [ui.model, ui.form_note], **quiet)
        sent = ui.upload.upload(self.uploaded, [ui.upload], [ui.model, ui.form_note, ui.uploaded], **quiet)
        # a dropdown does not take a value together with the choices that it is one of
        sent.then(lambda name: name or gr.skip(), [ui.uploaded], [ui.model], **quiet)
        ui.model.input(self.check_model, [ui.model], [ui.form_note], **quiet)
        around = [ui.ids, ui.which, ui.also, ui.spare]
        ui.also.input(lambda *a: self.ticked("also", *a), around, [ui.also, ui.spare, ui.map], **quiet)
        ui.spare.input(lambda *a: self.ticked("spare", *a), around, [ui.also, ui.spare, ui.map], **quiet)
        ui.which.input(self.around, around, [ui.map, ui.around_note], **quiet)
        ui.prompt.input(self.compare, [ui.ids, ui.prompt], [ui.slider], **quiet)
        ui.copy.click(self.copy, [ui.ids, ui.copy_file, ui.copy_place], [ui.copied], **quiet)

    # what a tab sees

    def tick(self, ids: dict[str, str], seen: dict[str, Any], asked: gr.Request) -> Updates:
        return self.views.changed(ids, seen, _query(asked)) | {self.ui.seen: seen}

    def opened(self, ids: dict[str, str], asked: gr.Request) -> Updates:
        """A new tab, or one that was loaded again: its own runs, or the one that its address names."""
        ui, updates = self.ui, self.refreshed()
        named = dict(asked.query_params).get("run", "")
        try:
            if named:
                found = self.runs.get(named)
                ids = {"look": "", "preview": "", "erase": ""} | {found.kind: found.id}
                updates[ui.ids] = ids
        except ErasureError as error:
            updates[ui.form_note] = words.problem(str(error))
        last = next((run for kind in ("erase", "preview", "look") if (run := self.views.run(ids, kind))), None)
        if last:
            updates |= self.filled(last.request)
        seen: dict[str, Any] = {}
        return updates | self.views.changed(ids, seen, _query(asked)) | {ui.seen: seen}

    def looked(self, pulse: list[Any]) -> list[Any]:
        """The map and its words, when a look has something new."""
        return self.views.looked(self.runs.get(pulse[0])) if pulse else [gr.skip(), gr.skip(), gr.skip(), _empty(), _empty()]

    def finished(self, pulse: list[Any]) -> list[Any]:
        """The result, when a run is done or another one was opened."""
        return self.views.finished(self.runs.get(pulse[0])) if pulse else [_empty(), None, "", _empty()]

    def filled(self, request: Request) -> Updates:
        """The form as it was when a run was started."""
        ui = self.ui
        steps = [s for s in request.settings if s.partition("=")[0] in ("alignment.steps", "suppression.steps")]
        return {
            ui.model: request.model, ui.concept: ", ".join(request.concepts), ui.anchor: ", ".join(request.anchors),
            ui.kind: request.kind,
            ui.keep: ", ".join(request.keep), ui.method: request.method, ui.strength: request.strength,
            ui.pictures: request.pictures,
            ui.sampling: request.sampling_steps, ui.seed: request.seed, ui.checkpoint: request.checkpoint,
            ui.preset: request.preset,
            ui.steps: int(steps[-1].partition("=")[2]) if steps else 0,
            ui.settings: "\n".join(s for s in request.settings if s not in steps),
        }  # fmt: skip

    # the form

    def request(self, ids: dict[str, str], *values: Any) -> Request:
        """What the form says. ErasureError: it cannot be done as it stands."""
        (model, concept, anchor, kind, keep, also, spare, method, strength, steps, pictures, sampling, seed, checkpoint, settings,
         preset) = values  # fmt: skip
        erased = words_of(concept or "")
        look = self.views.run(ids, "look")
        near: set[str] = set()
        if look is None or (look.request.concepts, look.request.model) != (erased, model):
            also, spare = [], []  # ticked around another concept
        else:
            found = look.read("look") or {"concepts": []}
            near = {f"{i + 1}:{w['word']}" for i, p in enumerate(found["concepts"]) for w in p["words"] if w["near"]}
        lines = list(lines_of(settings or ""))
        if steps and method != "edit":
            lines.append(f"{'suppression' if method == 'mace' else 'alignment'}.steps={_whole('training steps', steps)}")
        request = Request(
            model or "", erased, anchors_of(anchor or ""), kind, unique([*words_of(keep or ""), *(v.split(":",
            1)[1] for v in spare)]),
            tuple(v for v in also if v not in near), method, float(strength or 0), tuple(lines), preset or "", bool(checkpoint),
            _whole("pictures", pictures), _whole("denoising steps", sampling), _whole("the first seed", seed),
        )  # fmt: skip
        job(request, self.places.model(request.model), Path())  # refuses what cannot be done, before it waits in a queue
        return request

    def start(self, kind: str):
        def started(ids: dict[str, str], seen: dict[str, Any], *values: Any) -> Updates:
            box = getattr(self.ui, f"{kind}_problem")
            try:
                request = self.request(ids, *values)
                old = self.views.run(ids, kind)
                if old and kind != "erase":
                    self.worker.cancel(old)  # of looks and previews, a tab has one
                run = self.worker.submit(self.runs.create(kind, request))
            except (ErasureError, OSError) as error:
                return {box: words.problem(str(error))}
            ids = ids | {kind: run.id}
            return {box: "", self.ui.ids: ids} | self.views.changed(ids, seen, "") | {self.ui.seen: seen}

        return started

    def redraw(self, ids: dict[str, str], seen: dict[str, Any], *values: Any) -> Updates:
        """The slider was let go: draws again where there was a preview already."""
        return self.start("preview")(ids, seen, *values) if self.views.run(ids, "preview") else {self.ui.seen: seen}

    def stop(self, kind: str):
        def stopped(ids: dict[str, str], seen: dict[str, Any]) -> Updates:
            run = self.views.run(ids, kind)
            if run and self.worker.cancel(run) and run.state["state"] in ALIVE:
                box = '<div class="status" role="status"><p>Cancelling: it ends at its next step.</p></div>'
                return {getattr(self.ui, STATUS[kind]): box}
            return self.views.changed(ids, seen, "") | {self.ui.seen: seen}

        return stopped

    def resume(self, ids: dict[str, str], seen: dict[str, Any]) -> Updates:
        run = self.views.run(ids, "erase")
        if run and run.state["state"] not in ALIVE:
            self.worker.submit(run)
        return self.views.changed(ids, seen, "") | {self.ui.seen: seen}

    # helpers of the form

    def refreshed(self) -> Updates:
        return {self.ui.model: gr.update(choices=list(self.places.offered()))}

    def refresh(self, model: str) -> list[Any]:
        names = list(self.places.offered())
        return [gr.update(choices=names, value=model if model in names else names[0]), words.hint(f"{len(names)} models.")]

    def check_model(self, model: str) -> str:
        try:
            self.places.model(model)
        except (ErasureError, OSError) as error:
            return words.problem(str(error))
        return ""

    def uploaded(self, path: str) -> list[Any]:
        try:
            name = self.places.take_upload(Path(path), Path(path).name)
        except (ErasureError, OSError) as error:
            return [gr.skip(), words.problem(str(error)), ""]
        return [gr.update(choices=list(self.places.offered())), words.hint(f"{name} is among the models now."), name]

    def preset(self, name: str) -> list[Any]:
        if not name:
            return ["", "", "object", "", "", "realera"]
        chosen = load_preset(name)
        anchors = [c.anchor for c in chosen.concepts]
        anchors = anchors[:1] if len(set(anchors)) == 1 else anchors
        return [", ".join(c.phrase for c in chosen.concepts), ", ".join(anchors), chosen.concepts[0].kind, "", name, "mace"]

    def ticked(self, which: str, ids: dict[str, str], place: int | None, also: list[str], spare: list[str]) -> list[Any]:
        """A word stands on one list: ticked here it leaves there. One that goes with the concept and is unticked is kept."""
        look = self.views.run(ids, "look")
        found = look.read("look") if look else None
        if not found:
            return [also, spare, gr.skip()]
        near = [f"{i + 1}:{w['word']}" for i, p in enumerate(found["concepts"]) for w in p["words"] if w["near"]]
        if which == "also":
            spare = [v for v in spare if v not in also] + [v for v in near if v not in also and v not in spare]
        else:
            also = [v for v in also if v not in spare] + [v for v in near if v not in also and v not in spare]
        free = [c for c in word_choices(found) if c[1] not in also]
        return [also, gr.update(choices=free, value=spare), self.views.map(found, place or 0, also, spare)]

    def around(self, ids: dict[str, str], place: int | None, also: list[str], spare: list[str]) -> list[Any]:
        look = self.views.run(ids, "look")
        found = look.read("look") if look else None
        if not found:
            return [gr.skip(), gr.skip()]
        return [self.views.map(found, place or 0, also, spare), words.around(found["concepts"][place or 0], found["judged"])]

    def compare(self, ids: dict[str, str], index: int) -> Any:
        run = self.views.run(ids, "erase")
        return self.views.pair(run, index) if run else gr.skip()

    def copy(self, ids: dict[str, str], name: str, place: str) -> str:
        run = self.views.run(ids, "erase")
        try:
            if run is None:
                raise ErasureError("there is no finished run to copy from: erase something first.")
            target = copy_to(run, name, place, self.places)
        except (ErasureError, OSError) as error:
            return words.problem(str(error))
        return words.hint(f"Copied to {target}")


def _whole(name: str, value: Any) -> int:
    """A field's number; an empty field is 0. ErasureError: it is no whole number."""
    try:
        return int(value or 0)
    except (ValueError, OverflowError, TypeError) as error:
        raise ErasureError(f"{name} must be a whole number, not {value}: mend the field.") from error


def _empty() -> Any:
    return gr.update(choices=[], value=None)


def _query(asked: gr.Request | None) -> str:
    """What links of the page keep of its address: a WebUI's theme."""
    theme = dict(asked.query_params).get("__theme") if asked else None
    return f"&__theme={theme}" if theme in ("light", "dark") else ""
