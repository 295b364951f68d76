"""From runs on disk to values of the page: only what changed since the tab last looked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gradio as gr

from . import charts, words
from .export import files_of
from .request import Request
from .runs import ALIVE, CANCELLED, DONE, FAILED, INTERRUPTED, Run, Runs
from .worker import Worker

Updates = dict[Any, Any]


class Views:
    """Args: address: (tab's own query, file path or run id) -> a link of the page."""

    def __init__(self, ui: SimpleNamespace, runs: Runs, worker: Worker, exports: bool):
        self.ui, self.runs, self.worker, self.exports = ui, runs, worker, exports

    def run(self, ids: dict[str, str], kind: str) -> Run | None:
        """The tab's run of a kind, if its folder is still there."""
        name = ids.get(kind, "")
        return self.runs.get(name) if name and (self.runs.folder / name / "run.json").is_file() else None

    def changed(self, ids: dict[str, str], seen: dict[str, Any], query: str) -> Updates:
        """What a tab that has ``seen`` should show now; ``seen`` is brought up to date."""
        updates: Updates = {}
        queued = self.worker.queue()
        strip = words.queue(queued, list(ids.values()))
        self._once(seen, "queue", strip, lambda: updates.update({self.ui.queue: strip}))
        finished = tuple((run.id, run.stamp("state")) for run in self.runs.all("erase"))
        self._once(seen, "history", finished, lambda: updates.update({self.ui.history: self._history(query)}))
        for kind, show in (("look", self._look), ("preview", self._preview), ("erase", self._erase)):
            run = self.run(ids, kind)
            if run is None:
                self._once(seen, kind, "", lambda show=show: updates.update(show(None, seen)))  # type: ignore[misc]
                continue
            names = ("state", "look", "preview", "losses", "live", "pictures")
            stamp = (run.id, self.worker.ahead_of(run), *(run.stamp(n) for n in names))
            self._once(seen, kind, stamp, lambda show=show, run=run: updates.update(show(run, seen)))  # type: ignore[misc]
        return updates

    @staticmethod
    def _once(seen: dict[str, Any], name: str, stamp: Any, do: Callable[[], None]) -> None:
        if seen.get(name) != stamp:
            do()
            seen[name] = stamp

    def _history(self, query: str) -> str:
        return words.history(list(self.runs.all("erase"))[:100], lambda name: f"?run={name}{query}")

    def _look(self, run: Run | None, seen: dict[str, Any]) -> Updates:
        ui = self.ui
        if run is None:
            return {ui.look_status: "", ui.around: gr.update(visible=False), ui.look_cancel: gr.update(visible=False),
                    ui.also: gr.update(choices=[], value=[]), ui.spare: gr.update(choices=[], value=[])}  # fmt: skip
        state = run.state["state"]
        found = run.read("look")
        updates: Updates = {
            ui.look_status: "" if state == DONE else words.progress(run, self.worker.ahead_of(run)),
            ui.look_cancel: gr.update(visible=state in ALIVE), ui.around: gr.update(visible=found is not None),
        }  # fmt: skip
        drawn = (run.id, found["judged"]) if found else None
        if found and seen.get("look drawn") != drawn:
            seen["look drawn"] = drawn
            names = [p["concept"] for p in found["concepts"]]
            also, spare = ticks(run.request, found)
            choices = word_choices(found)
            updates |= {
                ui.which: gr.update(choices=[(n, i) for i, n in enumerate(names)], value=0, visible=len(names) > 1),
                ui.map: self.map(found, 0, also, spare), ui.around_note: words.around(found["concepts"][0], found["judged"]),
                ui.also: gr.update(choices=choices, value=also, visible=found["judged"]),
                ui.spare: gr.update(choices=choices, value=spare, visible=found["judged"]),
            }  # fmt: skip
        return updates

    @staticmethod
    def map(found: dict[str, Any], which: int, also: list[str], spare: list[str]) -> Any:
        """The map of one concept with the words as they are ticked."""
        mark = f"{which + 1}:"
        erased, kept = ({v.removeprefix(mark) for v in values if v.startswith(mark)} for values in (also, spare))
        return charts.map_figure(found["concepts"][which], erased, kept)

    def _preview(self, run: Run | None, seen: dict[str, Any]) -> Updates:
        ui = self.ui
        if run is None:
            return {ui.preview_status: "", ui.cards: "", ui.preview_cancel: gr.update(visible=False)}
        state = run.state["state"]
        drawn = run.read("preview")
        updates: Updates = {
            ui.preview_status: "" if state == DONE else words.progress(run, self.worker.ahead_of(run)),
            ui.preview_cancel: gr.update(visible=state in ALIVE),
        }
        if drawn:
            updates[ui.cards] = words.cards(drawn)
        return updates

    def _erase(self, run: Run | None, seen: dict[str, Any]) -> Updates:
        ui = self.ui
        state = run.state["state"] if run else ""
        updates: Updates = {
            ui.status: words.progress(run, self.worker.ahead_of(run)) if run else "",
            ui.cancel: gr.update(visible=state in ALIVE),
            ui.resume: gr.update(visible=state in (FAILED, CANCELLED, INTERRUPTED)),
        }
        losses, live = (run.read("losses"), run.read("live")) if run else (None, None)
        shown = bool(losses and losses["losses"])
        updates[ui.training] = gr.update(visible=shown)
        if run and shown:
            self._once(seen, "losses", (run.id, run.stamp("losses")), lambda: updates.update({ui.loss: charts.loss_frame(losses)}))
        if run and live:
            self._once(seen, "live", (run.id, run.stamp("live")), lambda: updates.update({ui.live: words.live(live)}))
        if run is None or not live:
            updates[ui.live] = ""
        done = state == DONE
        updates |= {ui.compare: gr.update(visible=done), ui.compare_note: gr.update(visible=not done),
                    ui.copying: gr.update(visible=done and self.exports)}  # fmt: skip
        if run and done:
            updates |= self._result(run)
        else:
            updates |= {ui.files: words.hint("The files appear here when step 4 is done."), ui.copied: ""}
        return updates

    def _result(self, run: Run) -> Updates:
        import json

        ui = self.ui
        pictures, files = run.read("pictures"), files_of(run)
        report = json.loads((run.files / "report.json").read_text(encoding="utf-8"))
        labels = [(f"{words.GROUP_NAMES[p['group']]}: {p['label']}", i) for i, p in enumerate(pictures)]
        return {
            ui.prompt: gr.update(choices=labels, value=0), ui.slider: self.pair(run, 0), ui.damage: words.damage(report),
            ui.files: words.files(files, file_address), ui.copied: "",
            ui.copy_file: gr.update(choices=[f["name"] for f in files], value=files[0]["name"]),
        }  # fmt: skip

    @staticmethod
    def pair(run: Run, index: int) -> tuple[str, str]:
        """Paths of the pictures of a prompt before and after."""
        row = run.read("pictures")[index]
        return str(run.folder / row["before"]), str(run.folder / row["after"])


def file_address(path: str) -> str:
    """Where the page's server gives a file; a folder has no address."""
    from pathlib import Path
    from urllib.parse import quote

    return "" if Path(path).is_dir() else f"gradio_api/file={quote(path)}"


def word_choices(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of every word that a look shows; values say whose word it is."""
    several = len(found["concepts"]) > 1
    return [
        (f"{w['word']} {w['response']:.0%}" + (f" ({place['concept']})" if several else ""), f"{i + 1}:{w['word']}")
        for i, place in enumerate(found["concepts"]) for w in place["words"] if w["response"] is not None
    ]  # fmt: skip


def ticks(request: Request, found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is ticked at first: words that go with a concept, and what the user put on a list before."""
    listed = set(request.keep)
    also, spare = [], []
    for i, place in enumerate(found["concepts"]):
        for w in place["words"]:
            value = f"{i + 1}:{w['word']}"
            if w["word"] in listed:
                spare.append(value)
            elif w["near"] or value in request.also:
                also.append(value)
    return also, spare
