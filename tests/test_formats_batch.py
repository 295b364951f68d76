"""Files of one run appear together or not at all, whatever happens when they get their names."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats import atomic, windows
from realera_nodes.formats.atomic import Batch

NAMES = ("edit-lora.safetensors", "lora.safetensors", "model", "report.md")


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def write(batch: Batch, out: Path, text: str, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        if "." in name:
            with batch.file(out / name) as f:
                f.write(text.encode())
        else:
            with batch.folder(out / name) as folder:
                (folder / "model_index.json").write_text(text)


def content(out: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too."""
    return {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()}


def whole(text: str, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    return {n if "." in n else f"{n}/model_index.json": text for n in names}


@pytest.mark.parametrize("over", [False, True])
def test_all_appear_at_the_end(tmp_path: Path, way: str, over: bool) -> None:
    out = tmp_path / "new" / "out"
    if over:
        with Batch() as batch:
            write(batch, out, "old")
    with Batch(over) as batch:
        write(batch, out, "new")
        assert {k: v for k, v in content(tmp_path).items() if "partial" not in k} == (
            {f"new/out/{k}": v for k, v in whole("old").items()} if over else {}
        )
    assert content(out) == whole("new")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("over", [False, True])
def test_nothing_stays_after_an_exception(tmp_path: Path, way: str, over: bool, error: type[BaseException]) -> None:
    out = tmp_path / "new" / "out"
    if over:
        with Batch() as batch:
            write(batch, out, "old")
    with pytest.raises(error), Batch(over) as batch:  # noqa: PT012
        write(batch, out, "new")
        raise error
    assert (content(out) == whole("old")) if over else (os.listdir(tmp_path) == [])


def failing(calls: list[int], at: int, error: BaseException, real: Callable) -> Callable:
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "open elsewhere"), KeyboardInterrupt()])
@pytest.mark.parametrize("over", [False, True])
def test_a_name_that_cannot_be_given_takes_the_others_back(
    tmp_path: Path, way: str, over: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call it is that fails: every link and every rename, until one run passes without."""
    for at in range(1, 40):
        out = tmp_path / str(at)
        out.mkdir()
        if over:
            with Batch() as batch:
                write(batch, out, "old")
            (out / "stale").write_text("stale")
        calls: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            try:
                with Batch(over) as batch:
                    write(batch, out, "new")
                    if over:
                        batch.remove(out / "stale")
                    for name in ("link", "replace", "rename"):
                        patch.setattr(os, name, failing(calls, at, error, getattr(os, name)))
            except BaseException:
                assert content(out) == (whole("old") | {"stale": "stale"} if over else {}), f"call {at}"
                continue
        if len(calls) < at:
            assert at > len(NAMES), "the calls were not counted"
            assert content(out) == whole("new")
            return
    pytest.fail("every call failed")


def test_file_systems_where_a_file_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT, many network drives: no hard links, so the old file moves aside."""

    def refusing(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "link", refusing)
    for text in ("old", "new"):
        with Batch(True) as batch:
            write(batch, tmp_path, text)
    assert content(tmp_path) == whole("new")
    real = os.replace

    def once(source, target):
        if Path(target).name == NAMES[-1] and "partial" in str(source) and Path(source).read_text() == "newer":
            raise OSError(errno.EACCES, "open elsewhere")
        return real(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(ErasureError), Batch(True) as batch:
        write(batch, tmp_path, "newer")
    assert content(tmp_path) == whole("new")


def test_what_an_earlier_run_left_goes_with_the_new_files(tmp_path: Path) -> None:
    with Batch() as batch:
        write(batch, tmp_path, "old")
    with pytest.raises(RuntimeError), Batch(True) as batch:  # noqa: PT012
        batch.remove(tmp_path / NAMES[1])
        raise RuntimeError
    assert content(tmp_path) == whole("old")
    with Batch(True) as batch:
        write(batch, tmp_path, "new", NAMES[:1])
        batch.remove(tmp_path / NAMES[1])
        batch.remove(tmp_path / "model")
        batch.remove(tmp_path / "was never there")
    assert content(tmp_path) == whole("new", NAMES[:1]) | {"report.md": "old"}


def test_written_files_can_be_read_before_they_appear(tmp_path: Path, way: str) -> None:
    with Batch() as batch:
        write(batch, tmp_path, "text")
        assert batch.written(tmp_path / NAMES[0]).read_text() == "text"
        assert (batch.written(tmp_path / "model") / "model_index.json").read_text() == "text"


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "é" * 200, "a\0b"])
def test_names_that_no_disk_takes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ErasureError, match=r"too long for this disk|is no name for a file") as caught:
        atomic.check_target(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ErasureError), Batch() as batch, batch.file(tmp_path / "sub" / name):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["nul", "CON.safetensors", "com1.tar.gz", "a:b", "a?.png", "end.", "end ", "tab\tbed", "LPT².x"])
def test_names_that_windows_has_for_itself(name: str) -> None:
    """A colon writes into a hidden stream of another file; a device swallows everything; both without an error."""
    assert windows.windows_refuses(name)
    windows.check_names(Path("/") / name)  # which is fine elsewhere


@pytest.mark.parametrize("name", ["console.safetensors", "a.nul", "com.png", "überhaupt 1.5-erased.safetensors", ".hidden"])
def test_names_that_windows_takes(name: str) -> None:
    assert not windows.windows_refuses(name)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "dangling", "loop"])
def test_things_in_the_way_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, over: bool) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    target = tmp_path / "t"
    with socket.socket(socket.AF_UNIX) as s:
        if kind == "socket":
            s.bind("t")
        elif kind == "fifo":
            os.mkfifo(target)
        elif kind == "folder":
            target.mkdir()
        else:
            target.symlink_to("t" if kind == "loop" else "nowhere")
        if over and kind in ("dangling", "loop"):
            with atomic.atomic_file(target, over) as f:  # a link is replaced
                f.write(b"x")
            assert target.read_bytes() == b"x"
            assert os.listdir(tmp_path) == ["t"]
            return
        with pytest.raises(ErasureError):
            atomic.check_target(target, over)
        with pytest.raises(ErasureError), atomic.atomic_file(target, over):
            pass
    assert os.listdir(tmp_path) == ["t"]


def test_a_drive_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda p: False)
    for ask in (lambda: atomic.check_target(Path("/x/y")), lambda: atomic.require_space(Path("/x/y"), 1)):
        with pytest.raises(ErasureError, match="does not exist: choose another folder"):
            ask()
