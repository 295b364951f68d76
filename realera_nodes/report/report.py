"""Numbers and files of a report: report.json, report.md and grid.png."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.metrics import drift, h_o, residue
from ..core.spans import make_pair
from ..formats.atomic import Batch, atomic_file
from .grid import before_after
from .probes import GROUPS, Probe

#: pictures (N, 3, H, W) -> what each one shows
Scorer = Callable[[Tensor], list[str]]


@dataclass
class Outcome:
    """Pictures of one model for all probes, and what was seen in them: pictures[i] (n, 3, H, W) belongs to probes[i]."""

    pictures: list[Tensor]
    seen: list[list[str]] = field(default_factory=list)


def draw(backend: Any, probes: Sequence[Probe], seeds: Sequence[int], steps: int, guidance: float, on_picture=None) -> Outcome:
    """Every probe at every seed."""
    prompts = [p.prompt for p in probes for _ in seeds]
    flat = backend.pictures(prompts, list(seeds) * len(probes), steps, guidance, on_batch=on_picture)
    return Outcome(list(flat.split(len(seeds))))


def score(outcome: Outcome, scorer: Scorer | None) -> Outcome:
    if scorer:
        outcome.seen = [scorer(p) for p in outcome.pictures]
    return outcome


def group_accuracy(probes: Sequence[Probe], outcome: Outcome, *groups: str) -> float | None:
    """Top-1 accuracy over the probes of some groups; None where a scorer can judge none of them."""
    judged = zip(probes, outcome.seen, strict=False)
    hits = [s == p.expected for p, seen in judged if p.group in groups and p.expected for s in seen]
    return sum(hits) / len(hits) if hits else None


def accuracies(probes: Sequence[Probe], outcome: Outcome) -> dict[str, float]:
    """Acc_e, Acc_s, Acc_g, residue and H_o where the scorer can tell them."""
    told = {"Acc_e": ("concept",), "Acc_s": ("preserved", "unrelated"), "Acc_g": ("synonym",), "residue": ("associated",)}
    found = {name: group_accuracy(probes, outcome, *groups) for name, groups in told.items()}
    result = {name: value for name, value in found.items() if value is not None}
    if {"Acc_e", "Acc_s", "Acc_g"} <= result.keys():
        result["H_o"] = h_o(result["Acc_e"], result["Acc_s"], result["Acc_g"])
    return result


def picture_change(probes: Sequence[Probe], before: Outcome, after: Outcome) -> dict[str, float]:
    """Root mean squared pixel change of each group's pictures, in [0, 1]: small where pictures stay the same."""
    result = {}
    for group in GROUPS:
        pairs = [(a, b) for p, a, b in zip(probes, before.pictures, after.pictures, strict=True) if p.group == group]
        if pairs:
            result[group] = float(torch.stack([(a - b).square().mean().sqrt() for a, b in pairs]).mean())
    return result


