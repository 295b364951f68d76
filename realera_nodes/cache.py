"""The user's cache folder: text states, finished concepts, stopped trainings, the embedded model.

Everything in it can be made again, so nothing in it stops a run: what is damaged is made anew, and where nothing can be
written there, a temporary folder takes its place until the process ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from platformdirs import user_cache_path

from .core.errors import ErasureError

T = TypeVar("T")
log = logging.getLogger(__name__)
#: cache folder -> what takes its place
_SUBSTITUTES: dict[Path, tempfile.TemporaryDirectory[str]] = {}
#: what was said already
_SAID: set[str] = set()


def cached(*parts: str) -> Path:
    """The path of a cached file or folder, there or not. Where it is not and the cache cannot be written, a temporary one's."""
    root = user_cache_path("realera-nodes", appauthor=False)
    path = root.joinpath(*parts)
    if os.path.lexists(path) or _writable(path.parent):
        return path
    if root not in _SUBSTITUTES:
        _SUBSTITUTES[root] = tempfile.TemporaryDirectory(prefix="realera-cache-")
    say(f"the cache folder {root} cannot be written: what would be kept there is made anew each time.")
    return Path(_SUBSTITUTES[root].name).joinpath(*parts)


def say(line: str) -> None:
    """A line for whoever watches, once."""
    if line not in _SAID:
        _SAID.add(line)
        log.warning("%s", line)


def _writable(folder: Path) -> bool:
    """Tried, not asked: what may be written is a matter of permissions, mounts and quotas."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def read_or(path: Path, read: Callable[[Path], T], what: str) -> T | None:
    """A cached file's content, or None where there is none or it is damaged, which a line tells. It then is made anew."""
    if not os.path.lexists(path):
        return None
    try:
        return read(path)
    except (ErasureError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        say(f"{what} in {path} cannot be used ({error}): made anew.")
        return None


def forget(path: Path) -> None:
    """A cached file or folder is not needed any more; where it cannot be deleted, it stays."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path} is not needed any more and cannot be deleted ({error.strerror}).")


def keep(path: Path, write: Callable[[Path], None], what: str) -> bool:
    """Writes a cached file if it can be; a line tells where it cannot, and the run goes on. Returns whether it was written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except (ErasureError, OSError) as error:
        say(f"{what} cannot be kept ({error}): the run goes on without.")
        return False
    return True
