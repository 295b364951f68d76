"""Nothing in the user's cache stops a run: what is damaged is made anew, and without a cache it goes on."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera_nodes import cache
from realera_nodes.core.concepts import Concept
from realera_nodes.core.training import TrainState
from realera_nodes.mass_config import MassConfig
from realera_nodes.mining import cached_tensor
from realera_nodes.resume import load_state, save_state
from realera_nodes.shelf import Base, FolderShelf

NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FACTORS = {NAME: (torch.ones(2, 768), torch.ones(320, 2))}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAID", set())
    monkeypatch.setattr(cache, "_SUBSTITUTES", {})


def state() -> TrainState:
    one = [torch.ones(3)]
    return TrainState(4, [0.5], {}, one, one, one, torch.Generator().get_state())


def concept_shelf(folder: Path | None = None) -> FolderShelf:
    base = Base((NAME,), "sd1", "0" * 64, "model")
    return FolderShelf.of([Concept("cat", "dog")], [], MassConfig("mace"), base, folder)


DAMAGES = {
    "cut in its data": lambda b: b[:-5],
    "cut in its header": lambda b: b[:20],
    "empty": lambda b: b"",
    "other bytes": lambda b: b"\x00" * len(b),
    "a page": lambda b: b"<html>login</html>",
    "another file": lambda b: (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("other", [{"prediction": "v_prediction"}, {"size": 768}, {"sha256": "1" * 64}])
def test_a_model_that_is_used_otherwise_has_other_loras(tmp_path: Path, other: dict) -> None:
    base = Base((NAME,), "sd1", "0" * 64, "model")
    paths = [
        FolderShelf.of([Concept("cat", "dog")], [], MassConfig("mace"), b, tmp_path).path(Concept("cat", "dog"))
        for b in (base, replace(base, **other))
    ]
    assert paths[0] != paths[1]


def test_what_is_not_needed_any_more_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    cache.forget(tmp_path / "file")
    cache.forget(tmp_path / "folder")
    cache.forget(tmp_path / "never there")
    assert list(tmp_path.iterdir()) == []

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Path, "unlink", refused)
    cache.forget(tmp_path / "kept")
    assert "cannot be deleted (read-only)" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.arange(6.0)

    shelf, concept, kept = concept_shelf(), Concept("cat", "dog"), cache.cached("training", "x.safetensors")
    cached_tensor("k", make)
    shelf.save(concept, FACTORS)
    save_state(state(), kept)
    assert torch.equal(cached_tensor("k", make), torch.arange(6.0))
    assert len(made) == 1
    found = load_state(kept)
    assert found is not None
    assert found.step == 4
    assert shelf.load(concept) is not None
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 3
    for path in files:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert torch.equal(cached_tensor("k", make), torch.arange(6.0))
    assert len(made) == 2, "it was not made anew"
    assert load_state(kept) is None
    assert shelf.load(concept) is None
    assert sum("made anew" in r.message for r in caplog.records) == 3
    shelf.save(concept, FACTORS)
    save_state(state(), kept)
    assert torch.equal(cached_tensor("k", make), torch.arange(6.0))
    assert len(made) == 2, "the new one was not kept"
    assert load_state(kept) is not None
    assert shelf.load(concept) is not None


def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> Path:
    """A cache folder that cannot be written, as root finds one too."""
    if how == "a file in its place":
        (tmp_path / "cache").write_text("")
        return tmp_path / "cache"
    if how == "nowhere":
        return Path("/proc/nowhere")
    real = tempfile.TemporaryFile

    def refusing(*args, dir=None, **kwargs):
        if dir is not None and str(tmp_path) in str(dir):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    return tmp_path / "cache"


@pytest.mark.parametrize("how", ["a file in its place", "nowhere", "read-only"])
def test_without_a_cache_it_goes_on_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, caplog) -> None:
    folder = read_only(tmp_path, monkeypatch, how)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert torch.equal(cached_tensor("k", lambda: torch.ones(2)), torch.ones(2))
    shelf, concept, kept = concept_shelf(), Concept("cat", "dog"), cache.cached("training", "x.safetensors")
    shelf.save(concept, FACTORS)
    assert shelf.load(concept) is not None, "within one run finished concepts are found again"
    save_state(state(), kept)
    assert load_state(kept) is not None
    told = [r for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(told) == 1
    assert "\n" not in told[0].getMessage()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size], "something was written there"


def test_a_cache_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    from realera_nodes.formats import stream

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream, "encode_header", full)
    for _ in range(2):
        assert torch.equal(cached_tensor("k", lambda: torch.ones(2)), torch.ones(2))
        save_state(state(), cache.cached("training", "x.safetensors"))
    assert sum("goes on without" in r.getMessage() for r in caplog.records) >= 2
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_embedded_model_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera_nodes.demo import expand

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(expand, "manifest", lambda: {"expanded": {"x": "0" * 64}})
    monkeypatch.setattr(expand, "tree_hash", lambda path: "0" * 64)
    monkeypatch.setattr(expand, "_complete", Path.is_file)
    path = expand._cached("x", lambda p: p.write_text("whole"))
    assert path.read_text() == "whole"
    assert expand._cached("x", lambda p: pytest.fail("it was written again")) == path
