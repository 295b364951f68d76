"""Windows' rules for files on Linux: a fixture under which code that would fail there fails here."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import pathlib
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from realera_nodes.formats import windows as places

#: what the standard library lacks there
LACKING = {
    os: ("O_TMPFILE", "copy_file_range", "fork", "killpg", "sched_getaffinity", "mkfifo", "fchmod"),
    signal: ("SIGKILL", "SIGALRM", "SIGHUP"),
}
REFUSED = PermissionError(errno.EACCES, "the process cannot access the file because it is being used by another process")


def opened(path: os.PathLike | str) -> bool:
    """Whether this process has the file, or one in the folder, open or mapped."""
    here = os.path.realpath(path)
    handles = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            handles.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    with io.open_code("/proc/self/maps") as maps:
        handles += [line.split(None, 5)[5].decode().rstrip("\n") for line in maps if line.count(b"/")]
    return any(p == here or p.startswith(here + os.sep) for p in handles)


def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the rules."""
    for module, names in LACKING.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "unlink", "remove", "mkdir", "link")}
    get_flags, plain_open = fcntl.fcntl, builtins.open

    def named(path: Any) -> None:
        for part in Path(os.fspath(path)).parts[1:] if isinstance(path, (str, os.PathLike)) else ():
            if places.windows_refuses(part):
                raise OSError(errno.EINVAL, "the filename, directory name, or volume label syntax is incorrect", str(path))

    def os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        named(path)
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "permission denied: a folder", str(path))
        return real["open"](path, flags, *args, **more)

    def fsync(fd: int) -> None:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode) or get_flags(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "bad file descriptor")
        real["fsync"](fd)

    def moved(over: bool):
        def move(source: Any, target: Any, **more: Any) -> None:
            named(target)
            if opened(source) or (os.path.exists(target) and (opened(target) or os.path.isdir(target))):
                raise REFUSED
            if not over and os.path.exists(target):
                raise FileExistsError(errno.EEXIST, "cannot create a file when that file already exists", str(target))
            real["replace"](source, target)

        return move

    def gone(path: Any, **more: Any) -> None:
        if "dir_fd" not in more and os.path.exists(path) and opened(path):
            raise REFUSED
        real["unlink"](path, **more)

    def mkdir(path: Any, *args: Any, **more: Any) -> None:
        named(path)
        real["mkdir"](path, *args, **more)

    def link(source: Any, target: Any, **more: Any) -> None:
        raise NotImplementedError("dst_dir_fd unavailable on this platform")

    def text_open(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
                  newline: str | None = None, *args: Any, **more: Any) -> Any:  # fmt: skip
        named(file)
        if "b" not in mode:
            encoding = encoding or "cp1252"
            newline = "\r\n" if newline is None and set(mode) & set("wax+") else newline
        return plain_open(file, mode, buffering, encoding, errors, newline, *args, **more)

    changed = {"open": os_open, "fsync": fsync, "replace": moved(True), "rename": moved(False), "unlink": gone, "remove": gone,
               "mkdir": mkdir, "link": link}  # fmt: skip
    for name, function in changed.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(builtins, "open", text_open)
    monkeypatch.setattr(io, "open", text_open)
    for name in ("open", "replace", "rename", "unlink", "mkdir"):  # before 3.14 pathlib keeps its own references to some
        if hasattr(pathlib, "_NormalAccessor"):
            monkeypatch.setattr(pathlib._NormalAccessor, name, staticmethod(changed.get(name, text_open)), raising=False)
    monkeypatch.setattr(places, "WINDOWS", True)
    monkeypatch.setattr(places, "PATIENCE", 0.2)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # after tmp_path, whose making is pytest's own
    """Windows' rules for the time of a test."""
    if sys.platform != "linux":
        pytest.skip("the rules are played on Linux")
    rules(monkeypatch)
