"""What Windows refuses and others do not: some names, and replacing files that somebody has open. Standard library only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..core.errors import ErasureError

WINDOWS = os.name == "nt"
#: devices, whatever stands behind a dot after them
DEVICES = frozenset({"con", "prn", "aux", "nul", "conin$", "conout$"}
                    | {f"{port}{n}" for port in ("com", "lpt") for n in "123456789\u00b9\u00b2\u00b3"})  # fmt: skip
#: seconds for which a file in use is waited for: virus scanners and indexers look at new files for a moment
PATIENCE = 2.0
Value = TypeVar("Value")


def windows_refuses(name: str) -> str:
    """What is wrong with a file's or folder's name on Windows; "" if nothing."""
    if any(ord(c) < 32 or c in '<>:"|?*\\/' for c in name):
        return 'holds one of < > : " | ? * \\ / or a control character'
    if name.endswith((".", " ")):
        return "ends with a dot or a space"
    if name.split(".")[0].rstrip(" ").casefold() in DEVICES:
        return "is the name of a device"
    return ""


def check_names(target: Path) -> None:
    """Raises ErasureError on Windows where a part of the path is no name there: it would be another file, or none."""
    if not WINDOWS:
        return
    for part in target.parts[1:] if target.anchor else target.parts:
        problem = windows_refuses(part) if part not in (".", "..") else ""
        if problem:
            raise ErasureError(f'{target} cannot be written, as "{part}" {problem}: choose another name.')


def patiently(attempt: Callable[[], Value]) -> Value:
    """``attempt()``; on Windows tried again for a while where somebody has the file open. Raises PermissionError: for longer."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return attempt()
        except PermissionError:
            if not WINDOWS or time.monotonic() > end:
                raise
        time.sleep(0.05)


def replace(partial: Path, target: Path) -> None:
    """Moves a complete file over another, or a folder to where nothing is.

    Raises:
        ErasureError: on Windows, somebody has the target or a file in it open.
        OSError: anything else.
    """
    try:
        patiently(lambda: os.replace(partial, target))
    except PermissionError as error:
        if not WINDOWS:
            raise
        raise ErasureError(
            f"{target} cannot be written while a program has it open: close what has loaded it, or choose another name."
        ) from error


def set_aside(path: Path, hidden: Path) -> None:
    """Moves what is at ``path`` to a hidden name. Raises as ``replace``, by the name that people know."""
    try:
        replace(path, hidden)
    except ErasureError as error:
        raise ErasureError(str(error).replace(str(hidden), str(path))) from error


def sync(path: Path) -> None:
    """Waits until a file is on the disk: by a handle that may write, as Windows flushes no other."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
