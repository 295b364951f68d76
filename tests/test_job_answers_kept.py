"""A stopped job does not mine again: what the model answered is kept until the job is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera_nodes import mining
from realera_nodes.backends.diffusers import DiffusersBackend
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.closed_form import ClosedFormConfig
from realera_nodes.core.concepts import Concept
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.erasure import ErasureConfig
from realera_nodes.formats.checkpoint import open_checkpoint
from realera_nodes.formats.lora import read_lora
from realera_nodes.job import Job, open_source, planned_files, run
from realera_nodes.mass_config import MassConfig
from realera_nodes.resume import answers_path, state_path
from tests.stopping import Stopped, Watched
from tests.tiny import SIDE, tiny_files

MINING = NeighborConfig(m=2, n=3, vocabulary=40, candidates=12, words=2, words_beyond=2, response=-1, response_beyond=-1)
TRAINING = AlignmentConfig(steps=6, lr=1e-2, rank=2, trajectories=1, trajectory_steps=2)
CONCEPTS = tuple(Concept(c, "sky", templates=("a photo of the {}",)) for c in ("airplane", "cat"))
#: without the prior of captions, which would be encoded anew in each test's own cache
METHODS = {
    "realera": ErasureConfig(neighbors=MINING, alignment=TRAINING, closed_form=ClosedFormConfig(prior=0)),
    "realera-mass": MassConfig("realera-mass", neighbors=MINING, alignment=TRAINING,
                               refinement=RefinementConfig(lambda_1=0, lambda_2=0, mu=0.1, contexts=2)),
}  # fmt: skip


class Asked(list[str]):
    """Words that the model was asked about, and prompts whose trajectories were drawn."""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, similarity, draw = Asked(), mining.response_similarity, DiffusersBackend.trajectories

    def asks(answer, concept, empty, texts, *more):
        found.extend(["word"] * len(texts))
        return similarity(answer, concept, empty, texts, *more)

    def draws(self, prompt, *more):
        found.append(prompt)
        return draw(self, prompt, *more)

    monkeypatch.setattr(mining, "response_similarity", asks)
    monkeypatch.setattr(DiffusersBackend, "trajectories", draws)
    return found


def job(out: Path, method: str) -> Job:
    folder, _ = tiny_files("sd1")
    return Job(str(folder), CONCEPTS, out, METHODS[method], pictures=1, sampling_steps=2, size=SIDE, device="cpu", unrelated=0)


def place(made: Job) -> Path:
    return answers_path(made, open_source(made.checkpoint).checkpoint.sha256())


def same_files(a: Job, b: Job) -> None:
    source = open_source(a.checkpoint)
    names = list(open_checkpoint(Path(a.checkpoint)).architecture.projections)
    one, two = (read_lora(planned_files(w, source)["lora"], names) for w in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n][i], two[n][i]) for n in one for i in (0, 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("stage", "at"), [("named neighbors", 12), ("noise alignment", 3)])
def test_what_was_asked_is_not_asked_again(
    method: str, stage: str, at: int, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    whole = job(tmp_path / "whole", method)
    run(whole)
    total = list(asked)
    assert total.count("word") == 24
    assert not place(whole).exists(), "nothing is kept of a job that is done"
    asked.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # where no finished concept waits
    stopped = job(tmp_path / "stopped", method)
    with pytest.raises(Stopped):
        run(stopped, Watched(stage, stop=at))
    before = list(asked)
    asked.clear()
    run(stopped)
    assert before.count("word") + asked.count("word") == 24, "asked twice"
    assert before.count("a photo of the sky") >= 1
    assert asked.count("a photo of the sky") == 0, "drawn twice"
    assert not place(stopped).exists()
    same_files(whole, stopped)


def test_stopped_in_the_middle_of_a_concepts_words(tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "AT_ONCE", 3)
    whole = job(tmp_path / "whole", "realera")
    run(whole)
    asked.clear()
    stopped = job(tmp_path / "stopped", "realera")
    with pytest.raises(Stopped):
        run(stopped, Watched("named neighbors", stop=6))
    assert 6 <= asked.count("word") < 12
    before = asked.count("word")
    asked.clear()
    run(stopped)
    assert before + asked.count("word") == 24
    same_files(whole, stopped)


def test_other_words_or_settings_are_other_answers(tmp_path: Path, asked: Asked) -> None:
    stopped = job(tmp_path / "stopped", "realera")
    with pytest.raises(Stopped):
        run(stopped, Watched("noise alignment", stop=1))
    asked.clear()
    others = [
        replace(stopped, out=tmp_path / "a", config=replace(stopped.config, alignment=replace(TRAINING, seed=7))),
        replace(stopped, out=tmp_path / "b", concepts=(Concept("ship", "sky", templates=("a photo of the {}",)),)),
    ]
    for other in others:
        run(other)
        assert "a photo of the sky" in asked
        assert "word" in asked
        asked.clear()
    assert place(stopped).exists(), "what another job leaves alone"


@pytest.mark.parametrize("harm", ["cut", "empty", "words", "folder"])
def test_damaged_answers_are_asked_for_anew(harm: str, tmp_path: Path, asked: Asked) -> None:
    whole, stopped = job(tmp_path / "whole", "realera"), job(tmp_path / "stopped", "realera")
    run(whole)
    with pytest.raises(Stopped):
        run(stopped, Watched("noise alignment", stop=1))
    asked.clear()
    files = list(place(stopped).iterdir())
    assert files
    for file in files:
        data = file.read_bytes()
        file.unlink()
        if harm == "folder":
            file.mkdir()
        else:
            file.write_bytes({"cut": data[:-3], "empty": b"", "words": b"not what was written" * 40}[harm])
    run(stopped)
    assert asked.count("word") == 24
    assert "a photo of the sky" in asked
    same_files(whole, stopped)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, asked: Asked) -> None:
    made = job(tmp_path / "out", "realera")
    place(made).parent.mkdir(parents=True, exist_ok=True)
    place(made).write_text("a file where the folder would be")
    run(made)
    assert planned_files(made, open_source(made.checkpoint))["lora"].exists()
    assert asked.count("word") == 24


def test_the_trainings_own_state_is_beside_it(tmp_path: Path) -> None:
    made = job(tmp_path, "realera")
    assert place(made).parent == state_path(made, open_source(made.checkpoint).checkpoint.sha256()).parent
