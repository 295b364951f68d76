"""From nothing to an open studio inside a WebUI: install once, start, wait; what is going on can be asked at any time.

Standard library only: the WebUI imports this. One opening lives as long as the WebUI's process does, so that reloading its
page's scripts ("Reload UI") neither ends a run nor an installation.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .environment import Environment, InstallError
from .sidecar import Sidecar, SidecarError

#: phases: nothing was asked for, two kinds of work, the page is there, it went wrong, it was there and is no more
IDLE, INSTALLING, STARTING, READY, FAILED, ENDED = "idle", "installing", "starting", "ready", "failed", "ended"
#: lines of a log that a page shows
SHOWN = 40
#: seconds that a studio without a tab waits for the next one
PATIENCE = 600.0
_PIP = (
    (re.compile(r"\s*Downloading ([A-Za-z0-9_.]+?)-\d\S* \(([^)]+)\)"), "downloading {}, {}"),
    (re.compile(r"\s*Using cached ([A-Za-z0-9_.]+?)-\d"), "{}, downloaded before"),
    (re.compile(r"\s*Building wheel for ([A-Za-z0-9_.-]+)"), "building {}"),
    (re.compile(r"Collecting ([A-Za-z0-9_.-]+)"), "looking for {}"),
)


def told_by_pip(lines: list[str]) -> str:
    """What pip is at, such as "package 12, downloading gradio, 32.3 MB"; empty where it has said nothing yet."""
    names = {m[1].lower().replace("_", "-") for line in lines if (m := re.match(r"Collecting ([A-Za-z0-9_.-]+)", line))}
    for line in reversed(lines):
        if line.startswith("Installing collected packages:"):
            return f"unpacking {line.count(',') + 1} packages"
        if line.startswith("Successfully installed"):
            return "almost done"
        for pattern, words in _PIP:
            if found := pattern.match(line):
                return f"package {max(1, len(names))}, {words.format(*found.groups())}"
    return ""


class Opening:
    """Args:
    sidecar: the studio's process
    environment: its Python, which is made when the studio is first opened; None where it is there anyway
    allowed: whether packages may be installed (a WebUI's --skip-install forbids it)
    prepare: called before the studio is started
    """

    def __init__(
        self, sidecar: Sidecar, environment: Environment | None = None, allowed: bool = True,
        prepare: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.sidecar, self.environment, self.allowed, self.prepare = sidecar, environment, allowed, prepare
        self.installer = [sys.executable, str(sidecar.extension / "install.py"), "--studio", "--with-parent"]
        self.install_log = sidecar.out / "install.log"
        self._lock = threading.Lock()
        self._phase, self._error, self._failed_at = IDLE, "", ""
        self._since = time.monotonic()
        self._installing: subprocess.Popen | None = None
        self._leaving: threading.Timer | None = None

    @property
    def installed(self) -> bool:
        return self.environment is None or self.environment.finished

    @property
    def ready(self) -> bool:
        """Whether the page is there."""
        return self._phase == READY and self.sidecar.runs

    def begin(self, anew: bool = False) -> None:
        """Starts what is to be done in the background, unless that is going on. ``anew``: the packages are installed again."""
        with self._lock:
            if self._phase in (INSTALLING, STARTING) or self.ready:
                return
            if anew and self.environment is not None and self.allowed:
                self.environment.forget()
            self._enter(STARTING if self.installed else INSTALLING)
        threading.Thread(target=self._work, name="realera-opening", daemon=True).start()

    def state(self) -> dict[str, Any]:
        """phase, seconds in it, what is at work, installed, allowed, error, failed (the phase it happened in), log lines."""
        with self._lock:
            if self._phase == READY and not self.sidecar.runs:
                self._enter(ENDED, f"The studio ended: {self.sidecar.last_words()}", READY)
            phase, error, at = self._phase, self._error, self._failed_at
            told = {"phase": phase, "seconds": round(time.monotonic() - self._since), "error": error, "failed": at}
        lines = self._install_lines() if INSTALLING in (phase, at) else self.sidecar.log_lines()
        doing = (told_by_pip(lines) or "making an environment") if phase == INSTALLING else ""
        shown = lines[-SHOWN:] if phase in (INSTALLING, STARTING, FAILED, ENDED) else []
        return told | {"doing": doing, "log": shown, "installed": self.installed, "allowed": self.allowed}

    def claim(self) -> None:
        """A tab is there."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def release(self, seconds: float = PATIENCE) -> None:
        """The tab is gone: with "Reload UI" the next one comes in a moment, and otherwise the studio ends after a while."""
        self.claim()
        self._leaving = threading.Timer(seconds, self.close)
        self._leaving.daemon = True
        self._leaving.start()

    def close(self) -> None:
        """Ends whatever runs. A run of the studio can be continued, an installation begins again."""
        self.claim()
        installing = self._installing
        if installing is not None and installing.stdin:
            installing.stdin.close()  # which is what it waits for
        self.sidecar.close()

    def _enter(self, phase: str, error: str = "", failed: str = "") -> None:
        self._phase, self._error, self._failed_at, self._since = phase, error, failed, time.monotonic()

    def _work(self) -> None:
        at = self._phase
        try:
            if at == INSTALLING:
                self._install()
                at = STARTING
                with self._lock:
                    self._enter(STARTING)
            self.prepare()
            self.sidecar.open()
            with self._lock:
                self._enter(READY)
        except (InstallError, SidecarError, OSError) as error:
            with self._lock:
                self._enter(FAILED, str(error), at)
        except Exception as error:  # a host's own functions are called as well: nobody may wait for what has died
            traceback.print_exc()
            with self._lock:
                self._enter(
                    FAILED, f"The studio was not opened ({type(error).__name__}: {error}): the WebUI's console has more.", at
                )

    def _install(self) -> None:
        if not self.allowed:
            raise InstallError(
                "This WebUI was started with --skip-install, so nothing was installed: leave that option out, or run "
                f"{sys.executable} {self.sidecar.extension / 'install.py'} --studio yourself."
            )
        self.sidecar.out.mkdir(parents=True, exist_ok=True)
        with self.install_log.open("w", encoding="utf-8") as log:
            self._installing = subprocess.Popen(
                self.installer, cwd=self.sidecar.extension, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
            code = self._installing.wait()
            self._installing = None
        if code or not self.installed:
            lines = self._install_lines()
            last = (
                lines[-1].partition(": ")[2] if lines and "could not be installed:" in lines[-1] else f"it ended with code {code}"
            )
            raise InstallError(
                f"The studio's packages could not be installed ({last.rstrip('.')}): check the connection and the disk, "
                "then try again."
            )

    def _install_lines(self) -> list[str]:
        if not self.install_log.is_file():
            return []
        text = self.install_log.read_text(encoding="utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()]


_openings: dict[Path, Opening] = {}


def opening_of(
    extension: Path, sidecar: Sidecar, environment: Environment | None, allowed: bool, prepare: Callable[[], None]
) -> Opening:  # fmt: skip
    """The WebUI process's one opening for an extension: the one that is there, told what is so now; or a new one."""
    found = _openings.setdefault(extension, Opening(sidecar, environment, allowed))
    if found.sidecar is not sidecar:
        found.sidecar.place(sidecar.models, sidecar.exports)
    found.prepare = prepare
    found.claim()
    return found
