"""What an erased file says about itself, and what ``inspect`` shows of any file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from ..core.errors import ErasureError
from .architecture import KINDS, Kind, detect
from .checkpoint import open_checkpoint
from .lora import lora_parts
from .stream import SafetensorsFile

PREFIX = "realera."
#: ModelSpec's architecture ids (https://github.com/Stability-AI/ModelSpec)
MODELSPEC = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_INHERITED = ("modelspec.architecture", "modelspec.implementation")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _version() -> str:
    try:
        return installed_version("realera-nodes")
    except PackageNotFoundError:  # a ComfyUI custom node is a folder, not an installed package
        return "source"


@dataclass(frozen=True)
class ErasureMetadata:
    """How a file was made.

    Attributes:
        method: e.g. "realera", "mace", "uce".
        concepts: what was erased.
        anchors: what each concept became, in the same order.
        preserved: concepts that were protected.
        config: the method's settings, JSON values.
        base_sha256: hash of the model that was edited.
        base_name: its file or folder name.
        created: ISO 8601 time in UTC.
        version: of this package.
        kinds: what each concept is (object, person, style, explicit), in the same order; empty: not said.
    """

    method: str
    concepts: tuple[str, ...]
    anchors: tuple[str, ...]
    preserved: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    base_sha256: str = ""
    base_name: str = ""
    created: str = field(default_factory=_now)
    version: str = field(default_factory=_version)
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("concepts", "anchors", "preserved", "kinds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_safetensors(
        self, kind: Kind | None = None, ranks: Mapping[str, int] | int | None = None, inherited: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The header's text fields: ours as JSON under ``realera.``, ModelSpec's, and kohya's for a LoRA.

        Args:
            kind: the model's architecture; without it ModelSpec's ``architecture`` is left to ``inherited``.
            ranks: for a LoRA, its rank, or canonical name -> rank.
            inherited: metadata of the edited model: its ModelSpec architecture and implementation are kept.

        Raises:
            ErasureError: a setting that JSON cannot hold.
        """
        try:
            result = {PREFIX + key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in asdict(self).items()}
        except (TypeError, ValueError) as error:
            raise ErasureError(f"the settings cannot be stored in the file ({error}): use plain numbers and text.") from error
        result |= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": f"{self.base_name or 'Stable Diffusion'} without {', '.join(self.concepts)}",
            "modelspec.description": self._description(),
            "modelspec.date": self.created,
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        }
        if kind is not None:
            result["modelspec.architecture"] = MODELSPEC[kind]
        result |= {key: inherited[key] for key in _INHERITED if inherited and key in inherited}
        if ranks is not None:
            result |= self._lora_fields(result, ranks)
        return result

    def _description(self) -> str:
        pairs = [f"{c} -> {a}" if a else c for c, a in zip(self.concepts, self.anchors, strict=False)]
        pairs += self.concepts[len(self.anchors) :]
        kept = f" Preserved: {', '.join(self.preserved)}." if self.preserved else ""
        return f"Concepts erased with {self.method}: {', '.join(pairs)}.{kept}"

    @staticmethod
    def _lora_fields(so_far: Mapping[str, str], ranks: Mapping[str, int] | int) -> dict[str, str]:
        distinct = {ranks} if isinstance(ranks, int) else set(ranks.values())
        rank = str(distinct.pop()) if len(distinct) == 1 else "Dynamic"  # kohya's word for one rank per module
        result = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
                  "modelspec.implementation": "diffusers"}  # fmt: skip
        if "modelspec.architecture" in so_far:
            result["modelspec.architecture"] = so_far["modelspec.architecture"].split("/")[0] + "/lora"
        return result

    @classmethod
    def from_safetensors(cls, metadata: Mapping[str, str]) -> ErasureMetadata | None:
        """What ``to_safetensors`` wrote, or None where there is nothing of ours. Raises ErasureError if it is damaged."""
        if PREFIX + "method" not in metadata:
            return None
        try:
            return cls(**{f.name: json.loads(metadata[PREFIX + f.name]) for f in fields(cls)})
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise ErasureError(f"the file's {PREFIX}* metadata are damaged ({error}): write the file again.") from error


def inspect_file(path: Path) -> dict[str, Any]:
    """What a file is, as JSON values.

    Returns:
        path, kind ("checkpoint", "diffusers folder", "LoRA" or "other"), bytes, tensors, dtypes (name -> count),
        architecture (or None), layout, context_width, projections (count) for models; ranks (sorted) for a LoRA; reason for
        "other"; erasure (fields of ErasureMetadata, or None); metadata (the remaining fields of the header).

    Raises:
        ErasureError: no readable safetensors file or diffusers folder.
    """
    path = Path(path)
    files = open_checkpoint(path).files if path.is_dir() else (SafetensorsFile.open(path),)
    entries = [entry for file in files for entry in file.entries.values()]
    erasure = ErasureMetadata.from_safetensors(files[0].metadata)
    return {
        "path": str(path),
        **_kind(path, files[0]),
        "tensors": len(entries),
        "dtypes": dict(Counter(entry.dtype for entry in entries)),
        "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size,
        "erasure": None if erasure is None else asdict(erasure),
        "metadata": {k: v for k, v in files[0].metadata.items() if not k.startswith(PREFIX)},
    }


def _kind(path: Path, file: SafetensorsFile) -> dict[str, Any]:
    if not path.is_dir() and _is_lora(file):
        parts = lora_parts(file)
        downs = {key: file.entries[key].shape for key, (_, part) in parts.items() if part == "down"}
        widths = {shape[-1] for key, shape in downs.items() if "attn2" in key and ("to_k" in key or "to_v" in key)}
        width = widths.pop() if len(widths) == 1 else None
        return {"kind": "LoRA", "architecture": KINDS.get(width) if width else None, "context_width": width,
                "projections": len(downs), "ranks": sorted({shape[0] for shape in downs.values()})}  # fmt: skip
    try:
        found = open_checkpoint(path).architecture if path.is_dir() else detect(file.shapes)
    except ErasureError as error:
        return {"kind": "other", "architecture": None, "reason": str(error)}
    return {"kind": "diffusers folder" if path.is_dir() else "checkpoint", "architecture": found.kind, "layout": found.layout,
            "context_width": found.context_width, "projections": len(found.projections)}  # fmt: skip


def _is_lora(file: SafetensorsFile) -> bool:
    try:
        lora_parts(file)
    except ErasureError:
        return False
    return True
