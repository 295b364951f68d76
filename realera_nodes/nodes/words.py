"""What nodes say in words about an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..exports import EditLora
from ..outcome import Outcome
from ..report.probes import general_probes, strongest_words
from ..report.report import embedding_residue, value_drift

MEANING = {
    "concept": "the concept", "synonym": "its aliases", "associated": "words that go with it",
    "preserved": "what you preserve", "unrelated": "unrelated prompts",
}  # fmt: skip


def damage(backend: Any, erasure: Outcome, deltas: Mapping[str, Any], lora: EditLora | None = None) -> str:
    """Condition, rank, and for each group of prompts how far W_V's output moves, and how much of its way is left."""
    probes = general_probes(erasure.concepts, named=strongest_words(erasure.concepts, erasure.mined))
    drift = value_drift(backend, probes, deltas)
    aims = erasure.anchors == tuple(c.anchor for c in erasure.concepts)  # else there is no way to anchors to speak of
    left = embedding_residue(backend, probes, deltas) if aims else {}
    pairs = zip(erasure.concepts, erasure.anchors, strict=True)
    lines = ["erased: " + ", ".join(f"{c.phrase} -> {a}" if a else c.phrase for c, a in pairs)]
    lines.append(f"{len(deltas)} projections changed")
    if erasure.transform is not None:
        lines.append(f"condition number {erasure.transform.condition:.1e}")
    if lora is not None:
        lost = f", which loses {lora.dropped:.1%} of it" if lora.dropped > 1e-4 else ""
        lines.append(f"as a LoRA of rank {lora.rank}{lost}")
    lines.append("values move by:")
    lines += [f"  {share:.1%} for {MEANING[group]}" for group, share in drift.items()]
    if left:
        lines.append("of their way to the anchor is left (residue):")
    lines += [f"  {share:.1%} for {MEANING[group]}" for group, share in left.items()]
    return "\n".join(lines)


def training(losses: list[float]) -> str:
    """How a training went."""
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return f"{len(losses)} steps, loss from {first:.3g} to {last:.3g}"
