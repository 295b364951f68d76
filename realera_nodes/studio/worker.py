"""One queue, one thread: what one model on one machine can do at a time. Tabs come and go; the queue does not notice."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from ..core.errors import ErasureError
from .runs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Run, Runs

#: seconds between writings of a run's progress
PACE = 0.25


class Cancelled(Exception):
    """The user does not want the run any longer. Raised from a progress callback."""


class Report:
    """What the work says of itself: stages, shares, time left. Raises ``Cancelled`` where it is no longer wanted."""

    def __init__(self, run: Run, wanted: Callable[[], bool]):
        self.run, self.wanted = run, wanted
        self.started = time.time()
        self.plan: dict[str, float] = {}
        self.stage, self.stage_started, self.shares = "", time.time(), {"": 0.0}
        self._written = 0.0
        self._begun: float | None = None

    def expect(self, plan: dict[str, float]) -> None:
        """Costs of the stages that take time, by name, in any one unit: what time is left is told from them."""
        self.plan = dict(plan)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self.wanted():
            raise Cancelled
        now = time.time()
        fresh = stage != self.stage
        if fresh:
            self.stage, self.stage_started = stage, now
            self.run.note(stage)
        self.shares[stage] = max(self.shares.get(stage, 0.0), done / total if total else 0.0)
        if self._begun is None and stage in self.plan:
            self._begun = now
        if fresh or done == total or now - self._written >= PACE:
            self._written = now
            self.run.set_state(state=RUNNING, started=self.started, stage=stage, done=done, total=total, **self._times(now))

    def _times(self, now: float) -> dict[str, Any]:
        """fraction and eta in seconds, where they can be told."""
        whole = sum(self.plan.values())
        if whole and self._begun is not None:
            made = sum(self.plan[s] * share for s, share in self.shares.items() if s in self.plan)
            eta = (now - self._begun) / made * (whole - made) if made > 0.01 * whole else None
            return {"fraction": made / whole, "eta": eta}
        share = self.shares[self.stage]
        spent = now - self.stage_started
        return {"fraction": share, "eta": spent / share * (1 - share) if share > 0.02 and spent > 1 else None}


class Worker:
    """The queue. Looks and previews, which take seconds, go before trainings that have not begun.

    Args:
        runs: where runs live
        work: does a run; what it raises ends the run, and nothing else
    """

    def __init__(self, runs: Runs, work: Callable[[Run, Report], None]):
        self.runs, self.work = runs, work
        self._waiting: list[Run] = []
        self._now: Run | None = None
        self._unwanted: set[str] = set()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="studio-worker", daemon=True)
        self._thread.start()

    def submit(self, run: Run) -> Run:
        with self._changed:
            place = len(self._waiting)
            if run.kind != "erase":
                place = next((i for i, other in enumerate(self._waiting) if other.kind == "erase"), place)
            self._waiting.insert(place, run)
            self._unwanted.discard(run.id)
            run.set_state(state=QUEUED)
            self._changed.notify_all()
        return run

    def queue(self) -> list[Run]:
        """The run at work first, then those that wait, in their order."""
        with self._changed:
            return [*([self._now] if self._now else []), *self._waiting]

    def ahead_of(self, run: Run) -> int:
        """How many runs come before this one; 0 where it is at work or not in the queue."""
        return next((i for i, other in enumerate(self.queue()) if other.id == run.id), 0)

    def cancel(self, run: Run) -> bool:
        """Ends a run that waits now, one at work at its next step. False: it is neither."""
        with self._changed:
            if self._now is not None and self._now.id == run.id:
                self._unwanted.add(run.id)
                return True
            for other in self._waiting:
                if other.id == run.id:
                    self._waiting.remove(other)
                    other.note("cancelled before it began")
                    other.set_state(state=CANCELLED, finished=time.time())
                    return True
        return False

    def close(self, seconds: float = 10) -> None:
        """Ends the work at its next step and the thread with it. Runs stay interrupted, to be continued."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        self.runs.interrupt_left_overs()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                run = self._now = self._waiting.pop(0)
            ended = self._do(run)
            with self._changed:  # who sees the end finds the run out of the queue, and the other way round
                if ended:
                    run.set_state(**ended)
                self._now = None
                self._unwanted.discard(run.id)

    def _do(self, run: Run) -> dict[str, Any] | None:
        """Works, and returns the run's last state; None where it is to be told as interrupted."""
        report = Report(run, lambda: run.id not in self._unwanted and not self._closing)
        run.set_state(state=RUNNING, started=report.started, stage="", done=0, total=1)
        ended: dict[str, Any]
        try:
            self.work(run, report)
            ended = {"state": DONE}
        except Cancelled:
            if self._closing and run.id not in self._unwanted:
                return None
            ended = {"state": CANCELLED}
        except (ErasureError, OSError) as error:
            ended = {"state": FAILED, "error": str(error)}
            run.note(f"error: {error}")
        except ModuleNotFoundError as error:
            ended = {"state": FAILED, "error": f'{error.name} is not installed: run pip install "realera-nodes[studio]".'}
            run.note(traceback.format_exc())
        except Exception as error:  # whatever it is, the queue goes on and the page tells
            run.note(traceback.format_exc())
            ended = {"state": FAILED, "error": _sentence(error)}
        run.note(ended["state"])
        return {**ended, "started": report.started, "finished": time.time(), "stage": report.stage}


def _sentence(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "the graphics card has too little free memory: close what else uses it, or start the studio with --device cpu."
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"the work stopped at an error that should not happen ({type(error).__name__}: {first}): the log below tells more."
