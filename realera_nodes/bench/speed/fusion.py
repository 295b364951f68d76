"""Fusing 1 to 100 LoRAs: this project's streamed sums, and the plain formula with all text states kept.

Each LoRA has rank 1 in every projection and 30 prompts of 77 rows, so 2310 rows; the fusion starts from refined weights
W' = W + W X and keeps a prior. Text states, LoRAs and weights are random and drawn from seeds outside of the clock, as
encoding and training cost the same either way; weights are not counted as memory. Our time includes the new weights of all
projections, one at a time; W' itself is never made, so that this product takes the place of the refinement's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...core.adapters import Factors
from ...core.closed_form import Transform
from ...core.fusion import Fused, Fusion
from ...core.refinement import RefinementConfig
from .closed_form import TOKENS, Case, Geometry, _repeated, _warm_up, fitting, weight
from .measure import Clock, in_fresh_process, peak_bytes, verdict
from .plain import FORMS, cost, kept_bytes, plain_fusion

GOAL = 200
#: growth of memory with each LoRA, as a share of the plain formula's
FLAT = 0.01
#: the prior is a full-rank sum of its own: no ridge, which the plain formula does not have
CONFIG = RefinementConfig(lambda_2=1.0, prior_rows=1.0, ridge=0.0)


@dataclass(frozen=True)
class FusionCase(Case):
    """``concepts`` LoRAs with their prompts."""

    prompts: int = 30
    neighbors: int = 0
    rank: int = 1

    @property
    def rows(self) -> int:
        return self.concepts * self.prompts * TOKENS

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {f"{i:03}.attn2": (out, self.geometry.width) for i, out in enumerate(self.geometry.outs)}


def concept_states(case: FusionCase, concept: int) -> Tensor:
    """(prompts, 77, d)."""
    generator = torch.Generator().manual_seed(1 + concept)
    return torch.randn(case.prompts, TOKENS, case.geometry.width, generator=generator)


def concept_lora(case: FusionCase, concept: int) -> Factors:
    """A LoRA as large as a tenth of the weights."""
    generator = torch.Generator().manual_seed(1_000_000 + concept)
    return {
        name: (torch.randn(case.rank, d, generator=generator), 0.1 * d**-0.5 * torch.randn(out, case.rank, generator=generator))
        for name, (out, d) in case.shapes.items()
    }


def refinement(case: FusionCase) -> Transform:
    d = case.geometry.width
    return Transform(0.1 * d**-0.5 * torch.randn(d, d, generator=torch.Generator().manual_seed(7)).double(), 1.0, 0.0)


def prior(case: FusionCase) -> Tensor:
    """sum p p^T of 4 d rows."""
    d = case.geometry.width
    p = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(8)).double()
    return p.T @ p


def our_fusion(case: FusionCase, start: Transform, kept: Tensor, clock: Clock) -> Fused:
    fusion = Fusion(case.shapes)
    for concept in range(case.concepts):
        states, factors = concept_states(case, concept), concept_lora(case, concept)
        with clock("add"):
            fusion.add(factors, [states])
    with clock("solve"):
        return fusion.solve(CONFIG, kept, refinement=start)


def measure_ours(case: FusionCase) -> dict[str, Any]:
    """Seconds by stage and growth of the resident set in bytes. To be run in a fresh process."""
    _warm_up()
    start, kept = refinement(case), prior(case)
    before, clock = peak_bytes(), Clock()
    fused = our_fusion(case, start, kept, clock)
    for i, name in enumerate(case.shapes):
        w = weight(case, i)
        with clock("apply"):
            fused.delta(name, w)
    return {"seconds": sum(clock.seconds.values()), "stages": dict(clock.seconds), "memory": peak_bytes() - before}


def measure_plain(case: FusionCase, concepts: int, layers: int, form: str) -> dict[str, Any]:
    """As ``measure_ours`` for the plain formula in float32, scaled to the whole case as in ``closed_form.measure_plain``."""
    _warm_up()
    d, part = case.geometry.width, replace(case, concepts=concepts)
    chosen = case.geometry.spread(layers)
    outs, names = [case.geometry.outs[i] for i in chosen], [list(case.shapes)[i] for i in chosen]
    start, kept = refinement(case), prior(case)
    weights = [weight(case, i) for i in chosen]
    refined = [w + start.delta(w) for w in weights]
    before, clock = peak_bytes(), Clock()
    states = [concept_states(part, i) for i in range(concepts)]
    loras = [[concept_lora(part, i)[name] for name in names] for i in range(concepts)]
    fused_weights = plain_fusion(weights, refined, loras, states, kept.float(), form, clock)
    memory = peak_bytes() - before

    share = sum(cost(out, d, form) for out in case.geometry.outs) / sum(cost(out, d, form) for out in outs)
    stages = {"rows": clock.seconds["rows"] * share * case.concepts / concepts, "inverse": clock.seconds["inverse"] * share}
    missing = kept_bytes(case.rows, d, case.geometry.outs, 1) - kept_bytes(part.rows, d, outs, 1)
    fused = our_fusion(part, start, kept, Clock())
    deltas = [fused.delta(name, w) for name, w in zip(names, weights, strict=True)]
    gaps = [float((new - w - delta).norm() / delta.norm()) for new, w, delta in zip(fused_weights, weights, deltas, strict=True)]
    return {
        "seconds": sum(stages.values()), "stages": stages, "measured_seconds": sum(clock.seconds.values()),
        "memory": memory + missing, "layers": len(chosen), "concepts": concepts, "difference": max(gaps),
    }  # fmt: skip


def run(
    geometry: Geometry, loras: Sequence[int], repeats: int, budget: float, console: Console, prompts: int = 30
) -> dict[str, Any]:
    """All cases, ours and plain in turn; a plain run that takes longer than a third of ``budget`` is done once."""
    one = FusionCase(geometry, 1, prompts=prompts)
    per_unit = {}
    for form in FORMS:
        console.print(f"{geometry.name}: trying one layer of the plain formula ({form})")
        pilot = in_fresh_process(measure_plain, one, 1, 1, form)["measured_seconds"]
        per_unit[form] = pilot / cost(geometry.outs[geometry.spread(1)[0]], geometry.width, form)
    rows: list[dict[str, Any]] = []
    for count in loras:
        case = replace(one, concepts=count)
        plans = {form: fitting(case, per_unit[form], form, budget) for form in FORMS}
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{form: [] for form in FORMS}}
        for i in range(repeats):
            for name, done in runs.items():
                if i and done[0].get("measured_seconds", done[0]["seconds"]) > budget / 3:
                    continue
                console.print(f"{geometry.name}, {count} LoRAs, run {i + 1}: {name}")
                done.append(
                    in_fresh_process(measure_ours, case)
                    if name == "ours"
                    else in_fresh_process(measure_plain, case, *plans[name], name)
                )
        rows.append({"loras": count, "rows": case.rows, **{name: _repeated(done) for name, done in runs.items()}})
    console.print(table(rows, len(geometry.outs)))
    for row in rows:
        ratio = row["public"]["seconds"] / row["ours"]["seconds"]
        console.print(
            f"{row['loras']} LoRAs: {ratio:.0f} times as fast as the public form (goal {GOAL}): {verdict(ratio >= GOAL)}"
        )
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        mine, plain = (
            (last[name]["memory"] - first[name]["memory"]) / (last["loras"] - first["loras"]) for name in ("ours", "public")
        )
        console.print(
            f"memory grows by {mine / 1e6:.2f} MB a LoRA, which is its factors; the plain formula's by {plain / 1e6:.0f} MB "
            f"(goal: {FLAT:.0%} of it): {verdict(mine <= FLAT * plain)}"
        )
    return {"geometry": asdict(geometry), "rows": rows}


def table(rows: Sequence[dict[str, Any]], layers: int) -> Table:
    """Ours and the plain formula in both forms. ``layers``: projections of the model."""
    found = Table(title="Fusion: seconds without text encoding; memory is growth of the resident set")
    for name in ("LoRAs", "rows", "form", "seconds", "memory", "/ ours", "differs", "what was run"):
        found.add_column(name, justify="right")
    for row in rows:
        mine = row["ours"]
        found.add_row(str(row["loras"]), f"{row['rows']:,}", "ours", f"{mine['seconds']:.2f} s", f"{mine['memory'] / 1e6:.0f} MB",
                      "", "", f"all, {mine['repeats']} runs")  # fmt: skip
        for form in FORMS:
            r = row[form]
            part = r["layers"] < layers or r["concepts"] < row["loras"]
            what = (
                f"extrapolated from {r['layers']} of {layers} layers, {r['concepts']} LoRAs"
                if part
                else f"all, {r['repeats']} runs"
            )
            found.add_row("", "", form, f"{r['seconds']:.1f} s", f"{r['memory'] / 1e6:.0f} MB",
                          f"{r['seconds'] / mine['seconds']:.0f}x", f"{r['difference']:.0e}", what)  # fmt: skip
    return found
