"""What a finished run offers to take away: its files with their sizes, and its settings as a file for the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..core.concepts import Concept
from ..core.errors import ErasureError
from ..formats.atomic import atomic_file, atomic_folder
from ..job import Job
from ..mass_config import MassConfig
from ..settings import as_table
from .request import Request
from .runs import Run
from .safety import Places, file_of

#: name's end -> what it is
MEANINGS = (
    ("-edit-lora.safetensors", "closed-form edit as a LoRA"),
    ("-lora.safetensors", "trained LoRA, on top of the edit"),
    (".safetensors", "erased checkpoint"),
    (".toml", "settings: repeat it with --config"),
    ("grid.png", "before and after, all prompts"),
    ("report.md", "damage report"),
    ("report.json", "damage report for programs"),
)


def config_text(request: Request, made: Job) -> str:
    """The job as a file for ``realera erase MODEL --config``: every setting is in it, so that defaults may change."""
    mass = made.config if isinstance(made.config, MassConfig) else None
    command = "erase" if mass else {"edit": "edit", "lora": "train-lora"}.get(request.method, "erase")
    model = "demo" if made.checkpoint == "demo" else Path(made.checkpoint).name
    option = f" --method {mass.method}" if mass else ""
    lines = [f"# python -m realera_nodes {command} {model} --config erase.toml --out DIR{option}", ""]
    if made.retained:
        lines += [f"retain = {_value([asdict(p) for p in made.retained])}", ""]
    table = as_table(made.config)
    lines += [f"{k} = {_value(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for concept in made.concepts:
        lines += ["", "[[concepts]]", *(f"{k} = {_value(v)}" for k, v in _fields(concept).items())]
    for section, values in table.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{k} = {_value(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def write_config(path: Path, request: Request, made: Job) -> None:
    with atomic_file(path, overwrite=True) as f:
        f.write(config_text(request, made).encode())


def _fields(concept: Concept) -> dict[str, Any]:
    found = {f.name: getattr(concept, f.name) for f in fields(Concept) if f.name not in ("images", "masks")}
    found["preserve"] = [asdict(p) for p in concept.preserve]
    return {k: v for k, v in found.items() if v not in (None, (), [])}


def _value(value: Any) -> str:
    """A TOML value: JSON's words and numbers are TOML's."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, (bool, int, str)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    text = repr(float(value))
    return text if any(c in text for c in ".en") else f"{text}.0"


def files_of(run: Run) -> list[dict[str, Any]]:
    """name, bytes, meaning, place of what a run wrote, largest first."""
    if not run.files.is_dir():
        return []
    found = []
    for path in run.files.iterdir():
        if path.name.startswith("."):
            continue
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
        meaning = (
            "erased model, a diffusers folder"
            if path.is_dir()
            else next((m for end, m in MEANINGS if path.name.endswith(end)), "")
        )
        found.append({"name": path.name, "bytes": size, "meaning": meaning, "place": str(path.resolve())})
    return sorted(found, key=lambda f: -f["bytes"])


def copy_to(run: Run, name: str, place: str, places: Places) -> Path:
    """Copies a file of a run into one of the export folders, whole or not at all; returns where it is now.

    Raises:
        ErasureError: no such run's file or folder, or a file of that name is there.
    """
    if place not in places.exports:
        known = ", ".join(places.exports) or "none: start the studio with --export NAME=FOLDER"
        raise ErasureError(f'there is no folder "{place[:80]}" to copy to: choose one of {known}.')
    source = file_of(run.files, name)
    words = "-".join(run.request.concepts[:3]).casefold()
    tag = "".join(c if c.isalnum() else "-" for c in words)[:40].strip("-")
    stem, dot, suffix = source.name.partition(".")
    target = places.exports[place] / (f"{stem}-{tag}{dot}{suffix}" if tag else source.name)
    if source.is_dir():
        with atomic_folder(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        return target
    with atomic_file(target) as f, source.open("rb") as old:
        shutil.copyfileobj(old, f, 1 << 20)
    return target
