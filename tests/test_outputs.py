"""What a job writes appears all together or not at all, and nothing of another erasure is left beside it."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from realera_nodes import job as engine
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.erasure import Erasure, ErasureConfig
from realera_nodes.formats import draft, stream
from realera_nodes.formats.metadata import ErasureMetadata, inspect_file
from realera_nodes.job import Job, Watch, open_source, planned_files, prepare
from tests.tiny import SIDE, tiny_backend, tiny_files

CONFIG = ErasureConfig(
    neighbors=NeighborConfig(m=2, n=3, words=0, vocabulary=40),
    alignment=AlignmentConfig(steps=1, lr=1e-2, rank=2, trajectories=1, trajectory_steps=2),
)
CAT = Concept("cat", "dog", templates=("a photo of the {}",), preserve=(Preserved("bird"),))
_MADE: dict[Any, Erasure] = {}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An erasure is made once for each concept and config."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = engine._erase

    def once(job: Job, *args: Any) -> Erasure:
        key = repr((job.concepts, job.config))
        if key not in _MADE:
            _MADE[key] = real(job, *args)  # type: ignore[assignment]
        return _MADE[key]

    monkeypatch.setattr(engine, "_erase", once)


def job(out: Path, source: Path | None = None, **changes: Any) -> Job:
    base = Job(str(source or tiny_files("sd1")[1]), (CAT,), out, CONFIG, pictures=1, sampling_steps=1, unrelated=0, size=SIDE,
               device="cpu")  # fmt: skip
    return replace(base, **changes)


def run(work: Job, **watch: Any) -> dict[str, Any]:
    return engine.run(work, watch=Watch(backend=tiny_backend("sd1"), **watch))


def there(out: Path) -> dict[str, bytes]:
    """Every file under a folder with its content, hidden ones too."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} if out.exists() else {}


def names(work: Job) -> set[str]:
    return {p.name for p in planned_files(work, open_source(work.checkpoint)).values()}


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_fills_up_at_any_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    work = job(tmp_path / "out", tiny_files("sd1")[0 if folder else 1])
    run(replace(work, out=tmp_path / "first"))  # what is kept in the cache is no matter here
    real, calls, at = os.fsync, [0], [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] == at[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    for at[0] in (1, 2, 3, 4, 5, 6):
        calls[0] = 0
        with pytest.raises(ErasureError, match="no space left on the disk"):
            run(work, beside={"erase.toml": b"x"})
        assert there(tmp_path / "out") == {}, f"file {at[0]}"
    calls[0], at[0] = 0, 10**9
    run(work, beside={"erase.toml": b"x"})
    assert {p.name for p in (tmp_path / "out").iterdir()} == names(work) | {"erase.toml"}


def test_a_name_that_cannot_be_given_leaves_nothing_or_all_that_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(job(out))
    before = there(out)
    real = draft.Draft.take_place

    def refusing(self: Any, *args: Any) -> None:
        if self.target.name == "report.md":
            raise OSError(errno.EACCES, "used by another program")
        real(self, *args)

    monkeypatch.setattr(draft.Draft, "take_place", refusing)
    with pytest.raises(ErasureError):
        run(job(out, overwrite=True, concepts=(replace(CAT, anchor="wall"),)))
    assert there(out) == before
    with pytest.raises(ErasureError):
        run(job(tmp_path / "new"))
    assert there(tmp_path / "new") == {}


def test_a_file_that_comes_out_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stream.encode_header
    monkeypatch.setattr(stream, "encode_header", lambda entries, text: real(entries, text)[:-8] + b"       }")
    with pytest.raises(ErasureError, match="is not as it was written"):
        run(job(tmp_path / "out"))
    assert there(tmp_path / "out") == {}


@pytest.mark.parametrize("way", ["grid.png", "report.md", "lora", "checkpoint"])
@pytest.mark.parametrize("what", ["folder", "dangling link", "pipe"])
def test_things_in_the_way_are_seen_before_any_work(tmp_path: Path, way: str, what: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    files = planned_files(job(out), open_source(job(out).checkpoint))
    target = files.get(way, out / way)
    if what == "folder":
        target.mkdir()
    elif what == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to("nowhere")
    with pytest.raises(ErasureError):
        prepare(job(out))
    if what == "dangling link":
        prepare(job(out, overwrite=True))  # the link is replaced
    else:
        with pytest.raises(ErasureError):
            prepare(job(out, overwrite=True))


def test_outputs_that_can_never_be(tmp_path: Path) -> None:
    source = tiny_files("sd1")[0]
    for out, words in ((source / "vae" / "out", "inside the source folder"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(ErasureError, match=words):
            prepare(job(out, source))
        assert not out.parent.joinpath("out").exists()


@pytest.mark.parametrize("second", [
    {"concepts": (replace(CAT, anchor="wall"),), "config": replace(CONFIG, alignment_on=False)},
    {"config": replace(CONFIG, closed_form_on=False)},
    {"concepts": (replace(CAT, phrase="horse"),), "save_checkpoint": False},
], ids=["edit alone", "LoRA alone", "no checkpoint"])  # fmt: skip
def test_overwriting_with_fewer_files_takes_the_old_ones_away(tmp_path: Path, second: dict[str, Any]) -> None:
    out = tmp_path / "out"
    run(job(out))
    (out / "mine.safetensors").write_bytes(b"a user's own")
    work = job(out, overwrite=True, **second)
    table = run(work)
    left = {p.name for p in out.iterdir()}
    assert left == names(work) | {"mine.safetensors"}
    assert table["removed"]
    assert set(table["removed"]) == names(job(out)) - names(work)
    made = [inspect_file(p)["erasure"] for p in out.iterdir() if p.name in table["files"]]
    assert len({json.dumps([m["concepts"], m["anchors"], m["config"]]) for m in made}) == 1


def test_what_is_not_ours_or_of_the_same_erasure_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    run(job(out))
    checkpoint = planned_files(job(out), open_source(job(out).checkpoint))["checkpoint"]
    again = run(job(out, overwrite=True, save_checkpoint=False))  # the same erasure without its checkpoint
    assert again["removed"] == []
    assert checkpoint.exists()
    lora = checkpoint.with_name(checkpoint.stem + "-lora.safetensors")
    save_file({"x": tiny_backend("sd1").noise([0])}, lora)
    run(job(out, overwrite=True, concepts=(replace(CAT, anchor="wall"),), config=replace(CONFIG, alignment_on=False)))
    assert lora.exists(), "a file that this package did not make was deleted"


def test_a_runs_files_say_that_they_belong_together(tmp_path: Path) -> None:
    run(job(tmp_path))
    stem = tiny_files("sd1")[1].stem + "-erased"
    texts = {}
    for name in (stem, f"{stem}-lora", f"{stem}-edit-lora"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            texts[name] = file.metadata()
    assert len({t["realera.created"] for t in texts.values()}) == 1
    assert f"{stem}-edit-lora" in texts[f"{stem}-lora"]["modelspec.usage_hint"]
    assert f"{stem}-lora" in texts[f"{stem}-edit-lora"]["modelspec.usage_hint"]
    made = [ErasureMetadata.from_safetensors(t) for t in texts.values()]
    assert all(m is not None and m.same_outcome(made[0]) for m in made)  # type: ignore[arg-type]


def test_a_model_whose_name_is_no_unicode(tmp_path: Path) -> None:
    import shutil

    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.safetensors"))
    shutil.copyfile(tiny_files("sd1")[1], source)
    table = run(job(tmp_path / "out", source))
    assert len(list((tmp_path / "out").iterdir())) == 6
    json.dumps(table).encode()
