"""What the page may touch: models of the model folders, runs of the output folder, and nothing that is named by a path."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import ErasureError
from ..formats.checkpoint import open_checkpoint
from ..formats.header import PICKLES
from ..formats.windows import windows_refuses
from ..job import DEMO

#: folders below a model folder that are looked into
DEPTH = 3


@dataclass(frozen=True)
class Places:
    """Where the panel reads and writes.

    Attributes:
        out: the output folder: runs, uploads
        models: folders whose checkpoints are offered
        given: checkpoints that the command line named, offered first
        exports: folders that finished files may be copied to, by the name that the page shows
        host: a file with the path of the checkpoint that a WebUI has loaded; it is offered first as long as it lies in ``models``
    """

    out: Path
    models: tuple[Path, ...] = ()
    given: tuple[Path, ...] = ()
    exports: dict[str, Path] = field(default_factory=dict)
    host: Path | None = None

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def uploads(self) -> Path:
        return self.out / "uploads"

    def offered(self) -> dict[str, Path | None]:
        """Names in the page's order -> files and folders; None: the embedded model. Pickles are listed, and refused."""
        found: dict[str, Path | None] = {}
        loaded = self._loaded()
        first = [p for p in (loaded, *self.given) if p is not None]
        for path in first:
            found[_free(path.name, path, found)] = path
        known = {p.resolve() for p in first}
        rest = {
            _free(str(path.relative_to(folder)), path, found): path
            for folder in (*self.models, self.uploads)
            for path in _models_in(folder)
            if path.resolve() not in known
        }
        if not first:
            return {DEMO: None, **rest}
        return found | {DEMO: None} | rest

    def model(self, name: str) -> str:
        """What the engine calls a model that the page calls ``name``. ErasureError: it is not offered, or a pickle."""
        offered = self.offered()
        if name not in offered:
            raise ErasureError(
                f'"{name}" is not among the offered models: choose one of the list, or put it into a model folder.'
            )
        path = offered[name]
        if path is None:
            return DEMO
        open_checkpoint(path)
        return str(path)

    def _loaded(self) -> Path | None:
        if self.host is None or not self.host.exists():
            return None
        path = Path(self.host.read_text(encoding="utf-8").strip())
        return path if path.is_file() and any(inside(path, folder) for folder in self.models) else None

    def take_upload(self, temporary: Path, name: str) -> str:
        """Moves an upload among the models and returns its name. ErasureError: no checkpoint in safetensors; it is deleted."""
        target = self.uploads / plain_name(name)
        try:
            if target.suffix.lower() != ".safetensors":
                raise ErasureError(
                    f"{target.name} is refused: only .safetensors checkpoints can be uploaded, as other formats can run code."
                )
            open_checkpoint(temporary)
            if target.exists():
                raise ErasureError(f"{target.name} was uploaded before: choose it from the list, or give the file another name.")
            self.uploads.mkdir(parents=True, exist_ok=True)
            shutil.move(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return next(n for n, p in self.offered().items() if p == target)


def inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies in a folder or is it."""
    return path.resolve().is_relative_to(folder.resolve())


def plain_name(name: str) -> str:
    """A file name without folders, whoever's separators they use. ErasureError: nothing is left, or it is hidden."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1].strip()
    if not last or last.startswith(".") or windows_refuses(last):
        raise ErasureError(f'"{name[:80]}" is no name for a file: use letters, digits, - and _.')
    return last


def file_of(folder: Path, name: str) -> Path:
    """A file that stands in ``folder`` itself. ErasureError: there is none of that name."""
    there = {p.name: p for p in folder.iterdir()} if folder.is_dir() else {}
    if name not in there or not inside(there[name], folder):
        raise ErasureError(
            f'there is no file "{name[:80]}" in {folder.name}: choose one of {", ".join(sorted(there)) or "none"}.'
        )
    return there[name]


def _models_in(folder: Path) -> list[Path]:
    """Checkpoints, pickles and diffusers folders, by name; what a diffusers folder holds is not listed by itself."""
    found: list[Path] = []
    for root, folders, files in os.walk(folder, followlinks=True):  # model folders are often linked; DEPTH ends loops
        here = Path(root)
        if "model_index.json" in files:
            found.append(here)
            folders.clear()
            continue
        folders[:] = sorted(d for d in folders if not d.startswith(".")) if len(here.relative_to(folder).parts) < DEPTH else []
        found += [
            here / f for f in sorted(files) if Path(f).suffix.lower() in {".safetensors", *PICKLES} and not f.startswith(".")
        ]
    return sorted(p for p in found if p != folder)


def _free(name: str, path: Path, taken: dict[str, Path | None]) -> str:
    """The name, with the folder's before it where another model has it already."""
    name = name.replace(os.sep, "/")
    return name if name not in taken and name != DEMO else f"{path.parent.name}/{name}"
