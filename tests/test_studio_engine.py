"""The panel's work on a tiny model: it is the engine's, and it leaves on disk what the page shows."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera_nodes import job as engine
from realera_nodes.core.concepts import Concept
from realera_nodes.erasure import erase
from realera_nodes.formats.lora import read_lora
from realera_nodes.formats.stream import sha256_of
from realera_nodes.job import open_source
from realera_nodes.mining import silent
from realera_nodes.studio.desk import Desk, without
from realera_nodes.studio.export import files_of
from realera_nodes.studio.request import Request
from realera_nodes.studio.runs import Run, Runs
from realera_nodes.studio.safety import Places
from realera_nodes.studio.tasks import Tasks
from realera_nodes.studio.worker import Cancelled, Report, Worker
from tests.tiny import SIDE, tiny_files

SMALL = ("neighbors.vocabulary=60", "neighbors.candidates=12", "neighbors.words=4", "neighbors.words_beyond=4",
    "neighbors.response=0.0",
         "neighbors.response_beyond=0.0", "neighbors.m=2", "neighbors.n=2", "alignment.trajectories=1",
         "alignment.trajectory_steps=3")  # fmt: skip
ASKED = Request(
    "tiny.safetensors",
    ("airplane",),
    ("sky",),
    keep=("bird",),
    settings=(*SMALL, "alignment.steps=4"),
    pictures=1,
    sampling_steps=2,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A model folder and one desk: the model is loaded once."""
    base = tmp_path_factory.mktemp("studio")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    (base / "models").mkdir()
    shutil.copyfile(tiny_files("sd1")[1], base / "models" / "tiny.safetensors")
    places = Places(base / "out", (base / "models",))
    yield places, Tasks(places, Desk("cpu", SIDE)), Runs(places.runs)
    patch.undo()


def do(home, kind: str, request: Request) -> Run:
    _, tasks, runs = home
    run = runs.create(kind, request)
    tasks(run, Report(run, lambda: True))
    return run


def test_a_look_shows_the_map_first_and_then_the_engines_words(home) -> None:
    _, tasks, runs = home
    run, maps = runs.create("look", ASKED), []

    class Watching(Report):
        def __call__(self, stage: str, done: int, total: int) -> None:
            super().__call__(stage, done, total)
            if stage == "named neighbors" and not maps:
                maps.append(run.read("look"))

    tasks(run, Watching(run, lambda: True))
    early, last = maps[0], run.read("look")
    assert not early["judged"]
    assert len(early["concepts"][0]["at"]["neighbors"]) == 2
    assert last["judged"]
    made = tasks.job_of(run)
    _, backend = tasks.desk.model(made, silent)
    expected = erase(backend, made.concepts, replace(made.config, closed_form_on=False, alignment_on=False)).mined
    place = last["concepts"][0]
    # the word that is kept was asked about by name, so that its number can be shown
    assert {w["word"] for w in place["words"] if w["near"]} == set(expected.words)
    shown = {w["word"]: w["response"] for w in place["words"]}
    for word in expected.near_of("airplane"):
        assert shown[word.word] == pytest.approx(word.response, abs=1e-5)
    assert "bird" in shown
    assert len(place["at"]["words"]) == len(place["words"])


def test_a_preview_is_the_engines_closed_form_at_any_strength(home) -> None:
    _, tasks, _ = home
    run = do(home, "preview", replace(ASKED, method="edit", strength=1.0))
    made = tasks.job_of(run)
    _, backend = tasks.desk.model(made, silent)
    whole = tasks.desk.deltas(made, silent)
    expected = erase(backend, made.concepts, made.config).deltas(backend.projections())
    assert whole.keys() == expected.keys()
    for name, delta in whole.items():
        assert torch.allclose(delta, expected[name], atol=1e-6)
    half = tasks.desk.deltas(
        replace(made, config=replace(made.config, closed_form=replace(made.config.closed_form, strength=0.5))), silent
    )
    for name, delta in half.items():
        assert torch.allclose(2 * delta, whole[name], atol=1e-6)
    cards = run.read("preview")["cards"]
    assert {"concept", "preserved", "unrelated"} <= {c["group"] for c in cards}
    assert cards[0]["before"] != cards[0]["after"], "the concept is drawn otherwise"
    none = do(home, "preview", replace(ASKED, method="edit", strength=0.0)).read("preview")["cards"]
    assert all(c["before"] == c["after"] for c in none), "strength 0 is the model itself"


def test_the_slider_asks_the_model_for_pictures_alone(home) -> None:
    _, tasks, runs = home
    do(home, "preview", replace(ASKED, strength=0.7))
    run, stages = runs.create("preview", replace(ASKED, strength=0.9)), []

    class Noting(Report):
        def __call__(self, stage: str, done: int, total: int) -> None:
            super().__call__(stage, done, total)
            stages.append((stage, total))

    tasks(run, Noting(run, lambda: True))
    shown = len(run.read("preview")["cards"])
    assert set(stages) == {("pictures", shown)}, "only the erased model draws; what it drew before is remembered"


