"""The studio as a process of its own beside a WebUI, which has another Gradio. Standard library only: the WebUI imports this.

AUTOMATIC1111 is bound to Gradio 3.41 and Forge to 4.40; the panel needs a current one. So it runs in an environment of its own
(``environment``), on this machine alone, and the WebUI passes its page on (``doorway``).
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from .environment import own_variables


class SidecarError(Exception):
    """The studio does not start; one sentence that says what to do."""


class Sidecar:
    """Args:
    extension: the extension's folder
    out: the studio's output folder
    models: model folders; exports: name -> folder that finished files may be copied to
    python: the studio's Python
    options: more of its command line
    root: the path at which the WebUI passes it on
    """

    def __init__(
        self, extension: Path, out: Path, models: Sequence[Path], exports: Mapping[str, Path], python: Path,
        options: Sequence[str] = (), root: str = "",
    ):  # fmt: skip
        out = out.absolute()  # the studio runs in another folder
        self.extension, self.out, self.python = extension.absolute(), out, python
        self.options, self.root = list(options), root
        self.place(models, exports)
        self.login = ""  # NAME:PASSWORD that the page asks for
        self.host_model = out / "host-model.txt"
        self.log = out / "studio.log"
        self.process: subprocess.Popen | None = None
        self.url = ""
        self._starting = threading.Lock()

    def place(self, models: Sequence[Path], exports: Mapping[str, Path]) -> None:
        """Where models are, and where finished files may go; of the next start."""
        self.models = [m.absolute() for m in models]
        self.exports = {name: folder.absolute() for name, folder in exports.items()}

    @property
    def runs(self) -> bool:
        """Whether the process is there, answering or not."""
        return self.process is not None and self.process.poll() is None

    def tell(self, checkpoint: str | None) -> None:
        """The checkpoint that the WebUI has loaded: the studio offers it first."""
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.host_model.with_suffix(".partial")
        partial.write_text(checkpoint or "", encoding="utf-8")
        os.replace(partial, self.host_model)

    def open(self, seconds: float = 300) -> str:
        """The page's own address; the process is started if it does not run, and waited for.

        Raises:
            SidecarError: the studio ended, with its last words; or did not answer.
        """
        with self._starting:
            if not self.runs:
                self._start()
        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SidecarError(f"The studio ended while it started: {self.last_words()} ({self.log} has all of it.)")
            if self._answers():
                return self.url
            time.sleep(0.25)
        raise SidecarError(f"The studio did not answer within {seconds:.0f} seconds: try again, or look at {self.log}.")

    def close(self, seconds: float = 20) -> None:
        """Ends the process; what it was at can be continued."""
        if self.process is None:
            return
        if self.process.stdin:
            self.process.stdin.close()  # which is what it waits for
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def command(self, port: int) -> list[str]:
        """What is started."""
        words = [str(self.python), "-m", "realera_nodes", "studio", "--no-browser", "--with-parent", "--port", str(port),
                 "--out", str(self.out), "--host-model", str(self.host_model)]  # fmt: skip
        for folder in (m for m in self.models if m.is_dir()):
            words += ["--models", str(folder)]
        for name, folder in self.exports.items():
            words += ["--export", f"{name}={folder}"]
        return [*words, *(["--root-path", self.root] if self.root else []), *self.options]

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log_lines()
        return lines[-1] if lines else "it said nothing."

    def log_lines(self) -> list[str]:
        """What it said, without empty lines."""
        if not self.log.is_file():
            return []
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    def _start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for folder in self.exports.values():
            folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = own_variables() | {"PYTHONPATH": str(self.extension)}
        if self.login:
            environment["REALERA_STUDIO_LOGIN"] = self.login  # a command line is there for others to see
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command(port), cwd=self.extension, env=environment, stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.url = f"http://127.0.0.1:{port}/"

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False
