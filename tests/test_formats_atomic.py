"""Files and folders appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats import atomic

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of writing: without a name until the end, and under a temporary name."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def nameless_works(folder: Path) -> bool:
    fd = atomic._open_nameless(folder)
    if fd is not None:
        os.close(fd)
    return fd is not None


def test_the_file_appears_at_the_end(tmp_path: Path, way: str) -> None:
    target = tmp_path / "new" / "a.safetensors"
    with atomic.atomic_file(target) as f:
        f.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert os.listdir(target.parent) == ["a.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_stays_after_an_exception(tmp_path: Path, way: str, error: type[BaseException], overwrite: bool) -> None:
    target = tmp_path / "a"
    if overwrite:
        target.write_bytes(b"old")
    with pytest.raises(error), atomic.atomic_file(target, overwrite) as f:  # noqa: PT012
        f.write(b"half" * 100_000)
        raise error
    assert os.listdir(tmp_path) == (["a"] if overwrite else [])
    assert not overwrite or target.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_stays_after_kill_9(tmp_path: Path, overwrite: bool) -> None:
    if not nameless_works(tmp_path):
        pytest.skip("this file system has no O_TMPFILE: a killed process leaves a hidden temporary file")
    target = tmp_path / "a"
    if overwrite:
        target.write_bytes(b"old")
    program = f"""
import sys, time
from pathlib import Path
from realera_nodes.formats.atomic import atomic_file
with atomic_file(Path({str(target)!r}), {overwrite}) as f:
    f.write(b"x" * 10_000_000); f.flush()
    print("half", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"half\n"
        process.kill()
        process.wait(20)
    assert os.listdir(tmp_path) == (["a"] if overwrite else [])
    assert not overwrite or target.read_bytes() == b"old"


def test_overwriting(tmp_path: Path, way: str) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(ErasureError, match=r"already exists: choose another name"), atomic.atomic_file(target):
        pass
    with atomic.atomic_file(target, overwrite=True) as f:
        f.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path, way: str) -> None:
    target = tmp_path / "a"
    with pytest.raises(ErasureError, match="already exists"), atomic.atomic_file(target) as f:  # noqa: PT012
        f.write(b"mine")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a"]


def test_overwriting_a_link_leaves_what_it_points_to(tmp_path: Path, way: str) -> None:
    original, link = tmp_path / "original", tmp_path / "link"
    original.write_bytes(b"old")
    link.symlink_to(original)
    with atomic.atomic_file(link, overwrite=True) as f:
        f.write(b"new")
    assert original.read_bytes() == b"old"
    assert link.read_bytes() == b"new"


def test_a_long_name_fits(tmp_path: Path, way: str) -> None:
    target = tmp_path / ("é" * 120 + ".safetensors")
    with atomic.atomic_file(target) as f:
        f.write(b"x")
    assert target.exists()


@pytest.mark.parametrize("code", sorted(atomic._NO_TMPFILE))
def test_file_systems_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    if not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no O_TMPFILE")
    real = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with atomic.atomic_file(tmp_path / "a") as f:
        f.write(b"x")
        assert len(os.listdir(tmp_path)) == 1  # the temporary name
    assert os.listdir(tmp_path) == ["a"]


def test_full_disk_while_writing(tmp_path: Path, way: str) -> None:
    with pytest.raises(ErasureError, match="no space left on the disk"), atomic.atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_an_error_inside_a_folder_names_where_it_was_to_go(tmp_path: Path) -> None:
    def full() -> None:
        with atomic.atomic_folder(tmp_path / "model") as folder, atomic.atomic_file(folder / "unet" / "a"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ErasureError, match="no space left") as told:
        full()
    assert str(tmp_path / "model" / "unet" / "a") in str(told.value)
    assert "partial" not in str(told.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_when_the_buffer_is_written(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fdopen

    def full(fd: int, mode: str):
        os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
        return real(fd, mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(ErasureError, match="no space left on the disk"), atomic.atomic_file(tmp_path / "a") as f:
        f.write(b"x")
    assert os.listdir(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path: Path, way: str) -> None:
    with pytest.raises(FileNotFoundError), atomic.atomic_file(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()


def test_unusable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErasureError, match="is a folder, but a file is to be written"), atomic.atomic_file(tmp_path):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ErasureError, match="is a file, so nothing can be written inside"):
        atomic.check_target(tmp_path / "file" / "sub" / "a")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to read-only folders
    with pytest.raises(ErasureError, match="read-only or you lack the permission"):
        atomic.check_target(tmp_path / "a")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refusing(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ErasureError, match="read-only or you lack the permission"), atomic.atomic_file(tmp_path / "a"):
        pass


def test_space_is_checked_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(9e9, 7e9, 2_100_000_000))
    atomic.require_space(tmp_path / "not" / "yet", 2_100_000_000)
    with pytest.raises(ErasureError, match=r"needs 6\.90 GB .* only 2\.10 GB are free"):
        atomic.require_space(tmp_path / "not" / "yet", 6_900_000_000)


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "pipe"
    with atomic.atomic_folder(target) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "a").write_bytes(b"1")
        assert not target.exists()
    assert (target / "unet" / "a").read_bytes() == b"1"
    assert os.listdir(target.parent) == ["pipe"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_half_folder_stays(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic.atomic_folder(tmp_path / "pipe") as folder:  # noqa: PT012
        (folder / "a").write_bytes(b"1")
        raise error
    assert os.listdir(tmp_path) == []


def test_overwriting_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "pipe"
    target.mkdir()
    (target / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ErasureError, match="already exists: choose another name"), atomic.atomic_folder(target):
        pass
    with pytest.raises(ErasureError, match=r"holds other files and no model_index\.json"), atomic.atomic_folder(target, True):
        pass
    (target / "model_index.json").write_text("{}")
    with atomic.atomic_folder(target, overwrite=True) as folder:
        (folder / "a").write_bytes(b"new")
    assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(ErasureError, match="is not a folder"), atomic.atomic_folder(target / "a", overwrite=True):
        pass


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    target = tmp_path / "pipe"
    target.mkdir()
    (target / "model_index.json").write_text("old")
    with pytest.raises(FileNotFoundError), atomic.atomic_folder(target, overwrite=True) as folder:
        folder.rmdir()
    assert (target / "model_index.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["pipe"]
