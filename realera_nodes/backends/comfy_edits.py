"""Edits on ComfyUI's models: patches on clones, LoRAs on sockets, and the record of both that exports write into files."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.sd
import torch
from torch import Tensor

from ..core.adapters import Factors
from ..core.closed_form import Transform
from ..core.errors import ErasureError
from ..exports import method_name, preserved_by
from ..formats.lora import lora_tensors
from ..formats.prediction import V
from ..outcome import Outcome
from ..settings import as_table
from .comfy import KINDS, ComfyBackend, prediction_of
from .comfy_weights import EffectiveWeights, layer_keys, parameter, parameter_keys, working_dtype

#: where a MODEL keeps the records of its edits
ATTACHMENT = "realera_edits"


@dataclass(frozen=True)
class EditRecord:
    """One edit of a model: how it was made, and its patches, by which it is found again.

    Attributes:
        method: as in ErasureMetadata
        concepts, anchors, preserved: phrases
        config: the settings, JSON values
        kinds: of the concepts; empty: not said
        transform: of MACE's refinement, on which LoRAs are fused
        whole: whether it changes parameters of any kind, not only projections
    """

    method: str
    concepts: tuple[str, ...]
    anchors: tuple[str, ...]
    preserved: tuple[str, ...]
    config: dict[str, Any]
    patches: tuple[Any, ...] = ()
    kinds: tuple[str, ...] = ()
    transform: Transform | None = None
    whole: bool = False


class ErasureLora(dict[str, Tensor]):
    """A LORA_MODEL: what other nodes take for a plain state dict in kohya's naming, with its factors and record.

    ``kind`` and ``prediction`` ("epsilon", "v_prediction", None: not known) are of the model that it is for.
    """

    def __init__(self, factors: Factors, record: EditRecord, kind: str, prediction: str | None = None):
        super().__init__(lora_tensors(factors, torch.float32))
        self.factors, self.record, self.kind, self.prediction = factors, record, kind, prediction


def record_of(erasure: Outcome, method: str = "", config: Any = None) -> EditRecord:
    """The record of what an erasure did, or a part of it, which then is named by ``method`` and has its own ``config``."""
    return EditRecord(
        method or method_name(erasure),
        tuple(c.phrase for c in erasure.concepts),
        erasure.anchors,
        preserved_by(erasure),
        as_table(erasure.config if config is None else config),
        kinds=tuple(c.kind for c in erasure.concepts),
        whole=erasure.whole,
    )


def records_of(model: Any) -> tuple[EditRecord, ...]:
    """Records of all edits on a MODEL, oldest first."""
    return model.attachments.get(ATTACHMENT, ())


def with_deltas(model: Any, deltas: Mapping[str, Tensor], record: EditRecord) -> Any:
    """A clone of a MODEL with weight + delta, by canonical name or any parameter's own.

    Deltas are kept in the type of the weights, in half precision beside float8 and quantised ones. The host adds both in
    single precision when it loads the model, and rounds the sum to the weight's type.
    """
    keys = layer_keys(model) | (parameter_keys(model) if record.whole else {})
    patches = {keys[n]: ("diff", (d.to("cpu", working_dtype(parameter(model, keys[n]))),)) for n, d in deltas.items()}
    for key, (_, (delta,)) in patches.items():
        if not torch.isfinite(delta).all():
            raise ErasureError(f"the edit of {key} is not finite: raise ridge, lower lr, or check the model for NaN.")
    return _patched(model, patches, 1.0, record)


def with_lora(model: Any, lora: ErasureLora, strength: float = 1.0) -> Any:
    """A clone of a MODEL with a LoRA, patched as the host's own loader does it."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(dict(lora), names)
    if len(patches) != len(lora.factors):
        raise ErasureError("the LoRA has layers that the model lacks: apply it to the model that it was made from.")
    return _patched(model, patches, strength, lora.record)


def _patched(model: Any, patches: dict[str, Any], strength: float, record: EditRecord) -> Any:
    clone = model.clone()
    done = clone.add_patches(patches, strength)
    if set(done) != set(patches):
        raise ErasureError("the model lacks layers that the edit changes: apply it to the model that it was made from.")
    own = replace(record, patches=tuple(patches.values()))
    clone.set_attachments(ATTACHMENT, (*records_of(model), own))
    return clone


def without_edits(model: Any) -> Any:
    """A MODEL as it was before all of this pack's edits."""
    return _without(model, records_of(model))[0]


def split(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """A MODEL as it was before this pack's edits, and what they change: (clone, canonical name -> delta (out, in) float32).

    Edits of whole weights (ESD) stay on it: they are no matter of projections, and count as the model's own.
    """
    base, touched = _without(model, [r for r in records_of(model) if not r.whole])
    keys = {name: key for name, key in layer_keys(model).items() if key in touched}
    before, after = EffectiveWeights(base, keys), EffectiveWeights(model, keys)
    return base, {name: after[name] - before[name] for name in keys}


def _without(model: Any, records: Sequence[EditRecord]) -> tuple[Any, set[str]]:
    """A clone of a MODEL without some of its edits, and the keys that they change; itself, if there are none."""
    if not records:
        return model, set()
    ours = {id(p) for record in records for p in record.patches}
    base = model.clone()
    touched = set()
    for key, patches in list(base.patches.items()):
        kept = [p for p in patches if id(p[1]) not in ours]
        if len(kept) < len(patches):
            touched.add(key)
        base.patches[key] = kept
        if not kept:
            del base.patches[key]
    base.patches_uuid = uuid.uuid4()
    left = tuple(r for r in records_of(model) if not any(r is gone for gone in records))
    if left:
        base.set_attachments(ATTACHMENT, left)
    else:
        base.remove_attachments(ATTACHMENT)
    return base, touched


def effective(backend: ComfyBackend) -> dict[str, Tensor]:
    """All projections at once, for what reads each of them more than once."""
    return dict(backend.projections())


def joined(first: Factors, second: Factors) -> Factors:
    """One LoRA that does what two do: their ranks side by side."""
    result = dict(first)
    for name, (down, up) in second.items():
        if name in result:
            down, up = torch.cat([result[name][0], down]), torch.cat([result[name][1], up], 1)
        result[name] = (down, up)
    return result


def save_checkpoint(path: str, model: Any, clip: Any, vae: Any, metadata: dict[str, str]) -> None:
    """A checkpoint with all patches baked in, in the host's own way. The base's weights stay as they are."""
    extra: dict[str, Tensor] = {}
    if prediction_of(model) == V:
        extra["v_pred"] = torch.tensor([])
        if getattr(model.get_model_object("model_sampling"), "zsnr", False):
            extra["ztsnr"] = torch.tensor([])
    comfy.sd.save_checkpoint(path, model, clip, vae, None, metadata=metadata, extra_keys=extra)


def kind_of(model: Any) -> str:
    """ "sd1", "sd2" or "sdxl"."""
    return KINDS[next(parameter(model, key).shape[1] for name, key in layer_keys(model).items() if name.endswith("attn2.to_k"))]


def difference(before: ComfyBackend, after: ComfyBackend) -> dict[str, Tensor]:
    """What the projections of two models differ by: canonical name -> (out, d) float32, without those that are equal."""
    first, second = before.projections(), after.projections()
    if first.keys() != second.keys():
        raise ErasureError("the two models have different layers: compare a model with its own erased version.")
    deltas = {name: second[name] - first[name] for name in first}
    return {name: d for name, d in deltas.items() if d.any()}
