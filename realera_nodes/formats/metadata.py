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
from .folder import walk
from .lora import lora_parts
from .prediction import V, modelspec_word
from .stream import SafetensorsFile

PREFIX = "realera."
#: ModelSpec's architecture ids (https://github.com/Stability-AI/ModelSpec), by kind and prediction
MODELSPEC = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
MODELSPEC_768_V = "stable-diffusion-v2-768-v"
#: how ids of a kind begin; SSD-1B and its like are SDXL's children with ids of their own
_FAMILIES = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl", "segmind": "sdxl"}
#: kohya's names for what a LoRA was trained on: the WebUIs sort LoRAs by them
BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_INHERITED = ("modelspec.architecture", "modelspec.implementation", "modelspec.resolution", "modelspec.prediction_type",
              "modelspec.license")  # fmt: skip


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
        self, kind: Kind | None = None, ranks: Mapping[str, int] | int | None = None, inherited: Mapping[str, str] | None = None,
        prediction: str | None = None, hint: str = "",
    ) -> dict[str, str]:  # fmt: skip
        """The header's text fields: ours as JSON under ``realera.``, ModelSpec's, and for a LoRA kohya's, by which hosts sort.

        kohya's ss_output_name is left out: hosts would show it in place of the file's name, and two copies under one name.

        Args:
            kind: the model's architecture; without it ModelSpec's ``architecture`` is left to ``inherited``.
            ranks: for a LoRA, its rank, or canonical name -> rank.
            inherited: metadata of the edited model: what its ModelSpec says of its make is kept, if it can be of that kind.
            prediction: "epsilon" or "v_prediction"; None: as ``inherited`` says, else it is not said
            hint: how the file is to be used, in a sentence

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
        old = dict(inherited or {})
        result |= {key: old[key] for key in _INHERITED if key in old}
        if hint:
            result["modelspec.usage_hint"] = hint
        if word := modelspec_word(prediction):
            result["modelspec.prediction_type"] = word
        if kind is not None:
            v = prediction == V if prediction else _says_v(old)
            result["modelspec.architecture"] = _architecture(kind, v, prediction, old.get("modelspec.architecture", ""))
            side = 1024 if kind == "sdxl" else 768 if kind == "sd2" and v else 512
            result.setdefault("modelspec.resolution", f"{side}x{side}")
            if ranks is not None:
                result |= self._kohya_fields(kind, v, bool(prediction) or "modelspec.prediction_type" in old)
        if ranks is not None:
            result |= self._lora_fields(result, ranks)
        return result

    def _kohya_fields(self, kind: Kind, v: bool, known: bool) -> dict[str, str]:
        """AUTOMATIC1111 and Forge show a LoRA by ss_base_model_version and ss_v2; without them every one is SD1's."""
        fields = {
            "ss_base_model_version": BASE_VERSIONS[kind] + ("_v" if v and kind != "sdxl" else ""),
            "ss_v2": str(kind == "sd2"),
        }
        if known:
            fields["ss_v_parameterization"] = str(v)
        if self.base_name:
            fields["ss_sd_model_name"] = self.base_name
        return fields

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

    def same_outcome(self, other: ErasureMetadata) -> bool:
        """Whether two files hold parts or forms of one erasure of one model: all is equal but when and by which version."""
        mine, theirs = (json.loads(json.dumps(asdict(m))) for m in (self, other))
        return all(mine[k] == theirs[k] for k in mine if k not in ("created", "version", "method", "base_name"))

    @classmethod
    def from_safetensors(cls, metadata: Mapping[str, str]) -> ErasureMetadata | None:
        """What ``to_safetensors`` wrote, or None where there is nothing of ours. Raises ErasureError if it is damaged."""
        if PREFIX + "method" not in metadata:
            return None
        try:
            values = {f.name: json.loads(metadata[PREFIX + f.name]) for f in fields(cls)}
            for name, value in values.items():
                if not _fits(name, value):
                    raise TypeError(f"{name} is {str(value)[:40]!r}")
            return cls(**values)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise ErasureError(f"the file's {PREFIX}* metadata are damaged ({error}): write the file again.") from error


def _fits(name: str, value: Any) -> bool:
    """Whether a field of ErasureMetadata can have a JSON value."""
    if name == "config":
        return isinstance(value, dict)
    if name in ("concepts", "anchors", "preserved", "kinds"):
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    return isinstance(value, str)


def _says_v(metadata: Mapping[str, str]) -> bool:
    said = metadata.get("modelspec.prediction_type", "").casefold()
    return said in ("v", "v_prediction") or (not said and metadata.get("modelspec.architecture", "").startswith(MODELSPEC_768_V))


def _architecture(kind: Kind, v: bool, prediction: str | None, inherited: str) -> str:
    """ModelSpec's id: the model's own, if it is one of this kind and prediction, or of none that is known."""
    own = inherited.split("/")[0]
    usual = MODELSPEC_768_V if kind == "sd2" and v else MODELSPEC[kind]
    family = next((k for stem, k in _FAMILIES.items() if own.startswith(stem)), None)
    wrong = family is not None and family != kind
    if kind == "sd2" and family == "sd2" and prediction is not None:
        wrong = own.endswith("-v") != v
    return own if own and not wrong else usual


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
        "bytes": sum(p.stat().st_size for p in walk(path, strict=False)) if path.is_dir() else path.stat().st_size,
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
