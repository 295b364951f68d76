"""Named endpoints for scripts: the same queue and the same runs that the page shows. docs/studio.md has an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..core.errors import ErasureError
from ..presets import load_preset, preset_names
from .export import copy_to, files_of
from .request import from_table, job, to_table
from .runs import ALIVE, Run, Runs
from .safety import Places
from .views import file_address
from .worker import Worker


def endpoints(places: Places, runs: Runs, worker: Worker) -> None:
    """Adds the endpoints to the gr.Blocks around it."""

    def told(run: Run) -> dict[str, Any]:
        asked = run.asked
        return {"run": run.id, "kind": asked["kind"], "created": asked["created"], "title": run.request.title,
                "ahead": worker.ahead_of(run), **run.state}  # fmt: skip

    def submit(kind: str, request: dict) -> str:
        wanted = from_table(request)
        job(wanted, places.model(wanted.model), Path())
        return worker.submit(runs.create(kind, wanted)).id

    def models() -> list[str]:
        """Names of the models that a request may choose."""
        return list(places.offered())

    def presets() -> dict:
        """The papers' lists: name -> concepts and anchors."""
        return {n: [[c.phrase, c.anchor] for c in load_preset(n).concepts] for n in preset_names()}

    def look(request: dict) -> str:
        """Mines the neighborhood of the request's concepts. Returns the run's id at once."""
        return submit("look", request)

    def preview(request: dict) -> str:
        """Draws the closed-form edit at the request's strength. Returns the run's id at once."""
        return submit("preview", request)

    def erase(request: dict) -> str:
        """Erases, reports and writes files. Returns the run's id at once."""
        return submit("erase", request)

    def status(run: str) -> dict:
        """How far a run is: state, stage, done, total, fraction, eta in seconds, ahead (runs before it), error."""
        return told(runs.get(run))

    def result(run: str) -> dict:
        """What a run found: look or preview as JSON, or an erasure's request, losses, report and files."""
        found = runs.get(run)
        if found.kind != "erase":
            return found.read(found.kind) or {}
        report = found.files / "report.json"
        import json

        return {
            "request": to_table(found.request), "losses": (found.read("losses") or {}).get("losses", []),
            "report": json.loads(report.read_text(encoding="utf-8")) if report.exists() else None,
            "files": [f | {"url": file_address(f["place"])} for f in files_of(found)], "log": found.log,
        }  # fmt: skip

    def queue() -> list[dict]:
        """The run at work, then those that wait."""
        return [told(run) for run in worker.queue()]

    def history() -> list[dict]:
        """Erasures, newest first."""
        return [told(run) for run in runs.all("erase")]

    def cancel(run: str) -> bool:
        """Ends a run; false where it had ended already."""
        return worker.cancel(runs.get(run))

    def resume(run: str) -> str:
        """Goes on with an erasure that was cancelled, interrupted or failed."""
        found = runs.get(run)
        if found.kind != "erase" or found.state["state"] in (*ALIVE, "done"):
            raise ErasureError(f'run "{run}" is {found.state["state"]}: only erasures that ended early can be continued.')
        return worker.submit(found).id

    def copy(run: str, file: str, place: str) -> str:
        """Copies a file of a finished erasure into one of the studio's export folders; returns where it is."""
        return str(copy_to(runs.get(run), file, place, places))

    for fn in (models, presets, look, preview, erase, status, result, queue, history, cancel, resume, copy):
        gr.api(_sentences(fn), api_name=fn.__name__, api_description=fn.__doc__, queue=False)


def _sentences(fn: Any) -> Any:
    """Errors of the engine reach the script as their sentence."""
    import functools

    @functools.wraps(fn)
    def answer(*args: Any) -> Any:
        try:
            return fn(*args)
        except (ErasureError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answer
