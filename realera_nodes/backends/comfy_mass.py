"""What mass erasures ask of ComfyUI: a name for the model as it is patched, and where LoRAs and priors lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ..core.concepts import Concept, Preserved
from ..core.errors import ErasureError
from ..mass_config import MassConfig
from ..priors import Prior
from ..shelf import Base, FolderShelf
from .comfy_sampling import SCHEDULE

PRIORS = "realera_priors"


def fingerprint(backend: Any) -> str:
    """Names network, noise schedule and text encoder as they are used, LoRAs and edits upstream among them."""
    digest = hashlib.sha256(f"{backend.model_hash()} {backend.encoder_hash()} {backend.side} {backend.prediction}".encode())
    _digest(backend.patcher.get_model_object(SCHEDULE).sigmas, digest)
    for key, patches in sorted(backend.patcher.patches.items()):
        digest.update(key.encode())
        for patch in patches:
            _digest(patch, digest)
    return digest.hexdigest()


def _digest(part: Any, digest: Any) -> None:
    """Adds what a patch is made of: numbers, and every tensor by a sample of it."""
    if isinstance(part, Tensor):
        flat = part.detach().flatten()
        digest.update(f"{tuple(part.shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // 512)].float().cpu().numpy().tobytes())
    elif isinstance(part, (tuple, list)):
        for inner in part:
            _digest(inner, digest)
    elif hasattr(part, "weights"):  # the host's adapters (LoRA, LoHa, ...)
        digest.update(type(part).__name__.encode())
        _digest(part.weights, digest)
    elif isinstance(part, (int, float, str)):
        digest.update(str(part).encode())


def host_shelf(
    backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved], config: MassConfig, prior: Prior | None
) -> FolderShelf:  # fmt: skip
    """The shelf in the user's cache for the model as it is loaded."""
    base = Base(tuple(backend.names), backend.kind, fingerprint(backend), "the model loaded in ComfyUI",
                prediction=backend.prediction)  # fmt: skip
    return FolderShelf.of(concepts, retained, config, base, prior=prior)


def lora_names() -> list[str]:
    """LoRA files that the host's loaders list."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Raises ErasureError: the file is gone."""
    return _found("loras", name)


def lora_folder(name: str) -> list[Path]:
    """All LoRA files of a folder below one of the host's LoRA folders, by name.

    Raises:
        ErasureError: it leads elsewhere, is not there, or holds none.
    """
    for root in map(Path, folder_paths.get_folder_paths("loras")):
        found = (root / name).resolve()
        if found.is_relative_to(root.resolve()) and found.is_dir():
            files = sorted(found.glob("*.safetensors"))
            if files:
                return files
    raise ErasureError(f'"{name}" is no folder with LoRA files below models/loras or output/loras: write one such as erased.')


def prior_names() -> list[str]:
    """Prior files under models/priors and output/priors."""
    if PRIORS not in folder_paths.folder_names_and_paths:
        for root in (folder_paths.models_dir, folder_paths.get_output_directory()):
            folder_paths.add_model_folder_path(PRIORS, str(Path(root) / "priors"))
        folder_paths.folder_names_and_paths[PRIORS][1].add(".safetensors")
    return folder_paths.get_filename_list(PRIORS)


def prior_path(name: str) -> Path:
    """Raises ErasureError: the file is gone."""
    return _found(PRIORS, name)


def _found(folder: str, name: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ErasureError(f"{name} is not there any more: press R to read the folders again, and choose another file.")
    return Path(path)
