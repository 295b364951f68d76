"""Files of an erasure: the erased checkpoint, the trained LoRA, and the closed-form edit as an exact LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .core.adapters import Factors
from .erasure import Erasure
from .esd import EsdErasure
from .formats.atomic import Batch
from .formats.checkpoint import Checkpoint, write_edited
from .formats.lora import write_lora
from .formats.metadata import ErasureMetadata
from .mass import MassErasure
from .outcome import Outcome
from .settings import as_table
from .uce import UceErasure

#: ranks up to this are written whole; larger edits are cut to it per layer, and the loss is reported
MAX_RANK = 320


@dataclass(frozen=True)
class EditLora:
    """The closed-form edit as a LoRA; ``dropped`` is the largest Frobenius share that a layer lost to the rank limit."""

    factors: Factors
    rank: int
    dropped: float


def edit_lora(erasure: Erasure, projections: Iterable[str], read: Callable[[str], Tensor], max_rank: int = MAX_RANK) -> EditLora:
    """The closed-form part as low-rank factors of every edited projection; ``read`` gives a projection's base weight.

    Exact (shared factors of T - I) where its rank allows; else each layer's delta is cut to ``max_rank`` by SVD.
    """
    assert erasure.transform is not None
    assert erasure.low_rank is not None
    config = erasure.config.closed_form
    names = [n for n in projections if config.edits(n)]
    if erasure.low_rank.rank <= max_rank:
        factors = {n: erasure.low_rank.factors(read(n), config.strength) for n in names}
        return EditLora(factors, erasure.low_rank.rank, erasure.low_rank.dropped)
    transform, strength = erasure.transform, config.strength
    return _cut(((n, transform.delta(read(n).float(), strength)) for n in names), max_rank)


def whole_lora(
    erasure: MassErasure | UceErasure, projections: Iterable[str], read: Callable[[str], Tensor], max_rank: int = MAX_RANK
) -> EditLora:
    """A mass erasure or UCE as one LoRA: exact where closed forms and LoRAs together stay within ``max_rank``, else cut to it."""
    names = [n for n in projections if erasure.touches(n)]
    ranks = {n: down.shape[0] for n, (down, _) in erasure.factors.items()}
    shared = erasure.low_rank.rank if erasure.low_rank else 0
    if shared + max(ranks.values(), default=0) > max_rank:
        deltas = ((n, erasure.delta(n, read(n).float())) for n in names)
        return _cut(((n, d) for n, d in deltas if d is not None), max_rank)
    factors: Factors = {}
    for name in names:
        parts = [erasure.low_rank.factors(read(name))] if erasure.low_rank and erasure.edits(name) else []
        parts += [erasure.factors[name]] if name in erasure.factors else []
        factors[name] = (torch.cat([d for d, _ in parts]), torch.cat([u for _, u in parts], 1))
    return EditLora(factors, shared + max(ranks.values(), default=0), erasure.low_rank.dropped if erasure.low_rank else 0.0)


def _cut(deltas: Iterable[tuple[str, Tensor]], max_rank: int) -> EditLora:
    """Each delta (out, d) by its ``max_rank`` largest singular values, their roots on both sides."""
    factors, dropped, rank = {}, 0.0, 0
    for name, delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        keep = min(max_rank, int((s > 1e-6 * s[0]).sum()) or 1)
        root = s[:keep].sqrt()
        factors[name] = (v[:keep] * root[:, None], u[:, :keep] * root)
        dropped, rank = max(dropped, float(s[keep:].norm() / s.norm().clamp(min=1e-12))), max(rank, keep)
    return EditLora(factors, rank, dropped)


def loras_of(erasure: Outcome, base: Checkpoint, max_rank: int = MAX_RANK) -> dict[str, EditLora]:
    """The LoRAs that hold an outcome, by role: "edit lora" and "lora" add up; none where no LoRA could (ESD)."""
    names, read, found = base.architecture.projections, base.read_projection, {}
    if isinstance(erasure, MassErasure | UceErasure):
        found["lora"] = whole_lora(erasure, names, read, max_rank)
    elif isinstance(erasure, Erasure):
        if erasure.transform is not None:
            found["edit lora"] = edit_lora(erasure, names, read, max_rank)
        if erasure.factors:
            rank = max(down.shape[0] for down, _ in erasure.factors.values())
            found["lora"] = EditLora(erasure.factors, rank, 0.0)
    return found


def metadata_of(erasure: Outcome, checkpoint: Checkpoint, sha256: str) -> ErasureMetadata:
    """Who was erased how from which file."""
    return ErasureMetadata(
        method=method_name(erasure),
        concepts=tuple(c.phrase for c in erasure.concepts),
        anchors=erasure.anchors,
        preserved=preserved_by(erasure),
        config=as_table(erasure.config),
        base_sha256=sha256,
        base_name=checkpoint.path.name,
        kinds=tuple(c.kind for c in erasure.concepts),
    )


def preserved_by(erasure: Outcome) -> tuple[str, ...]:
    """All phrases that the user asked to keep; none where the method keeps nothing by name."""
    if isinstance(erasure, EsdErasure):
        return ()
    retained = erasure.retained if isinstance(erasure, MassErasure) else ()
    return tuple(dict.fromkeys(k.phrase for k in (*(k for c in erasure.concepts for k in c.preserve), *retained)))


def method_name(erasure: Outcome) -> str:
    """The outcome's method."""
    return erasure.method


def export_checkpoint(
    erasure: Outcome, checkpoint: Checkpoint, target: Path, sha256: str, overwrite: bool,
    progress: Callable[[int, int], None] | None = None, prediction: str | None = None, batch: Batch | None = None,
    made: ErasureMetadata | None = None,
) -> None:  # fmt: skip
    """The erased checkpoint in the layout it came in, streamed from the base's file.

    Args:
        prediction: what the model predicts, if not as its files say
        batch: what it is to appear with, in place of ``overwrite``
        made: what its metadata say; None: of ``erasure``, made now
    """

    def change(name: str) -> Callable[[Tensor], Tensor]:
        def new(weight: Tensor) -> Tensor:
            delta = erasure.delta(name, weight)
            return weight if delta is None else weight + delta.to(weight)

        return new

    touched = erasure.names(checkpoint.architecture.projections)
    text = (made or metadata_of(erasure, checkpoint, sha256)).to_safetensors(
        checkpoint.architecture.kind, inherited=checkpoint.metadata, prediction=checkpoint.prediction(prediction).type
    )
    write_edited(checkpoint, target, {n: change(n) for n in touched}, text, overwrite, progress, batch)


def export_lora(
    erasure: Outcome, factors: Factors, checkpoint: Checkpoint, target: Path, sha256: str, overwrite: bool,
    prediction: str | None = None, batch: Batch | None = None, made: ErasureMetadata | None = None, hint: str = "",
) -> None:  # fmt: skip
    """Low-rank factors as a LoRA file that ComfyUI, WebUIs and diffusers read. ``hint`` says how it is used."""
    ranks = {n: down.shape[0] for n, (down, _) in factors.items()}
    text = (made or metadata_of(erasure, checkpoint, sha256)).to_safetensors(
        checkpoint.architecture.kind, ranks, checkpoint.metadata, checkpoint.prediction(prediction).type, hint
    )
    write_lora(target, factors, text, torch.float32, overwrite, batch)