def value_drift(backend: Any, probes: Sequence[Probe], deltas: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative change of what W_V makes of each group's prompts, mean over layers and tokens."""
    rows = {}
    for group in GROUPS:
        prompts = [p.prompt for p in probes if p.group == group]
        if prompts:
            rows[group] = backend.encode(prompts).states[:, 1:]
    changes: dict[str, list[Tensor]] = {group: [] for group in rows}
    for w, delta in _layers(backend, deltas):
        for group, x in rows.items():
            changes[group].append(drift(x @ (w + delta), x @ w).mean())
    return {group: float(torch.stack(c).mean()) for group, c in changes.items() if c}


def embedding_residue(backend: Any, probes: Sequence[Probe], deltas: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of what should go is left in what W_V makes of prompts, for each group that has anchors.

    With rows e of a prompt from its phrase's first token on, and e* those of the same prompt with the anchor, aligned:

        residue = mean over layers and prompts of ||(W0 + delta) e - W0 e*|| / ||W0 e - W0 e*||   (Frobenius norms over rows)

    1 before an edit, 0 where the phrase has become its anchor; above 1 it has moved elsewhere. An edit's neighbors and
    prior keep it above 0. The noise alignment aims at predictions, not at values: it may erase and leave this as it is.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for p in probes:
        if p.anchor is not None:
            pair = make_pair(p.template, p.label, p.anchor, backend.encode, backend.phrase_ids)
            pairs.setdefault(p.group, []).append(pair.rows)
    left: dict[str, list[Tensor]] = {group: [] for group in pairs}
    for w, delta in _layers(backend, deltas):
        for group, rows in pairs.items():
            for e, target in rows:
                base, anchor = (e @ w).flatten(), (target @ w).flatten()
                left[group].append(residue(base + (e @ delta).flatten(), base, anchor))
    return {group: float(torch.stack(r).mean()) for group, r in left.items() if r}


def _layers(backend: Any, deltas: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(W0, delta), transposed, float32 on the CPU, of each edited W_V, or W_K where no W_V is edited; one layer at a time."""
    projections = backend.projections()
    for name in [n for n in deltas if n.endswith("to_v")] or list(deltas):
        yield projections[name].cpu().float().T, deltas[name].cpu().float().T


def write_report(
    out: Path, title: str, probes: Sequence[Probe], before: Outcome, after: Outcome, facts: dict[str, Any], overwrite: bool,
    batch: Batch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes grid.png, report.json and report.md under ``out``, with a ``batch`` or on their own; returns the report's table."""
    table: dict[str, Any] = {
        "before": accuracies(probes, before) if before.seen else {},
        "after": accuracies(probes, after) if after.seen else {},
        "picture_change": picture_change(probes, before, after),
        **facts,
        "probes": [
            {"group": p.group, "label": p.label, "prompt": p.prompt, "expected": p.expected,
             "before": before.seen[i] if before.seen else None, "after": after.seen[i] if after.seen else None}
            for i, p in enumerate(probes)
        ],
    }  # fmt: skip
    rows = []
    for i, p in enumerate(probes):
        note = f"seen as {', '.join(dict.fromkeys(after.seen[i]))}" if after.seen else p.prompt
        rows.append((p.group, p.label, note, before.pictures[i], after.pictures[i]))
    buffer = io.BytesIO()
    before_after(rows).save(buffer, format="PNG")
    for name, data in (
        ("grid.png", buffer.getvalue()),
        ("report.json", json.dumps(table, indent=1).encode()),
        ("report.md", markdown(title, table).encode("utf-8", "replace")),
    ):
        with atomic_file(out / name, overwrite, batch) as f:
            f.write(data)
    return table


def literal(text: str) -> str:
    """Words as Markdown shows them: no emphasis, no tags, no links, no formulas."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", text)


def markdown(title: str, table: dict[str, Any]) -> str:
    """The report as a page: numbers, grid, words, settings."""
    lines = [f"# {literal(title)}", "", "Same seeds, same prompts, before and after:", "", "![before and after](grid.png)", ""]
    if table["after"]:
        lines += ["| | " + " | ".join(table["after"]) + " |", "|---" * (len(table["after"]) + 1) + "|"]
        for row in ("before", "after"):
            lines.append(f"| {row} | " + " | ".join(f"{table[row][k]:.3f}" for k in table["after"]) + " |")
        lines += [
            "",
            "Acc_e, Acc_g and residue (the concept, its synonyms, its associated phrases) should fall, Acc_s should stay.",
            "",
        ]
    lines += ["| prompts | pixel change (RMS) | value drift | embedding residue |", "|---|---|---|---|"]
    for group, change in table["picture_change"].items():
        numbers = (table.get(key, {}).get(group) for key in ("value_drift", "embedding_residue"))
        lines.append(f"| {group} | {change:.3f} | " + " | ".join("-" if n is None else f"{n:.3f}" for n in numbers) + " |")
    lines += ["", "Drift: how far W_V's output moves. Residue: how much of its way to the anchor's is left, 1 before the edit."]
    for note in table.get("notes", ()):
        lines += ["", literal(note)]
    for concept, words in table.get("named_neighbors", {}).items():
        lines += ["", f"Words that go with **{literal(concept)}**: " + (literal(", ".join(words)) or "none found") + "."]
    if table.get("files"):
        lines += ["", "Files: " + ", ".join(f"`{f}`" for f in table["files"]) + "."]
    facts = {k: table[k] for k in ("seconds", "condition", "rank") if k in table}
    lines += ["", "```json", json.dumps({**facts, "config": table.get("config", {})}, indent=1), "```", ""]
    return "\n".join(lines)
