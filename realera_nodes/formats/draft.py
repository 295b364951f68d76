"""A file or folder while it is written: under no name at all where that can be, else under a hidden one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from . import windows
from .places import exists, explained

#: what open(O_TMPFILE) answers where it is not supported: by the file system, by an old kernel, by a FUSE driver
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS}
_BINARY = getattr(os, "O_BINARY", 0)


def sync_folder(folder: Path) -> None:
    if windows.WINDOWS:  # which cannot open folders; its renames are journalled
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(target: Path) -> Path:
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


def remove(path: Path) -> None:
    """A file, a link or a folder goes; none is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Draft:
    """A file or folder that is being written and has no name yet, or a hidden one.

    Attributes:
        target: the name that it is to have
        partial: the hidden name; None for a file without any
        fd: of a file without a name
        backup: hidden name of what was at the target
        final: whether it replaces a file of which nothing is kept
    """

    def __init__(self, target: Path, folder: bool = False):
        self.target, self.is_folder, self.fd = target, folder, -1
        self.file: IO[bytes] | None = None
        self.partial: Path | None = None
        self.backup: Path | None = None
        self.final = False
        try:
            if folder:
                self.partial = temporary(target)
                self.partial.mkdir()
                return
            fd = _open_nameless(target.parent)
            if fd is None:
                self.partial = temporary(target)
                fd = os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)
        except OSError as error:
            raise explained(error, target) from error
        self.fd, self.file = fd, os.fdopen(fd, "wb")

    @property
    def readable(self) -> Path:
        """A path under which this process can read what was written."""
        return self.partial or Path(f"/proc/self/fd/{self.fd}")

    def finish(self) -> None:
        """All of it is on the disk."""
        if self.file is None:
            for folder, _, _ in os.walk(self.readable):
                sync_folder(Path(folder))
            return
        self.file.flush()
        os.fsync(self.fd)
        if self.partial is not None:  # Windows does not rename open files
            self.file.close()

    def take_place(self, overwrite: bool, keep: bool) -> None:
        """Gets its name. With ``keep``, what was there before waits under a hidden name, so that ``give_back`` can undo it."""
        there = os.path.lexists(self.target)
        if there and not overwrite:
            raise exists(self.target)
        if self.partial is None and not there:
            try:
                return _link(self.fd, self.target)
            except FileExistsError as error:
                if not overwrite:
                    raise exists(self.target) from error
        if self.partial is None:
            hidden = temporary(self.target)
            _link(self.fd, hidden)
            self.partial = hidden
        self.final = there and not keep and not self.is_folder
        if there and not self.final:
            _set_aside(self)
        windows.replace(self.partial, self.target)

    def give_back(self) -> None:
        """Undoes ``take_place``, however far it came: an exception may have come between any two calls."""
        if self.partial is not None:
            placed = not os.path.lexists(self.partial)
        else:
            placed = os.path.lexists(self.target) and os.path.samestat(os.lstat(self.target), os.fstat(self.fd))
        if placed and not self.final:
            remove(self.target)
        if self.backup is not None and os.path.lexists(self.backup):
            windows.replace(self.backup, self.target)
            self.backup.unlink(missing_ok=True)  # renaming one name of a file to its other does nothing

    def discard(self) -> None:
        """Nothing of it stays under a hidden name."""
        if self.file is not None and not self.file.closed:
            with suppress(OSError):  # an exception is on its way already, or all was synced before
                self.file.close()
        if self.partial is not None:
            with suppress(OSError):
                remove(self.partial)


def _set_aside(draft: Draft) -> None:
    """What is at the target gets a hidden name too, or only that one where files cannot have two."""
    draft.backup = temporary(draft.target)
    if not draft.is_folder:
        with suppress(OSError, NotImplementedError):  # no gap between the old file and the new one
            return os.link(draft.target, draft.backup, follow_symlinks=False)
    windows.set_aside(draft.target, draft.backup)
