"""Run by the host. By ComfyUI-Manager, after it has installed requirements.txt: checks and advises, changes nothing. By
AUTOMATIC1111's WebUI and Forge at every start: says where the studio is and changes nothing either, so that they start at
once. With --studio, as their tab runs it: makes the studio an environment of its own inside this folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from realera_nodes.studio.environment import Environment, InstallError, own_variables  # noqa: E402

NEEDED = {"numpy": "numpy", "safetensors": "safetensors", "PIL": "pillow", "platformdirs": "platformdirs", "torch": "torch"}


def missing() -> list[str]:
    """PyPI names of the packages that the pack needs and this Python lacks."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def webui() -> Path | None:
    """The WebUI's folder if one runs this: it names itself in PYTHONPATH and starts its installers there."""
    places = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd()]
    for place in filter(None, places):
        if (Path(place) / "modules" / "script_callbacks.py").is_file() and (Path(place) / "webui.py").is_file():
            return Path(place)
    return None


def run_pip(command: list[str], with_parent: bool = False) -> None:
    """Shows what pip says as it says it; ``with_parent``: ends it when standard input does. InstallError: it failed."""
    environment = own_variables() | {"PYTHONUNBUFFERED": "1"}
    stdin = subprocess.DEVNULL if with_parent else None
    with subprocess.Popen(
        command,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as pip:
        if with_parent:
            threading.Thread(target=lambda: (sys.stdin.read(), pip.kill()), daemon=True).start()
        assert pip.stdout
        last = ""
        for line in pip.stdout:
            print(line, end="", flush=True)
            if line.startswith("ERROR:"):
                last = line.removeprefix("ERROR:").strip()
    if pip.returncode:
        raise InstallError(last or f"pip ended with code {pip.returncode}")


def install_studio(with_parent: bool = False) -> int:
    """Makes the studio's environment, showing what happens. The last line says how it ended."""
    try:
        made = Environment.of_host(HERE)
        if not made.finished:
            print("RealEra studio: making an environment of its own.", flush=True)
        made.make(lambda command: run_pip(command, with_parent))
    except (InstallError, OSError) as error:
        print(f"RealEra studio could not be installed: {error}")
        return 1
    print("RealEra studio: its packages are installed.")
    return 0


def for_webui() -> int:
    """At the WebUI's start: a line until the studio is installed, then silence."""
    try:
        if not Environment.of_host(HERE).finished:
            print("RealEra studio: not installed yet. Its tab does that when you first open the studio there.")
    except InstallError as error:
        print(f"RealEra studio: {error}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if sys.version_info < (3, 10):  # noqa: UP036 - this script runs before anything checks requires-python
        print("RealEra nodes need Python 3.10 or newer.")
        return 1
    if "--studio" in given:
        return install_studio("--with-parent" in given)
    if webui() is not None:
        return for_webui()
    lacking = missing()
    if lacking:
        print(f"RealEra nodes lack {', '.join(lacking)}: install requirements.txt into ComfyUI's own Python.")
        return 1
    print("RealEra nodes: everything needed is installed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
