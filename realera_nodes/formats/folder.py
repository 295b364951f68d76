"""A diffusers folder as it lies on a disk: its files through links, its parts, and the variants that their weights come in."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ErasureError
from .header import require_file

# NAME[.VARIANT][-0000i-of-0000n][.VARIANT].safetensors
_WEIGHTS_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<a>\w+))?(-(?P<i>\d{1,9})-of-(?P<n>\d{1,9}))?(\.(?P<b>\w+))?\.safetensors",
    re.ASCII,
)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MOST_SHARDS = 1000


def read_json(path: Path) -> Any:
    """What a JSON file holds. ErasureError: it is no regular file, cannot be read, is no JSON or is nested too deep."""
    try:
        require_file(path, "JSON")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ErasureError:
        raise
    except OSError as error:
        raise ErasureError(f"{path} cannot be read ({error.strerror}): download the folder again.") from error
    except (ValueError, RecursionError) as error:
        raise ErasureError(f"{path} cannot be read, it is not JSON: download the folder again.") from error


def walk(folder: Path, strict: bool = True) -> Iterator[Path]:
    """Every file of a folder by its path below it, linked files and folders among them; hidden ones are left out.

    A link to a folder that it lies in adds nothing and is not followed.

    Args:
        strict: whether to refuse what cannot be copied, or to leave it out

    Raises:
        ErasureError: a link that leads nowhere, a pipe, a socket or a device, an unreadable folder.
    """
    yield from _walk(folder, folder, {os.path.realpath(folder)}, strict)


def _walk(top: Path, folder: Path, above: set[str], strict: bool) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        if strict:
            raise ErasureError(f"{folder} cannot be read ({error.strerror}): change its permissions.") from error
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if strict:
                raise ErasureError(f"{path} {_nowhere(path)}: restore what it points to, or remove the link.") from error
            continue
        if stat.S_ISDIR(mode):
            real = os.path.realpath(path)
            if real not in above and not os.path.realpath(top).startswith(real.rstrip(os.sep) + os.sep):
                yield from _walk(top, path, above | {real}, strict)
        elif stat.S_ISREG(mode):
            yield path
        elif strict:
            require_file(path, "model")


def _nowhere(path: Path) -> str:
    """Why a path leads to nothing."""
    if not path.is_symlink():
        return "cannot be read"
    return f"is a link that leads nowhere ({os.readlink(path)})"


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. ErasureError: there is none, or it is not a JSON object."""
    path = folder / "model_index.json"
    if not os.path.lexists(path):
        raise ErasureError(f"{folder} has no model_index.json: give a checkpoint file or the top folder of a diffusers pipeline.")
    index = read_json(path)
    if not isinstance(index, dict):
        raise ErasureError(f"{path} cannot be read, it is not a JSON object: download the folder again.")
    return index


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Part -> (library, class), of the parts that a pipeline is made of. ErasureError: an entry that names neither."""
    found = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if len(value) == 2 and all(isinstance(v, str) for v in value):
            found[name] = (value[0], value[1])
        elif any(v is not None for v in value):
            raise ErasureError(
                f"{name} in model_index.json is {json.dumps(value)[:80]}, not a library and a class: download the folder again."
            )
    return found


def require_part(folder: Path, name: str) -> Path:
    """The part's folder. ErasureError: it is not there, or a link that leads nowhere."""
    path = folder / name
    if path.is_dir():
        return path
    if os.path.lexists(path):
        raise ErasureError(f"{path} {_nowhere(path) if path.is_symlink() else 'is not a folder'}: restore the part {name}.")
    raise ErasureError(f"{folder.name} has no {name}: choose a folder with all of its parts.")


def variant_of(name: str) -> str:
    """fp16 of diffusion_pytorch_model.fp16.safetensors; "" where there is none."""
    match = _WEIGHTS_FILE.fullmatch(name)
    return (match["a"] or match["b"] or "") if match else ""


def weights_of(part: Path, stem: str = "diffusion_pytorch_model") -> dict[str, list[Path]]:
    """Variant -> its safetensors file, or its shards in order; plain ones first, then fp16. Empty: the part has no weights.

    Args:
        stem: of the files' names: "diffusion_pytorch_model", or "model" for text encoders

    Raises:
        ErasureError: there are only pickles, or a variant lacks shards.
    """
    groups: dict[str, list[Path]] = {}
    for file in sorted(part.iterdir()):
        match = _WEIGHTS_FILE.fullmatch(file.name)
        if match and match["stem"] == stem:
            groups.setdefault(variant_of(file.name), []).append(file)
    if not groups:
        if any(file.suffix in _PICKLES for file in part.iterdir()):
            raise ErasureError(f"{part} holds pickles (.bin) only: open it in a tool you trust and save as .safetensors; "
                               "this project never opens pickles.")  # fmt: skip
        return {}
    ordered = sorted(groups, key=lambda v: (v != "", v != "fp16", v))
    for variant in ordered:
        _require_shards(part, groups[variant])
    return {variant: groups[variant] for variant in ordered}


def index_of(part: Path, variant: str, stem: str = "diffusion_pytorch_model") -> Path | None:
    """The file that says which shard of a variant holds which tensor; None where there is none."""
    for index in sorted(part.glob(f"{stem}*.index*.json")):
        if index.name.split(".index")[1] == (f".{variant}.json" if variant else ".json") and ".bin." not in index.name:
            return index
    return None


def _require_shards(part: Path, files: list[Path]) -> None:
    """Raises ErasureError naming the first shard that file names or the index announce and that is not there."""
    wanted: set[str] = set()
    for file in files:
        match = _WEIGHTS_FILE.fullmatch(file.name)
        if match and match["n"]:
            a, b = f".{match['a']}" if match["a"] else "", f".{match['b']}" if match["b"] else ""
            n = int(match["n"])
            if n > MOST_SHARDS:
                raise ErasureError(f"{file} is one of {n} shards, by its name: download the folder again.")
            wanted |= {f"{match['stem']}{a}-{i:05}-of-{n:05}{b}.safetensors" for i in range(1, n + 1)}
    first = _WEIGHTS_FILE.fullmatch(files[0].name)
    index = index_of(part, variant_of(files[0].name), first["stem"] if first else "")
    if index is not None:
        table = read_json(index)
        places = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise ErasureError(f"{index} is not an index of shards: download the folder again.")
        wanted |= set(places.values())
    for name in sorted(wanted):
        if not (part / name).exists():
            raise ErasureError(f"{part} lacks the shard {name}: download the folder again.")