def test_words_that_users_list_are_not_mined(home) -> None:
    _, tasks, _ = home
    run = do(home, "look", ASKED)
    near = [w["word"] for w in run.read("look")["concepts"][0]["words"] if w["near"]]
    request = replace(ASKED, keep=("bird", near[0]), also=(f"1:{near[1]}",))
    made = tasks.job_of(home[2].create("preview", request))
    mined = tasks.desk.mined(made, silent)
    assert not {near[0], near[1]} & set(mined.words)
    assert len(mined.near) == len(mined.words) == len(near) - 2
    everything = tasks.desk.mined(tasks.job_of(run), silent)
    assert without(everything, [], (Concept("airplane", "sky"),)).words == everything.words


def test_an_erasure_is_the_engines_job_with_its_files(home, tmp_path: Path) -> None:
    places, tasks, _ = home
    model = places.models[0] / "tiny.safetensors"
    before = sha256_of(model)
    run = do(home, "erase", ASKED)
    made = tasks.job_of(run)
    names = {f["name"] for f in files_of(run)}
    assert names == {"tiny-erased.safetensors", "tiny-erased-edit-lora.safetensors", "tiny-erased-lora.safetensors", "grid.png",
        "report.md",
                     "report.json", "erase.toml"}  # fmt: skip
    assert sha256_of(model) == before
    engine.run(replace(made, out=tmp_path / "alone", overwrite=False))  # what the command line calls
    for name in ("tiny-erased-edit-lora.safetensors", "tiny-erased-lora.safetensors"):
        names_of = open_source(str(model)).checkpoint.architecture.projections
        mine, its = (read_lora(folder / name, names_of) for folder in (run.files, tmp_path / "alone"))
        assert mine.keys() == its.keys()
        for key, (down, up) in mine.items():
            assert torch.allclose(up @ down, its[key][1] @ its[key][0], atol=1e-5)
    assert len(run.read("losses")["losses"]) == 4
    frames = run.read("live")["frames"]
    assert [f["step"] for f in frames] == [1, 2, 3, 4]
    assert run.read("live")["labels"] == ["airplane", "bird"]
    report = json.loads((run.files / "report.json").read_text())
    pictures = run.read("pictures")
    assert [p["prompt"] for p in pictures] == [p["prompt"] for p in report["probes"]]
    assert all((run.folder / p[k]).read_bytes().startswith(b"\x89PNG") for p in pictures for k in ("before", "after"))


def test_mace_is_previewed_and_trained_with_live_losses(home) -> None:
    small = ("refinement.contexts=2", "suppression.steps=3", "suppression.images=1", "suppression.image_steps=2")
    request = replace(ASKED, method="mace", settings=small)
    shown = do(home, "preview", request).read("preview")
    assert shown["mass"]
    assert shown["cards"][0]["before"] != shown["cards"][0]["after"]
    run = do(home, "erase", request)
    assert len(run.read("losses")["losses"]) == 3
    assert "tiny-erased-lora.safetensors" in {f["name"] for f in files_of(run)}


def test_a_cancelled_training_leaves_no_file_and_goes_on_where_it_stopped(home) -> None:
    _, tasks, runs = home
    request = replace(ASKED, settings=(*SMALL, "alignment.steps=26"), seed=1)
    run = runs.create("erase", request)

    def wanted() -> bool:
        return len((run.read("losses") or {"losses": []})["losses"]) == 0 or run.state.get("done", 0) < 21

    with pytest.raises(Cancelled):
        tasks(run, Report(run, wanted))
    assert {f["name"] for f in files_of(run)} <= {"erase.toml"}
    _, backend = tasks.desk.model(tasks.job_of(run), silent)
    assert not any("lora" in name for name, _ in backend.unet.named_modules()), "the model is as it was"
    steps: list[int] = []

    class Counting(Report):
        def __call__(self, stage: str, done: int, total: int) -> None:
            super().__call__(stage, done, total)
            if stage == "noise alignment":
                steps.append(done)

    tasks(run, Counting(run, lambda: True))
    assert steps[0] > 1, "from the saved state"
    assert steps[-1] == 26
    assert len(run.read("losses")["losses"]) == 26
    assert run.read("live")["frames"][0]["step"] == 21, "it shows what it draws as soon as it goes on"


def test_too_many_concepts_to_look_at_and_nothing_to_preview_are_sentences(home) -> None:
    _, tasks, runs = home
    worker = Worker(runs, tasks)
    many = replace(ASKED, concepts=tuple(f"thing{i}" for i in range(9)))
    asked = [(worker.submit(runs.create("look", many)), "too many to look at"),
             (worker.submit(runs.create("preview", replace(ASKED, method="lora"))), "no closed form"),
             (worker.submit(runs.create("look", replace(ASKED, concepts=("very " * 80,)))), "shorten it")]  # fmt: skip
    end = time.monotonic() + 120
    for run, sentence in asked:
        while run.state["state"] in ("queued", "running"):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert run.state["state"] == "failed"
        assert sentence in run.state["error"]
    worker.close()
