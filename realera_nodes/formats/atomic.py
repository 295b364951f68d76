"""Files and folders that appear whole or not at all, one by one or all of a run together.

On Linux a file is written without a name (``O_TMPFILE``) and gets one only when it is complete, so that
nothing stays behind even when the process is killed. Elsewhere, and on file systems that cannot do this,
it is written under a hidden temporary name, which is removed on any exception.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ..core.errors import ErasureError
from . import windows
from .draft import _NO_TMPFILE, Draft, _open_nameless, remove, sync_folder, temporary  # noqa: F401 tests ask for them here
from .places import NO_SPACE, check_folder_target, check_place, check_target, exists, explained, require_space

__all__ = ["Batch", "atomic_file", "atomic_folder", "atomic_path", "check_target", "require_space"]


class Batch:
    """Files and folders that appear together or not at all.

        with Batch(overwrite) as batch:
            with batch.file(out / "a.png") as f: ...
            with batch.folder(out / "model") as folder: ...

    When the block ends without an exception all of them get their names, in a moment; if one of them cannot, the others
    lose theirs again and what was there before comes back. After an exception nothing of them is left, nor of folders that
    were made for them. Only a process that is killed in that moment leaves a part.

    Args:
        overwrite: replace what is there
    """

    def __init__(self, overwrite: bool = False):
        self.overwrite = overwrite
        self._drafts: list[Draft] = []
        self._going: list[Path] = []
        self._made: list[Path] = []

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
                self._made.clear()
        finally:
            for draft in self._drafts:
                draft.discard()
            for folder in reversed(self._made):
                with suppress(OSError):  # somebody else's file is in it by now
                    folder.rmdir()

    @contextmanager
    def file(self, target: Path) -> Iterator[IO[bytes]]:
        """A binary file to write to. Synced to the disk when the block ends; a link is replaced, not the file it points to.

        Raises:
            ErasureError: the target exists, is a folder, its folder cannot be written to, or the disk is full.
        """
        target = Path(target)
        check_target(target, self.overwrite)
        with self._drafted(target, False) as draft:
            assert draft.file is not None
            yield draft.file

    @contextmanager
    def folder(self, target: Path, marker: str = "model_index.json") -> Iterator[Path]:
        """An empty folder to fill.

        Args:
            marker: the file that tells a folder of our kind: no other folder is replaced, unless it is empty

        Raises:
            ErasureError: the target exists, or is no folder of our kind, cannot be written to, or the disk is full.
        """
        target = Path(target)
        check_folder_target(target, self.overwrite, marker)
        with self._drafted(target, True) as draft:
            yield draft.readable

    def written(self, target: Path) -> Path:
        """Where this process can read what was written for ``target``, before it has its name."""
        return next(d for d in self._drafts if d.target == Path(target)).readable

    def remove(self, target: Path) -> None:
        """A file or folder of an earlier run goes when the new ones appear."""
        check_place(target, True)
        self._going.append(Path(target))

    @contextmanager
    def _drafted(self, target: Path, folder: bool) -> Iterator[Draft]:
        self._make(target.parent)
        draft = Draft(target, folder)
        self._drafts.append(draft)
        try:
            yield draft
            draft.finish()
        except ErasureError as error:  # of a file inside, by the hidden name that the folder still has
            raise ErasureError(str(error).replace(str(draft.partial), str(target))) from error
        except OSError as error:
            if error.filename is not None and error.errno not in NO_SPACE:
                raise  # of another file, such as the one that is copied
            raise explained(error, target) from error

    def _make(self, folder: Path) -> None:
        missing: list[Path] = []
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = folder.parent
        for one in reversed(missing):
            try:
                one.mkdir(exist_ok=True)
            except OSError as error:
                raise explained(error, one) from error
            self._made.append(one)

    def _publish(self) -> None:
        keep = len(self._drafts) + len(self._going) > 1  # a single file replaces the old one at once
        begun: list[Draft] = []
        aside: dict[Path, Path] = {}
        target = Path()
        try:
            for draft in self._drafts:
                begun.append(draft)
                target = draft.target
                draft.take_place(self.overwrite, keep)
            for target in self._going:
                if os.path.lexists(target):
                    aside[target] = temporary(target)
                    windows.set_aside(target, aside[target])
        except BaseException as error:
            for path, backup in aside.items():
                if os.path.lexists(backup):
                    windows.replace(backup, path)
            for draft in reversed(begun):
                draft.give_back()
            if isinstance(error, OSError):
                raise explained(error, target) from error
            raise
        old = [*aside.values(), *(d.backup for d in self._drafts if d.backup is not None)]
        for backup in old:
            try:
                remove(backup)
            except OSError as error:  # the new files are all there
                logging.getLogger(__name__).warning("%s, the replaced file, could not be deleted (%s).", backup, error)
        for draft in self._drafts:
            draft.discard()
        for folder in {d.target.parent for d in self._drafts}:
            sync_folder(folder)


@contextmanager
def atomic_file(target: Path, overwrite: bool = False, batch: Batch | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes ``target`` when the block ends without an exception, or with its ``batch``.

    The target's folder is made if missing. File and folder are synced to the disk. With ``overwrite`` the old file
    stays until the new one takes its place; a symbolic link is replaced, not the file it points to.

    Raises:
        ErasureError: the target exists, is a folder, its folder cannot be written to, or the disk is full.
    """
    if batch is not None:
        with batch.file(target) as file:
            yield file
        return
    with Batch(overwrite) as own, own.file(target) as file:
        yield file


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path for a writer that opens files itself; it becomes ``target`` when the block ends without an exception.

    Raises:
        ErasureError: as ``atomic_file``.
    """
    target = Path(target)
    check_target(target)
    partial = temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        windows.sync(partial)
        if os.path.lexists(target):
            raise exists(target)
        windows.replace(partial, target)
        sync_folder(target.parent)
    except OSError as error:
        raise explained(error, target) from error
    finally:
        with suppress(OSError):  # on Windows the writer may still have it open, after an exception that is on its way
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    target: Path, overwrite: bool = False, marker: str = "model_index.json", batch: Batch | None = None
) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``target`` when the block ends without an exception, or with its ``batch``.

    A killed process leaves at most a hidden ``.NAME.PID-xxxxxx.partial`` folder beside the target.

    Args:
        target: the folder to appear; its parent is made if missing.
        overwrite: replace a folder that is there, if it is empty or holds ``marker``: no other folder is deleted.
        marker: the file that tells a folder of our kind.

    Raises:
        ErasureError: the target exists, or is no folder of our kind, cannot be written to, or the disk is full.
    """
    if batch is not None:
        with batch.folder(target, marker) as folder:
            yield folder
        return
    with Batch(overwrite) as own, own.folder(target, marker) as folder:
        yield folder
