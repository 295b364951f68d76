"""The studio as a process of its own beside a WebUI, which has another Gradio. Standard library only: the WebUI imports this.

AUTOMATIC1111 is bound to Gradio 3.41 and Forge to 4.40; the panel needs a current one. So ``install.py`` makes an environment
with it inside the extension's folder, which finds the WebUI's PyTorch behind its own packages, and the tab shows the page
that is served from there.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

#: the environment's folder inside the extension
ENVIRONMENT = ".studio"


class SidecarError(Exception):
    """The studio does not start; one sentence that says what to do."""


def python_of(extension: Path) -> Path:
    """The Python of the studio's environment, there or not."""
    folder = extension / ENVIRONMENT
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


class Sidecar:
    """Args:
    extension: the extension's folder
    out: the studio's output folder
    models: model folders; exports: name -> folder that finished files may be copied to
    python: the studio's Python; None is the environment's that ``install.py`` made
    """

    def __init__(
        self, extension: Path, out: Path, models: Sequence[Path], exports: Mapping[str, Path], python: Path | None = None,
        options: Sequence[str] = (),
    ):  # fmt: skip
        self.extension, self.out, self.models, self.exports = extension, out, list(models), dict(exports)
        self.python, self.options = python or python_of(extension), list(options)
        self.host_model = out / "host-model.txt"
        self.log = out / "studio.log"
        self.process: subprocess.Popen | None = None
        self.url = ""

    def tell(self, checkpoint: str | None) -> None:
        """The checkpoint that the WebUI has loaded: the studio offers it first."""
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.host_model.with_suffix(".partial")
        partial.write_text(checkpoint or "", encoding="utf-8")
        os.replace(partial, self.host_model)

    def open(self, seconds: float = 180) -> str:
        """The page's address; the process is started if it does not run, and waited for.

        Raises:
            SidecarError: there is no environment, or the studio ended; with its last words.
        """
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SidecarError(f"The studio ended while it started: {self._last_words()} ({self.log} has all of it.)")
            if self._answers():
                return self.url
            time.sleep(0.25)
        raise SidecarError(
            f"The studio did not answer within {seconds:.0f} seconds: press the button again, or look at {self.log}."
        )

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
        for folder in self.models:
            words += ["--models", str(folder)]
        for name, folder in self.exports.items():
            words += ["--export", f"{name}={folder}"]
        return [*words, *self.options]

    def _start(self) -> None:
        if not self.python.exists():
            raise SidecarError(f"The studio's environment is missing: run {sys.executable} {self.extension / 'install.py'} in "
                               "the WebUI's folder, and restart the WebUI.")  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        self.models = [m for m in self.models if m.is_dir()]
        for folder in self.exports.values():
            folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        # the WebUI's own Python settings would lead to its packages
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "GRADIO_ROOT_PATH")}
        environment["PYTHONPATH"] = str(self.extension)
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command(port),
                cwd=self.extension,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = f"http://127.0.0.1:{port}/"

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing."
