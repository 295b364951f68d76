"""What a job writes, under which names, and what of an earlier run goes when it is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .core.errors import ErasureError
from .formats.checkpoint import open_checkpoint
from .formats.metadata import ErasureMetadata
from .formats.stream import SafetensorsFile

#: endings of what any method may have left, beside the checkpoint
_LORAS = ("-lora.safetensors", "-edit-lora.safetensors")


def left_overs(files: Mapping[str, Path], stem: Path, made: ErasureMetadata) -> list[Path]:
    """Models and LoRAs of an earlier run under the same name that this one does not replace and that are of another erasure.

    They would be taken for parts of the new one. Only files that say in their metadata that this package made them count.

    Args:
        files: what is written now
        stem: folder and beginning of all names: ``out/NAME-erased``
        made: what the new files say of themselves
    """
    candidates = (stem, *(stem.with_name(stem.name + end) for end in (".safetensors", *_LORAS)))
    found = []
    for path in candidates:
        if path in files.values() or not os.path.exists(path):
            continue
        old = _made(path)
        if old is not None and not old.same_outcome(made):
            found.append(path)
    return found


def _made(path: Path) -> ErasureMetadata | None:
    """How a file or folder was made; None where it was not made here, or cannot be read."""
    try:
        file = open_checkpoint(path).files[0] if path.is_dir() else SafetensorsFile.open(path)
        return ErasureMetadata.from_safetensors(file.metadata)
    except ErasureError:
        return None


def hints(files: Mapping[str, Path], base: str) -> dict[str, str]:
    """Role -> how a LoRA is used, with its partner where there are two."""
    if {"lora", "edit lora"} <= files.keys():
        edit, lora = files["edit lora"].stem, files["lora"].stem
        return {"edit lora": f"The closed-form edit: load it together with {lora}, each at strength 1, on {base}.",
                "lora": f"Trained on top of {edit}: load both, each at strength 1, on {base}."}  # fmt: skip
    return {role: f"Load it at strength 1 on {base}." for role in files if role.endswith("lora")}
