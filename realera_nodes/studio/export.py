"""What a finished run offers to take away: its files with their sizes, and its settings as a file for the command line."""

from __future__ import annotations

import filecmp
import json
import os
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

#: what comes after the last dot of the files that a run writes
ENDINGS = (".safetensors", ".toml", ".png", ".md", ".json")
ROLES = ("-lora.safetensors", "-edit-lora.safetensors")
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
        ErasureError: no such run's file or folder, or it was copied before.
    """
    if place not in places.exports:
        known = ", ".join(places.exports) or "none: start the studio with --export NAME=FOLDER"
        raise ErasureError(f'there is no folder "{place[:80]}" to copy to: choose one of {known}.')
    source = file_of(run.files, name)
    target = places.exports[place] / tagged(source, _tag(run, place, places))
    if os.path.lexists(target):
        if source.is_dir() or (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise ErasureError(f"{target} already exists: it is this very file, copied before.")
        raise ErasureError(f"{target} already exists and is not of this run: rename it or move it away, then copy again.")
    if source.is_dir():
        with atomic_folder(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        return target
    with atomic_file(target) as f, source.open("rb") as old:
        shutil.copyfileobj(old, f, 1 << 20)
    return target


def tagged(source: Path, tag: str) -> str:
    """The name of a copy: with the tag before its ending. Models' names have dots of their own."""
    ending = source.suffix if source.suffix in ENDINGS and not source.is_dir() else ""
    stem = source.name.removesuffix(ending)
    return f"{stem}-{tag}{ending}" if tag else source.name


def _tag(run: Run, place: str, places: Places) -> str:
    """What all copies of a run into a folder have in their names: its concepts, and a number where another run has them.

    It is chosen for all of the run's files at once and kept, so that what belongs together is called alike, and never
    like a half of another run.
    """
    known = run.read("copied") or {}
    if place in known:
        return str(known[place])
    words = "-".join(run.request.concepts[:3]).casefold()
    plain = "".join(c if c.isalnum() else "-" for c in words)[:40].strip("-")
    number = 1
    while _taken(run, tag := "-".join(w for w in (plain, str(number) if number > 1 else "") if w), places.exports[place]):
        number += 1
    run.write("copied", known | {place: tag})
    return tag


def _taken(run: Run, tag: str, folder: Path) -> bool:
    """Whether a file of another run has a name that one of this run's, or its other half, would have."""
    names = set()
    for path in run.files.iterdir():
        names.add(tagged(path, tag))
        stem = path.name.removesuffix(".safetensors").removesuffix("-lora").removesuffix("-edit")
        if path.suffix == ".safetensors" or path.is_dir():
            names |= {tagged(path.with_name(stem + end), tag) for end in ("", ".safetensors", *ROLES)}
    there = {p.name.casefold() for p in folder.iterdir()} if folder.is_dir() else set()
    return any(name.casefold() in there for name in names)
