"""A studio on a free port, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0


@dataclass
class Server:
    url: str
    out: Path
    log: Path
    process: subprocess.Popen

    def end(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status == 200
    except OSError:
        return False


@contextmanager
def served(out: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """``python -m realera_nodes studio`` over an output folder, ended with the block."""
    port, log = free_port(), out.parent / f"{out.name}.log"
    command = [sys.executable, "-m", "realera_nodes", "studio", "--no-browser", "--port", str(port), "--out", str(out), *options]

    def listen() -> None:  # a shell's background jobs, and what they start, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=out.parent, stdout=file, stderr=subprocess.STDOUT, preexec_fn=listen,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {}),
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    try:
        end = time.monotonic() + PATIENCE
        while not answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "the studio did not answer"
            time.sleep(0.1)
        yield Server(url, out, log, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
