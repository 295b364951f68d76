"""Files and folders that appear whole or not at all.

On Linux a file is written without a name (``O_TMPFILE``) and gets one only when it is complete, so that
nothing stays behind even when the process is killed. Elsewhere, and on file systems that cannot do this,
it is written under a hidden temporary name, which is removed on any exception.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..core.errors import ErasureError
from . import places
from .places import check_names, replace, sync

#: what open(O_TMPFILE) answers where it is not supported: by the file system, by an old kernel, by a FUSE driver
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS}
_NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_BINARY = getattr(os, "O_BINARY", 0)


def require_space(folder: Path, nbytes: int) -> None:
    """Raises ErasureError, naming needed and free gigabytes, unless ``nbytes`` fit where ``folder`` is or will be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise ErasureError(
            f"{folder} needs {nbytes / 1e9:.2f} GB of disk space but only {free / 1e9:.2f} GB are free: "
            "free some space or choose another folder."
        )


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuses a place for a file that cannot be written: call it before long work, ``atomic_file`` calls it too.

    Raises:
        ErasureError: the target exists and ``overwrite`` is False, is a folder, or its folder cannot be written to.
    """
    if target.is_dir():
        raise ErasureError(f"{target} is a folder, but a file is to be written: add a file name.")
    _check_place(target, overwrite)


def _check_place(target: Path, overwrite: bool) -> None:
    check_names(target)
    if os.path.lexists(target) and not overwrite:
        raise _exists(target)
    there = target.absolute().parent
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ErasureError(f"{there} is a file, so nothing can be written inside it: choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ErasureError(_not_writable(target))


def _exists(target: Path) -> ErasureError:
    return ErasureError(f"{target} already exists: choose another name or folder, or allow overwriting (--overwrite).")


def _not_writable(target: Path) -> str:
    return f"{target} cannot be written, its folder is read-only or you lack the permission: choose another folder."


def _explained(error: OSError, target: Path) -> Exception:
    """The sentence for what a user can change, else the error itself."""
    if error.errno in _NO_SPACE:
        return ErasureError(f"there is no space left on the disk of {target}: free some space or choose another folder.")
    if error.errno == errno.EFBIG:
        return ErasureError(f"the disk of {target} cannot hold a file this large: choose another folder.")
    return error


def _sync_folder(folder: Path) -> None:
    if places.WINDOWS:  # which cannot open folders; its renames are journalled
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(target: Path) -> Path:
    """A hidden name beside the target; cut short, as file names are limited to 255 bytes."""
    return target.parent / f".{target.name[:40]}.{os.getpid()}-{secrets.token_hex(3)}.partial"


def _open_nameless(folder: Path) -> int | None:
    """A file without a name inside ``folder``, or None where there is no such thing."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            return None
        raise


def _link(fd: int, path: Path) -> None:
    """Gives the nameless file ``fd`` a name. Raises FileExistsError where the name is taken."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # with dst_dir_fd, as Python calls link(2) without it, which would link the symlink in /proc
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _publish(fd: int, partial: Path | None, target: Path, overwrite: bool) -> None:
    """Names the complete file. ``partial`` is its temporary name, if it has one."""
    if partial is None and not overwrite:
        try:
            _link(fd, target)
        except FileExistsError as error:
            raise _exists(target) from error
        return
    if partial is None:
        partial = _temporary(target)
        _link(fd, partial)
    try:
        if not overwrite and os.path.lexists(target):
            raise _exists(target)
        replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(target: Path, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes ``target`` when the block ends without an exception.

    The target's folder is made if missing. File and folder are synced to the disk. With ``overwrite`` the old file
    stays until the new one takes its place; a symbolic link is replaced, not the file it points to.

    Raises:
        ErasureError: the target exists, is a folder, its folder cannot be written to, or the disk is full.
    """
    target = Path(target)
    check_target(target, overwrite)
    partial: Path | None = None
    file: IO[bytes] | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = _open_nameless(target.parent)
        if fd is None:
            partial = _temporary(target)
            fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)
    except OSError as error:
        if error.errno in _NO_PERMISSION:
            raise ErasureError(_not_writable(target)) from error
        raise _explained(error, target) from error
    try:
        file = os.fdopen(fd, "wb")
        yield file
        file.flush()
        os.fsync(fd)
        if partial is not None:  # Windows does not rename open files
            file.close()
        _publish(fd, partial, target, overwrite)
        file.close()
        _sync_folder(target.parent)
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        if file is not None and not file.closed:
            with suppress(OSError):  # an exception is on its way already, and nothing of the file is kept
                file.close()
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path for a writer that opens files itself; it becomes ``target`` when the block ends without an exception.

    Raises:
        ErasureError: as ``atomic_file``.
    """
    target = Path(target)
    check_target(target)
    partial = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        _publish(-1, partial, target, overwrite=False)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno in _NO_PERMISSION and not partial.exists():
            raise ErasureError(_not_writable(target)) from error
        raise _explained(error, target) from error
    finally:
        with suppress(OSError):  # on Windows the writer may still have it open, after an exception that is on its way
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False, marker: str = "model_index.json") -> Iterator[Path]:
    """An empty folder to fill, which becomes ``target`` when the block ends without an exception.

    A killed process leaves at most a hidden ``.NAME.PID-xxxxxx.partial`` folder beside the target.

    Args:
        target: the folder to appear; its parent is made if missing.
        overwrite: replace a folder that is there, if it is empty or holds ``marker``: no other folder is deleted.
        marker: the file that tells a folder of our kind.

    Raises:
        ErasureError: the target exists, or is no folder of our kind, cannot be written to, or the disk is full.
    """
    target = Path(target)
    _check_place(target, overwrite)
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_dir():
            raise ErasureError(f"{target} is not a folder, but a folder is to be written: choose another name.")
        if any(target.iterdir()) and not (target / marker).exists():
            raise ErasureError(f"{target} holds other files and no {marker}, so it is not overwritten: choose another folder.")
    partial = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        if error.errno in _NO_PERMISSION:
            raise ErasureError(_not_writable(target)) from error
        raise _explained(error, target) from error
    try:
        yield partial
        for folder, _, _ in os.walk(partial):
            _sync_folder(Path(folder))
        _swap(partial, target, overwrite)
        _sync_folder(target.parent)
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well


def _swap(partial: Path, target: Path, overwrite: bool) -> None:
    """``partial`` becomes ``target``; a folder that was there is put back if that fails, else deleted."""
    if not target.exists():
        replace(partial, target)
        return
    if not overwrite:
        raise _exists(target)
    old = _temporary(target)
    try:
        replace(target, old)
    except ErasureError as error:  # on Windows; the name that people know is the target's
        raise ErasureError(str(error).replace(str(old), str(target))) from error
    try:
        replace(partial, target)
    except BaseException:
        replace(old, target)
        raise
    shutil.rmtree(old)
