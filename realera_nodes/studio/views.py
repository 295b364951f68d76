"""From runs on disk to values of the page: only what changed since the tab last looked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import gradio as gr

from . import charts, words
from .export import files_of
from .request import Request
from .runs import ALIVE, CANCELLED, DONE, FAILED, INTERRUPTED, Run, Runs
from .worker import Worker

Updates = dict[Any, Any]


class Views:
    """Args: exports: whether there are folders to copy files to."""

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
            return {
                ui.look_status: "",
                ui.around: gr.update(visible=False),
                ui.look_cancel: gr.update(visible=False),
                ui.looked: [],
            }
        state = run.state["state"]
        found = run.read("look")
        updates: Updates = {
            ui.look_status: "" if state == DONE else words.progress(run, self.worker.ahead_of(run)),
            ui.look_cancel: gr.update(visible=state in ALIVE), ui.around: gr.update(visible=found is not None),
        }  # fmt: skip
        drawn = [run.id, found["judged"]] if found else []
        self._once(seen, "look drawn", drawn, lambda: updates.update({ui.looked: drawn}))
        return updates

    def looked(self, run: Run) -> list[Any]:
        """Values of which, map, note and both lists of words."""
        found = run.read("look")
        names = [p["concept"] for p in found["concepts"]]
        also, spare = ticks(run.request, found)
        choices = word_choices(found)
        return [
            gr.update(choices=[(n, i) for i, n in enumerate(names)], value=0, visible=len(names) > 1), self.map(found, 0, also,
            spare),
            words.around(found["concepts"][0], found["judged"]), gr.update(choices=choices, value=also, visible=found["judged"]),
            gr.update(choices=[c for c in choices if c[1] not in also], value=spare, visible=found["judged"]),
        ]  # fmt: skip

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
        if run and losses and shown:
            self._once(
                seen, "losses", (run.id, run.stamp("losses")), lambda: updates.update({ui.loss: charts.loss_frame(losses or {})})
            )
        if run and live:
            self._once(seen, "live", (run.id, run.stamp("live")), lambda: updates.update({ui.live: words.live(live)}))
        if run is None or not live:
            updates[ui.live] = ""
        done = state == DONE
        updates |= {ui.compare: gr.update(visible=done), ui.compare_note: gr.update(visible=not done),
                    ui.copying: gr.update(visible=done and self.exports)}  # fmt: skip
        if run and done:
            updates[ui.files] = words.files(files_of(run), file_address)
        else:
            updates[ui.files] = words.hint("The files appear here when step 4 is done.")
        finished = [run.id, run.stamp("state")] if run and done else []
        self._once(seen, "finished", finished, lambda: updates.update({ui.finished: finished, ui.copied: ""}))
        return updates

    def finished(self, run: Run) -> list[Any]:
        """Values of prompt, slider, damage and the list of files to copy."""
        pictures, files = run.read("pictures"), files_of(run)
        report = json.loads((run.files / "report.json").read_text(encoding="utf-8"))
        labels = [(f"{words.GROUP_NAMES[p['group']]}: {p['label']}", i) for i, p in enumerate(pictures)]
        return [gr.update(choices=labels, value=0), self.pair(run, 0), words.damage(report),
                gr.update(choices=[f["name"] for f in files], value=files[0]["name"])]  # fmt: skip

    @staticmethod
    def pair(run: Run, index: int) -> str:
        """The pictures of a prompt before and after."""
        row = run.read("pictures")[index]
        return words.slider(row, *(file_address(str((run.folder / row[k]).resolve())) for k in ("before", "after")))


def file_address(path: str) -> str:
    """Where the page's server gives a file; a folder has no address."""
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
