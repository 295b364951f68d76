"""Runs on disk: a folder each, which outlives the tab that asked for it and the process that worked on it."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..core.errors import ErasureError
from ..formats.windows import patiently, replace
from .request import Request, from_table, to_table

KINDS = ("look", "preview", "erase")
QUEUED, RUNNING, DONE, FAILED, CANCELLED, INTERRUPTED = "queued", "running", "done", "failed", "cancelled", "interrupted"
#: states that change by themselves
ALIVE = (QUEUED, RUNNING)
_ID = re.compile(r"\d{8}-\d{6}-[a-z0-9-]{1,60}-[0-9a-f]{6}")


@dataclass(frozen=True)
class Run:
    """A run's folder: run.json (what was asked), state.json (how far it is), log.txt, and what the work leaves beside them."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def files(self) -> Path:
        """Where an erasure's own files go."""
        return self.folder / "files"

    @property
    def asked(self) -> dict[str, Any]:
        """kind, created, request."""
        return self.read("run") or {}

    @property
    def kind(self) -> str:
        return str(self.asked["kind"])

    @property
    def request(self) -> Request:
        return from_table(self.asked["request"])

    @property
    def state(self) -> dict[str, Any]:
        """state, stage, done, total, fraction, eta, error, started, finished; keys are there when they are known."""
        return self.read("state") or {"state": INTERRUPTED}

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def note(self, line: str) -> None:
        """Adds to the log."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as f:
            f.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def read(self, name: str) -> Any:
        """A JSON file of the run, or None."""
        path = self.folder / f"{name}.json"
        return json.loads(patiently(lambda: path.read_text(encoding="utf-8"))) if path.exists() else None

    def stamp(self, name: str) -> int:
        """Changes when a JSON file of the run does; 0 where there is none."""
        path = self.folder / f"{name}.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def write(self, name: str, table: Any) -> None:
        """Writes a JSON file; readers see the old or the new one. Not synced: progress may be lost with the power."""
        path = self.folder / f"{name}.json"
        partial = self.folder / f".{name}.{secrets.token_hex(4)}.partial"
        partial.write_text(json.dumps(table), encoding="utf-8")
        replace(partial, path)

    def set_state(self, **values: Any) -> None:
        self.write("state", values)


class Runs:
    """All runs of an output folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create(self, kind: str, request: Request) -> Run:
        """A new run, queued."""
        words = re.sub(r"[^a-z0-9]+", "-", "-".join(request.concepts[:3]).casefold()).strip("-")[:40].strip("-") or "run"
        run = Run(self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{words}-{secrets.token_hex(3)}")
        run.folder.mkdir(parents=True)
        run.write("run", {"kind": kind, "created": time.time(), "request": to_table(request)})
        run.set_state(state=QUEUED)
        return run

    def get(self, name: str) -> Run:
        """The run of an id. ErasureError: there is none, or it is no id at all."""
        if isinstance(name, str) and _ID.fullmatch(name) and (self.folder / name / "run.json").is_file():
            return Run(self.folder / name)
        raise ErasureError(f'there is no run "{str(name)[:80]}": choose one of the history.')

    def all(self, kind: str | None = None) -> Iterator[Run]:
        """Newest first."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir(), key=lambda p: p.name, reverse=True):
            if _ID.fullmatch(path.name) and (path / "run.json").is_file():
                run = Run(path)
                if kind is None or run.kind == kind:
                    yield run

    def interrupt_left_overs(self) -> None:
        """What a process left queued or running when it ended is nobody's work now; it can be continued."""
        for run in self.all():
            if run.state["state"] in ALIVE:
                run.note("the studio was closed while this was waiting or at work")
                run.set_state(**{**run.state, "state": INTERRUPTED})

    def forget_looks(self, keep: int = 40) -> None:
        """Deletes the oldest looks and previews: they are made again in a moment, and would crowd the folder."""
        import shutil

        spare = [run for run in self.all() if run.kind != "erase" and run.state["state"] not in ALIVE]
        for run in spare[keep:]:
            shutil.rmtree(run.folder, ignore_errors=True)  # what the page has open goes the next time


def lock(out: Path) -> IO[str]:
    """Takes an output folder for this process, until the file is closed. ErasureError: another studio has it."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / ".studio.lock").open("a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ErasureError(f"{out} is in use by another studio: close that one, or choose another folder with --out.") from error
    return file
