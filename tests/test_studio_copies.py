"""Copies of finished runs: what belongs together is called alike, and never like a half of another run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from realera_nodes.core.errors import ErasureError
from realera_nodes.studio.export import copy_to
from realera_nodes.studio.request import Request
from realera_nodes.studio.runs import Run, Runs
from realera_nodes.studio.safety import Places

PAIR = ("m-erased-edit-lora.safetensors", "m-erased-lora.safetensors")
ALL = (*PAIR, "m-erased.safetensors", "grid.png", "report.md", "report.json", "erase.toml")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("loras", "models"):
        (tmp_path / name).mkdir()
    return Places(tmp_path / "out", exports={name: tmp_path / name for name in ("loras", "models")})


def run_of(places: Places, content: str, files: tuple[str, ...] = ALL, concept: str = "cat") -> Run:
    run = Runs(places.runs).create("erase", Request(concepts=(concept,), anchors=("dog",)))
    run.files.mkdir()
    for name in files:
        (run.files / name).write_text(content)
    return run


def test_the_same_concept_erased_twice(places: Places) -> None:
    """Every copy works, in whatever order, and of each name all files are of one run."""
    first, second = run_of(places, "first"), run_of(places, "second")
    for run, name in itertools.chain(zip((first, second) * 4, ALL, strict=False), ((second, n) for n in PAIR)):
        try:
            copy_to(run, name, "loras", places)
        except ErasureError as error:
            assert "copied before" in str(error)  # noqa: PT017
    folder = places.exports["loras"]
    assert (folder / "m-erased-lora-cat-2.safetensors").read_text() == "second"
    assert (folder / "m-erased-edit-lora-cat-2.safetensors").read_text() == "second"
    for end, text in (("cat", "first"), ("cat-2", "second")):
        assert {p.read_text() for p in folder.iterdir() if p.stem.endswith(f"-{end}")} == {text}


@pytest.mark.parametrize(("mine", "theirs"), [(PAIR[:1], PAIR[1:]), (PAIR[1:], PAIR[:1]), (PAIR[1:], ("m-erased.safetensors",))])
def test_halves_of_two_runs_do_not_become_a_pair(places: Places, mine: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    """Neither run has both LoRAs, so no name is taken: still they must not look like a pair."""
    a, b = run_of(places, "a", mine), run_of(places, "b", theirs)
    first, second = copy_to(a, mine[0], "loras", places), copy_to(b, theirs[0], "loras", places)
    assert first.stem.endswith("-cat")
    assert second.stem.endswith("-cat-2")


def test_files_that_somebody_else_put_there(places: Places) -> None:
    folder = places.exports["loras"]
    (folder / "M-Erased-LoRA-Cat.safetensors").write_text("another disk's spelling of the same name")
    run = run_of(places, "x")
    assert [copy_to(run, n, "loras", places).name for n in PAIR] == [
        "m-erased-edit-lora-cat-2.safetensors", "m-erased-lora-cat-2.safetensors"]  # fmt: skip
    (folder / "grid-cat-2.png").write_text("came later")
    with pytest.raises(ErasureError, match=r"is not of this run: rename it or move it away") as caught:
        copy_to(run, "grid.png", "loras", places)
    assert "--overwrite" not in str(caught.value)
    assert (folder / "grid-cat-2.png").read_text() == "came later"


def test_copying_again_says_that_it_is_there(places: Places) -> None:
    run = run_of(places, "x")
    target = copy_to(run, PAIR[0], "loras", places)
    with pytest.raises(ErasureError, match="already exists: it is this very file, copied before") as caught:
        copy_to(run, PAIR[0], "loras", places)
    assert "--" not in str(caught.value)
    assert copy_to(run, PAIR[0], "models", places).name == target.name, "another folder has names of its own"
    target.unlink()
    assert copy_to(run, PAIR[0], "loras", places) == target, "deleted, so copied again"


@pytest.mark.parametrize(("model", "copy"), [("v1.5-pruned", "v1.5-pruned-erased-lora-cat.safetensors"),
                                             ("a.b.c", "a.b.c-erased-lora-cat.safetensors")])  # fmt: skip
def test_dots_in_a_models_name_stay_where_they_are(places: Places, model: str, copy: str) -> None:
    run = run_of(places, "x", (f"{model}-erased-lora.safetensors",))
    assert copy_to(run, f"{model}-erased-lora.safetensors", "loras", places).name == copy


def test_a_folder_and_a_concept_without_letters(places: Places) -> None:
    names = []
    for content in ("a", "b"):
        run = run_of(places, content, concept="!?")
        (run.files / "v1.5-erased").mkdir()
        (run.files / "v1.5-erased" / "model_index.json").write_text(content)
        names.append(copy_to(run, "v1.5-erased", "models", places).name)
    assert names == ["v1.5-erased", "v1.5-erased-2"]
    assert (places.exports["models"] / "v1.5-erased-2" / "model_index.json").read_text() == "b"
