"""Where files are to go: refused before long work, in one sentence, where they cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from ..core.errors import ErasureError
from . import windows

NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


def require_space(folder: Path, nbytes: int) -> None:
    """Raises ErasureError, naming needed and free gigabytes, unless ``nbytes`` fit where ``folder`` is or will be."""
    free = shutil.disk_usage(_existing(folder.absolute())).free
    if free < nbytes:
        raise ErasureError(
            f"{folder} needs {nbytes / 1e9:.2f} GB of disk space but only {free / 1e9:.2f} GB are free: "
            "free some space or choose another folder."
        )


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuses a place for a file that cannot be written: call it before long work, ``atomic_file`` calls it too.

    Raises:
        ErasureError: the target exists and ``overwrite`` is False, is a folder, a pipe or a device, has a name that cannot be,
            or its folder cannot be written to.
    """
    if os.path.isdir(target):
        raise ErasureError(f"{target} is a folder, but a file is to be written: add a file name.")
    check_place(target, overwrite)
    try:
        special = os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode)
    except OSError:
        special = False  # gone meanwhile
    if special:
        raise ErasureError(f"{target} is a pipe or a device, not a file: choose another name.")


def check_folder_target(target: Path, overwrite: bool = False, marker: str = "model_index.json") -> None:
    """Refuses a place for a folder that cannot be written; one that is there is replaced only if it is empty or holds ``marker``.

    Raises:
        ErasureError: as ``check_target``, or other files are in it.
    """
    check_place(target, overwrite)
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_dir():
            raise ErasureError(f"{target} is not a folder, but a folder is to be written: choose another name.")
        if any(target.iterdir()) and not (target / marker).exists():
            raise ErasureError(f"{target} holds other files and no {marker}, so it is not overwritten: choose another folder.")


def check_place(target: Path, overwrite: bool) -> None:
    """What holds for files and folders alike. Raises ErasureError: see ``check_target``."""
    windows.check_names(target)
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) != errno.ENOTDIR:  # which is told below
            raise explained(error, target) from error
    else:
        if not overwrite:
            raise exists(target)
    there = _existing(target.absolute().parent)
    if not there.is_dir():
        raise ErasureError(f"{there} is a file, so nothing can be written inside it: choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ErasureError(not_writable(target))


def _existing(there: Path) -> Path:
    """The nearest folder above that is there. ErasureError: none is, as on a drive that does not exist."""
    while not os.path.lexists(there):
        if there.parent == there:
            raise ErasureError(f"{there} does not exist: choose another folder.")
        there = there.parent
    return there


def exists(target: Path) -> ErasureError:
    return ErasureError(f"{target} already exists: choose another name or folder, or allow overwriting (--overwrite).")


def not_writable(target: Path) -> str:
    return f"{target} cannot be written, its folder is read-only or you lack the permission: choose another folder."


def explained(error: Exception, target: Path) -> Exception:
    """The sentence for what a user can change, else the error itself."""
    number = getattr(error, "errno", None)
    if number in NO_SPACE:
        return ErasureError(f"there is no space left on the disk of {target}: free some space or choose another folder.")
    if number == errno.EFBIG:
        return ErasureError(f"the disk of {target} cannot hold a file this large: choose another folder.")
    if number == errno.ENAMETOOLONG:
        return ErasureError(f"the name {target} is too long for this disk: choose a shorter name or folder.")
    if number == errno.ELOOP:
        return ErasureError(f"{target} goes through links that lead in a circle: choose another folder.")
    if number == errno.EROFS or (number in _NO_PERMISSION and not windows.WINDOWS):
        return ErasureError(not_writable(target))
    if number in _NO_PERMISSION:  # on Windows also when it is merely open
        return ErasureError(f"{target} cannot be written: close the programs that use it, or choose another folder.")
    if isinstance(error, ValueError):
        return ErasureError(f"{str(target)!r} is no name for a file ({error}): choose another name.")
    return error
