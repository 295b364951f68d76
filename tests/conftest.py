"""Fixtures: the embedded model expanded once a run, and a real ComfyUI server for tests marked ``comfyui``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import pytest

import realera_nodes
from realera_nodes.demo import expand

PACK = Path(realera_nodes.__file__).parents[1]


@pytest.fixture(scope="session")
def pipe():
    """The embedded model as a diffusers pipeline on the CPU."""
    from realera_nodes.demo.gallery import load_pipeline

    return load_pipeline("cpu")


@pytest.fixture(scope="session")
def classifier():
    from realera_nodes.demo.gallery import load_classifier

    return load_classifier()


@dataclass
class ComfyServer:
    url: str
    base: Path
    log: Path


def find_comfyui() -> tuple[Path, Path] | None:
    """(ComfyUI folder, its Python) from COMFYUI_PATH and COMFYUI_PYTHON, else ~/ComfyUI and its .venv."""
    root = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
    python = Path(os.environ.get("COMFYUI_PYTHON", root / ".venv" / "bin" / "python"))
    return (root, python) if (root / "main.py").exists() and python.exists() else None


def require_comfyui() -> tuple[Path, Path]:
    """``find_comfyui``, or a loud skip."""
    found = find_comfyui()
    if found is None:
        pytest.skip("NO COMFYUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or keep one at ~/ComfyUI, to run the server tests")
    return found


def host_packages(base: Path) -> dict[str, str]:
    """The environment of a ComfyUI with what its manager would install from requirements.txt and it does not need itself."""
    shutil.copytree(Path(platformdirs.__file__).parent, base / "packages" / "platformdirs")
    return {"PYTHONPATH": str(base / "packages")}


def with_pack(base: Path) -> dict[str, str]:
    """Links the pack into a server's base directory; the environment that it needs."""
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / "realera-nodes").symlink_to(PACK)
    return host_packages(base)


@contextmanager
def served(base: Path, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> Iterator[ComfyServer]:
    """A ComfyUI server on a free port with its own base directory, the embedded checkpoint in it, stopped at the end.

    ``options``: more of its command line's.
    """
    root, python = require_comfyui()
    for folder in ("models/checkpoints", "custom_nodes", "input", "output", "user"):  # expected under another base directory
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "models" / "checkpoints" / expand.CHECKPOINT).symlink_to(expand.checkpoint_path())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = base / "server.log"
    command = [str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base),
               "--database-url", f"sqlite:///{base / 'comfyui.db'}", *options]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=root, stdout=out, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {})
        )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield ComfyServer(f"http://127.0.0.1:{port}", base, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def bare_comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A plain server, without the node pack."""
    require_comfyui()
    with served(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="session")
def comfy() -> ComfyServer:
    """The server with the node pack that all tests of nodes share."""
    from tests import comfyui_graphs

    require_comfyui()
    return comfyui_graphs.server()


@pytest.fixture(scope="session")
def base_hash(comfy) -> str:
    """The hash of the loaded weights before any of the pack's nodes has run."""
    from tests import comfyui_graphs

    return comfyui_graphs.base_hash()


@pytest.fixture(scope="session")
def info(base_hash) -> dict[str, Any]:
    """/object_info of that server."""
    from tests import comfyui_graphs

    return comfyui_graphs.info()


@pytest.fixture(scope="session")
def erased(info) -> dict[str, Any]:
    """What the chain of nodes gave, run once."""
    from tests import comfyui_graphs

    return comfyui_graphs.erased()


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache of a module's own: text states, and finished concepts under the hash of what decides them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))


def wait_until_ready(url: str, process: subprocess.Popen, log: Path, seconds: float = 180) -> None:
    import httpx

    end = time.time() + seconds
    while time.time() < end:
        if process.poll() is not None:
            pytest.fail(f"ComfyUI stopped while starting:\n{log.read_text()[-4000:]}")
        try:
            if httpx.get(f"{url}/system_stats", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"ComfyUI was not ready after {seconds:.0f} s:\n{log.read_text()[-4000:]}")
