"""Run by the host. By ComfyUI-Manager, after it has installed requirements.txt: checks and advises, changes nothing. By
AUTOMATIC1111's WebUI and Forge at every start: makes the studio an environment of its own inside this folder, once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = {"numpy": "numpy", "safetensors": "safetensors", "PIL": "pillow", "platformdirs": "platformdirs", "torch": "torch"}
#: of the studio, as pyproject.toml has them under requirements, headless and studio; PyTorch is the WebUI's
STUDIO = ["numpy>=1.25", "safetensors>=0.4.2", "pillow>=10", "platformdirs>=4", "diffusers>=0.31", "transformers>=4.41",
    "accelerate>=0.30",
          "peft>=0.12", "typer>=0.12", "rich>=13", "matplotlib>=3.8", "tomli>=2; python_version < '3.11'",
          "gradio>=6", "plotly>=6"]  # fmt: skip
#: the newest that still run on PyTorch before 2.4, which WebUIs have
FOR_OLD_TORCH = ["transformers<4.50", "diffusers<0.33", "peft<0.15", "accelerate<1.4", "numpy<2"]
#: these ask for PyTorch, which pip would load anew; what else they ask for is installed with the others
ASK_FOR_TORCH, THEIR_OTHERS = ("accelerate", "peft"), ["psutil", "pyyaml"]


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


def studio_requirements(torch: str) -> list[str]:
    """What pip is asked for beside a PyTorch of this version."""
    found = re.match(r"(\d+)\.(\d+)", torch)
    old = found is not None and (int(found[1]), int(found[2])) < (2, 4)
    return [*STUDIO, *(FOR_OLD_TORCH if old else [])]


def make_environment(folder: Path, requirements: list[str], behind: list[str]) -> Path:
    """A virtual environment with the requirements, which finds what it lacks ``behind`` itself; returns its Python.

    Raises:
        subprocess.CalledProcessError: pip could not install them; the next start tries again.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, wanted = folder / "requirements.txt", "\n".join([*requirements, *behind])
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    pip = [str(python), "-m", "pip", "install", "--prefer-binary", "--disable-pip-version-check"]
    late = [r for r in requirements if r.startswith(ASK_FOR_TORCH)]
    # without a look at the WebUI's packages, whose old pins pip would try to keep
    subprocess.run([*pip, *(r for r in requirements if r not in late), *THEIR_OTHERS], check=True, env=environment)
    if late:
        subprocess.run([*pip, "--no-deps", *late], check=True, env=environment)
    paths = sysconfig.get_paths(
        vars={"base": str(folder), "platbase": str(folder)}, scheme="nt" if os.name == "nt" else "posix_prefix"
    )
    # a .pth file's folders come after the environment's own
    (Path(paths["purelib"]) / "webui.pth").write_text("\n".join(behind), encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def install_studio() -> int:
    """For a WebUI: the environment that scripts/realera_tab.py starts the studio in."""
    if "--skip-install" in os.environ.get("COMMANDLINE_ARGS", "").split():
        return 0
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        print("RealEra studio: PyTorch is not installed yet; start the WebUI again when it is.")
        return 1
    behind = [p for p in dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib")) if Path(p).is_dir()]
    print("RealEra studio: preparing its environment (a few minutes, once).", flush=True)
    try:
        make_environment(HERE / ".studio", studio_requirements(torch), behind)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"RealEra studio could not be installed ({error}): check the connection and the disk, then restart the WebUI.")
        return 1
    print("RealEra studio: ready.")
    return 0


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script runs before anything checks requires-python
        print("RealEra nodes need Python 3.10 or newer.")
        return 1
    if webui() is not None:
        return install_studio()
    lacking = missing()
    if lacking:
        print(f"RealEra nodes lack {', '.join(lacking)}: install requirements.txt into ComfyUI's own Python.")
        return 1
    print("RealEra nodes: everything needed is installed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
