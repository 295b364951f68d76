"""The queue and the runs on disk, with work that does nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from realera_nodes.core.errors import ErasureError
from realera_nodes.studio import words
from realera_nodes.studio.request import Request
from realera_nodes.studio.runs import Run, Runs, lock
from realera_nodes.studio.worker import Report, Worker

PATIENCE = 60.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Work:
    """Runs that report until they are let go; what they are told to raise is raised."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.order: list[str] = []
        self.error: Exception | None = None

    def __call__(self, run: Run, report: Report) -> None:
        self.order.append(run.kind + run.request.concepts[0])
        done = 0
        while not self.go.wait(0.01):
            report("training", done := done + 1, 1_000_000)
        if self.error:
            raise self.error


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def worker(tmp_path: Path, work: Work) -> Iterator[Worker]:
    made = Worker(Runs(tmp_path / "runs"), work)
    yield made
    made.close()


def ask(worker: Worker, kind: str, concept: str) -> Run:
    return worker.submit(worker.runs.create(kind, Request(concepts=(concept,), anchors=("x",))))


def state(run: Run) -> str:
    return run.state["state"]


def test_one_at_a_time_in_order_and_short_work_before_trainings(worker: Worker, work: Work) -> None:
    first = ask(worker, "erase", "1")
    until(lambda: state(first) == "running")
    asked = [ask(worker, *w) for w in (("erase", "2"), ("erase", "3"), ("look", "4"), ("preview", "5"))]
    assert [state(r) for r in asked] == ["queued"] * 4
    assert [r.request.concepts[0] for r in worker.queue()] == ["1", "4", "5", "2", "3"]
    assert worker.ahead_of(asked[1]) == 4
    assert "4 runs before it" in words.progress(asked[1], 4)
    shown = words.queue(worker.queue(), [asked[0].id])
    assert shown.count("<b>waiting</b>") == 4
    assert "2 → x (yours)" in shown
    assert "1 → x (yours)" not in shown
    work.go.set()
    until(lambda: all(state(r) == "done" for r in (first, *asked)))
    assert work.order == ["erase1", "look4", "preview5", "erase2", "erase3"]
    assert worker.queue() == []


def test_cancel_at_work_and_while_waiting(worker: Worker, work: Work) -> None:
    first, second = ask(worker, "erase", "1"), ask(worker, "erase", "2")
    until(lambda: state(first) == "running" and first.state["stage"] == "training")
    assert worker.cancel(second)
    assert state(second) == "cancelled"
    assert worker.cancel(first)
    until(lambda: state(first) == "cancelled")
    assert not worker.cancel(first), "it has ended"
    assert "Cancelled" in words.progress(first, 0)
    assert work.order == ["erase1"]
    worker.submit(first)  # continued
    until(lambda: state(first) == "running")
    work.go.set()
    until(lambda: state(first) == "done")


@pytest.mark.parametrize(
    ("error", "sentence", "logged"),
    [
        (ErasureError("lr is 7: it must be at most 1."), "lr is 7: it must be at most 1.", "lr is 7"),
        (OSError(28, "No space left on device"), "No space left", "No space left"),
        (RuntimeError("shapes differ\nlong tail"), "should not happen (RuntimeError: shapes differ)", "long tail"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "peft is not installed", "Traceback"),
    ],
)
def test_errors_are_a_sentence_and_the_log_is_behind_a_fold(
    worker: Worker, work: Work, error: Exception, sentence: str, logged: str
) -> None:
    work.error = error
    work.go.set()
    run = ask(worker, "erase", "1")
    until(lambda: state(run) == "failed")
    assert sentence in run.state["error"]
    assert logged in run.log
    page = words.progress(run, 0)
    before, fold = page.split("<details>")
    assert 'role="alert"' in before
    assert "long tail" not in before
    assert "Traceback" not in before
    assert "training" in fold or logged in fold
    work.error = None
    again = ask(worker, "erase", "2")  # the queue goes on
    until(lambda: state(again) == "done")


def test_what_a_closed_studio_left_can_be_continued(tmp_path: Path, work: Work) -> None:
    worker = Worker(Runs(tmp_path / "runs"), work)
    first, second = ask(worker, "erase", "1"), ask(worker, "erase", "2")
    until(lambda: state(first) == "running")
    worker.close(PATIENCE)
    assert [state(first), state(second)] == ["interrupted"] * 2
    assert "continue it" in words.progress(first, 0)
    # one that was killed leaves "running" behind
    first.set_state(state="running", stage="training", done=1, total=2)
    runs = Runs(tmp_path / "runs")
    runs.interrupt_left_overs()
    assert state(first) == "interrupted"
    other = Worker(runs, work)
    other.submit(first)
    work.go.set()
    until(lambda: state(first) == "done")
    other.close()


def test_two_studios_do_not_share_a_folder(tmp_path: Path) -> None:
    held = lock(tmp_path / "out")
    with pytest.raises(ErasureError, match="in use by another studio"):
        lock(tmp_path / "out")
    held.close()
    lock(tmp_path / "out").close()


def test_old_looks_are_forgotten_and_erasures_are_not(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for i in range(3):
        for kind in ("look", "erase"):
            runs.create(kind, Request(concepts=(f"c{i}",), anchors=("x",))).set_state(state="done")
    waiting = runs.create("look", Request(concepts=("new",), anchors=("x",)))
    runs.forget_looks(keep=1)
    assert len(list(runs.all("erase"))) == 3
    assert len(list(runs.all("look"))) == 2
    assert waiting in list(runs.all("look"))


def test_time_left_is_told_from_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    run = Runs(tmp_path).create("erase", Request(concepts=("a",), anchors=("b",)))
    report = Report(run, lambda: True)
    report.expect({"mining": 25.0, "training": 75.0})
    report("loading", 0, 1)
    now += 60
    report("mining", 0, 10)  # the clock of the plan starts here
    now += 10
    report("mining", 10, 10)
    assert run.state["fraction"] == 0.25
    assert run.state["eta"] == pytest.approx(30)
    now += 15
    report("training", 50, 100)
    assert run.state["fraction"] == 0.625
    assert run.state["eta"] == pytest.approx(15)
    assert "about 15 s left" in words.progress(run, 0)


def test_what_users_write_is_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    run = Runs(tmp_path).create("erase", Request(model=evil, concepts=(evil,), anchors=(evil,)))
    run.set_state(state="failed", error=evil)
    run.note(evil)
    card = {"group": "concept", "label": evil, "prompt": evil, "before": "data:,", "after": "data:,", "seen": [evil, evil]}
    row = {**card, "seen": [[evil], [evil]]}
    files = [{"name": evil, "bytes": 1, "meaning": evil, "place": f"/x/{evil}"}]
    pages = [
        words.queue([run], []), words.progress(run, 0), words.history([run], lambda name: f"?run={name}"),
        words.cards({"strength": 1.0, "mass": False, "cards": [card]}), words.slider(row, "a", "b"), words.files(files,
        lambda path: path),
        words.live({"labels": [evil], "frames": [{"step": 1, "pictures": ["data:,"]}]}),
        words.around({"near": 1, "kept": 1, "concept": evil}, True), words.problem(evil, evil),
        words.damage({"before": {}, "after": {}, "picture_change": {evil: 0.1}, "named_neighbors": {evil: [evil]}}),
    ]  # fmt: skip
    for page in pages:
        assert "<img src=x" not in page
        assert 'onerror="' not in page
