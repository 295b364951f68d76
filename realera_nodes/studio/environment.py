"""The studio's own Python environment inside a WebUI's extension folder. Standard library only: the WebUI imports this.

It finds the WebUI's PyTorch behind its own packages; nothing of the WebUI's environment changes. It is there when its stamp
says so, which is written last: a folder that an installation left behind in the middle counts for nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: the environment's folder inside the extension
FOLDER = ".studio"
#: of the studio, as pyproject.toml has them under requirements, headless and studio; PyTorch is the WebUI's
STUDIO = ("numpy>=1.25", "safetensors>=0.4.2", "pillow>=10", "platformdirs>=4", "diffusers>=0.31", "transformers>=4.41",
          "accelerate>=0.30", "peft>=0.12", "typer>=0.12", "rich>=13", "matplotlib>=3.8", "tomli>=2; python_version < '3.11'",
          "gradio>=6", "plotly>=6")  # fmt: skip
#: the newest that still run on PyTorch before 2.4, which WebUIs have, and what fits them: transformers before 4.50 needs
#: huggingface-hub before 1, which gradio 6.17 was the last to take. Without that pip loads every newer gradio, 31 MB each, to
#: find that out; a requirement instead of a constraint would come too late, after the newest was loaded
FOR_OLD_TORCH = ("transformers<4.50", "diffusers<0.33", "peft<0.15", "accelerate<1.4", "numpy<2", "huggingface-hub<1",
                 "gradio<6.18", "pandas<3.1")  # fmt: skip
#: these ask for PyTorch, which pip would load anew; what else they ask for is installed with the others
ASK_FOR_TORCH, THEIR_OTHERS = ("accelerate", "peft"), ("psutil", "pyyaml")


class InstallError(Exception):
    """The environment could not be made; one sentence."""


def caps_for(torch: str) -> tuple[str, ...]:
    """pip's constraints beside a PyTorch of this version."""
    found = re.match(r"(\d+)\.(\d+)", torch)
    return FOR_OLD_TORCH if found is not None and (int(found[1]), int(found[2])) < (2, 4) else ()


@dataclass(frozen=True)
class Environment:
    """Attributes:
    folder: where it is, or will be
    requirements, caps: what pip is asked for, and its constraints
    behind: folders whose packages it finds after its own
    """

    folder: Path
    requirements: tuple[str, ...]
    caps: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()

    @classmethod
    def of_host(cls, extension: Path) -> Environment:
        """Behind the packages of the Python that runs this. InstallError: there is no PyTorch among them."""
        if sys.version_info < (3, 10):  # noqa: UP036 - a host's Python, which nothing has checked
            raise InstallError(f"the studio needs Python 3.10 or newer, and this WebUI runs on {sys.version.split()[0]}.")
        try:
            torch = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            raise InstallError("PyTorch is not installed yet: start the WebUI again when it is.") from None
        places = dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))
        return cls(extension / FOLDER, STUDIO, caps_for(torch), tuple(p for p in places if Path(p).is_dir()))

    @property
    def python(self) -> Path:
        """Its interpreter, there or not."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def finished(self) -> bool:
        """Whether all of it is there, for these very requirements."""
        return self.python.exists() and self._stamp.is_file() and self._stamp.read_text(encoding="utf-8") == self._wanted

    def forget(self) -> None:
        """It is to be made anew."""
        self._stamp.unlink(missing_ok=True)

    def make(self, run: Callable[[list[str]], None]) -> None:
        """Makes it, unless it is finished. ``run`` runs a command of pip and raises where that fails.

        Raises:
            InstallError: Python cannot make environments, or the folder cannot be written; and what ``run`` raises.
        """
        if self.finished:
            return
        try:
            self.forget()
            venv.create(self.folder, clear=True, with_pip=True)
        except subprocess.CalledProcessError as error:
            raise InstallError(
                f"{sys.executable} cannot make environments with pip ({error}): install Python's venv and ensurepip."
            ) from error
        except OSError as error:
            raise InstallError(f"{self.folder} cannot be made ({error.strerror or error}).") from error
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(self.caps), encoding="utf-8")
        # --no-compile: most of the files of these packages are never imported, those that are get compiled then
        pip = [str(self.python), "-m", "pip", "install", "--prefer-binary", "--disable-pip-version-check", "--progress-bar",
               "off", "--no-compile", "--constraint", str(constraints)]  # fmt: skip
        late = [r for r in self.requirements if r.startswith(ASK_FOR_TORCH)]
        # without a look at the WebUI's packages, whose old pins pip would try to keep
        run([*pip, *(r for r in self.requirements if r not in late), *THEIR_OTHERS])
        if late:
            run([*pip, "--no-deps", *late])
        scheme = "nt" if os.name == "nt" else "posix_prefix"
        places = sysconfig.get_paths(scheme, vars={"base": str(self.folder), "platbase": str(self.folder)})
        # a .pth file's folders come after the environment's own
        (Path(places["purelib"]) / "webui.pth").write_text("\n".join(self.behind), encoding="utf-8")
        self._stamp.write_text(self._wanted, encoding="utf-8")

    @property
    def _stamp(self) -> Path:
        return self.folder / "requirements.txt"

    @property
    def _wanted(self) -> str:
        return "\n".join([*self.requirements, *self.caps, *self.behind])


def own_variables() -> dict[str, str]:
    """The process's variables without those that lead to the WebUI's packages or pages."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "GRADIO_ROOT_PATH", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_SHARE")
    return {k: v for k, v in os.environ.items() if k not in hidden}
