"""The closed form for 1 to 1000 concepts: this project's one transform, the plain formula, and the operation count.

Rows: each concept has 3 prompts of 75 rows (77 tokens; the first two precede the concept) and 10 neighbors a prompt, so
2475 rows. Text states are random; they and the neighbors are drawn concept by concept, from seeds, outside of the clock:
text encoding and mining cost the same either way. Weights are random too and not counted as memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...core.closed_form import Grams, Transform, solve
from ...core.neighbors import NeighborConfig, sample_neighbors
from ...core.spans import ErasurePair, TextStates
from .measure import Clock, in_fresh_process, matmul_rate, peak_bytes, verdict
from .plain import FORMS, cost, kept_bytes, plain_edit

TOKENS, START, RIDGE = 77, 2, 1e-3
#: beyond it, the plain formula is measured in part
MEMORY = 8e9
GOAL, FLAT = 100, 1.25


@dataclass(frozen=True)
class Geometry:
    """Cross-attention of a model: context width d and the rows of every projection (K and V of a layer in turn)."""

    name: str
    width: int
    outs: tuple[int, ...]

    def spread(self, count: int) -> list[int]:
        """``count`` projections, evenly from first to last."""
        n = len(self.outs)
        return sorted({round((i + 0.5) * n / count - 0.5) for i in range(min(count, n))})

    def part(self, count: int) -> Geometry:
        return replace(self, outs=tuple(self.outs[i] for i in self.spread(count)))


def _of_layers(name: str, width: int, *layers: tuple[int, int]) -> Geometry:
    return Geometry(name, width, tuple(out for out, count in layers for _ in range(2 * count)))


GEOMETRIES = {
    "sd14": _of_layers("SD1.4", 768, (320, 2), (640, 2), (1280, 6), (640, 3), (320, 3)),
    "sdxl": _of_layers("SDXL", 2048, (640, 4), (1280, 60), (640, 6)),
}


@dataclass(frozen=True)
class Case:
    """One measurement's input."""

    geometry: Geometry
    concepts: int
    prompts: int = 3
    neighbors: int = 10

    @property
    def rows(self) -> int:
        return self.concepts * self.prompts * (1 + self.neighbors) * (TOKENS - START)


def concept_rows(case: Case, concept: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(e, e*) of a concept: for each prompt (1, 75, d), then its neighbors (10, 75, d)."""
    generator = torch.Generator().manual_seed(1 + concept)
    config = NeighborConfig(m=case.neighbors, n=0)

    def states() -> Tensor:
        return torch.randn(1, TOKENS, case.geometry.width, generator=generator)

    for _ in range(case.prompts):
        ids = [list(range(TOKENS))]
        text, anchor = TextStates(states(), ids), TextStates(states(), ids)
        pair = ErasurePair("", "", text, anchor, START, START + 1, anchor.states[0])
        yield pair.rows[0][None], pair.rows[1][None]
        if case.neighbors:
            sample = sample_neighbors(pair, config, generator)
            yield sample.neighbors[:, START:], sample.anchors[:, START:]


def weight(case: Case, index: int) -> Tensor:
    """Projection ``index``, (out, d): the same in every measurement."""
    out, d = case.geometry.outs[index], case.geometry.width
    return torch.randn(out, d, generator=torch.Generator().manual_seed(10_000_000 + index)) * d**-0.5


def our_transform(case: Case, clock: Clock) -> Transform:
    grams = Grams(case.geometry.width)
    for concept in range(case.concepts):
        for e, target in concept_rows(case, concept):
            with clock("grams"):
                grams.erase(e, target)
    with clock("solve"):
        return solve(grams, ridge=RIDGE)


def measure_ours(case: Case) -> dict[str, Any]:
    """Seconds by stage and growth of the resident set in bytes. To be run in a fresh process."""
    _warm_up()
    before, clock = peak_bytes(), Clock()
    transform = our_transform(case, clock)
    for i in range(len(case.geometry.outs)):
        w = weight(case, i)
        with clock("apply"):
            transform.delta(w)
    return {"seconds": sum(clock.seconds.values()), "stages": dict(clock.seconds), "memory": peak_bytes() - before}


def measure_plain(case: Case, concepts: int, layers: int, form: str) -> dict[str, Any]:
    """As ``measure_ours`` for the plain formula, scaled to the whole case from ``concepts`` concepts and ``layers`` projections.

    What grows with the rows is scaled by concepts and by operations, the inverse by operations alone, memory by the
    values that must be kept. ``difference``: largest over the layers of ||W_plain - W_ours|| / ||W_ours - W0||.
    """
    _warm_up()
    d, part = case.geometry.width, replace(case, concepts=concepts)
    chosen = case.geometry.spread(layers)
    outs = [case.geometry.outs[i] for i in chosen]
    weights = [weight(case, i) for i in chosen]
    before, clock = peak_bytes(), Clock()
    erased, targets = [], []
    for concept in range(concepts):
        rows = list(concept_rows(part, concept))
        erased.append(torch.cat([e for e, _ in rows]))
        targets.append(torch.cat([target for _, target in rows]))
    mu = RIDGE * sum(float(e.square().sum()) for e in erased) / d
    edited = plain_edit(weights, erased, targets, mu, form, clock)
    memory = peak_bytes() - before

    share = sum(cost(out, d, form) for out in case.geometry.outs) / sum(cost(out, d, form) for out in outs)
    stages = {"rows": clock.seconds["rows"] * share * case.concepts / concepts, "inverse": clock.seconds["inverse"] * share}
    kept = kept_bytes(case.rows, d, case.geometry.outs) - kept_bytes(part.rows, d, outs)
    transform = our_transform(part, Clock())
    deltas = [transform.delta(w) for w in weights]
    gaps = [float((new - w - delta).norm() / delta.norm()) for new, w, delta in zip(edited, weights, deltas, strict=True)]
    return {
        "seconds": sum(stages.values()), "stages": stages, "measured_seconds": sum(clock.seconds.values()),
        "memory": memory + kept, "layers": len(chosen), "concepts": concepts, "difference": max(gaps),
    }  # fmt: skip


def _warm_up() -> None:
    """Threads, libraries and the allocator's first pages are not the method's."""
    a = torch.randn(256, 256)
    for x in (a, a.double()):
        torch.linalg.eigvalsh(x @ x.T)
        torch.linalg.inv(x)
    torch.linalg.cholesky((a @ a.T + 256 * torch.eye(256)).double())


def fitting(case: Case, per_unit: float, form: str, budget: float) -> tuple[int, int]:
    """(concepts, layers) of the plain formula to measure: all if it fits ``budget`` seconds and MEMORY, else a quarter of it.

    Layers are left out first, then concepts. ``per_unit``: seconds of one unit of ``cost`` for one concept.
    """
    g = case.geometry

    def fits(concepts: int, layers: int, seconds: float) -> bool:
        part = g.part(layers)
        time = per_unit * concepts * sum(cost(out, g.width, form) for out in part.outs)
        rows = concepts * case.rows // case.concepts
        return time <= seconds and kept_bytes(rows, g.width, part.outs) <= MEMORY

    if fits(case.concepts, len(g.outs), budget):
        return case.concepts, len(g.outs)
    for layers in range(len(g.outs) - 1, 0, -1):
        if fits(case.concepts, layers, budget / 4):
            return case.concepts, layers
    return next((c for c in range(case.concepts - 1, 1, -1) if fits(c, 1, budget / 4)), 1), 1


def limit(case: Case, rates: dict[str, float]) -> dict[str, float]:
    """Operations of the transform, and the seconds they take at the machine's measured matrix product rates.

    float64: two Grams, 4 d^2 a row; Cholesky d^3 / 3 and its solve 2 d^3; eigenvalues 4 d^3 / 3. float32: W0 T, 2 d^2 a
    row of W0.
    """
    d = case.geometry.width
    double = 4.0 * d**2 * case.rows + (1 / 3 + 2 + 4 / 3) * d**3
    single = 2.0 * d**2 * sum(case.geometry.outs)
    return {"float64": double, "float32": single, "seconds": double / rates["float64"] + single / rates["float32"]}


def _repeated(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the middle time, with all times beside it."""
    times = [run["seconds"] for run in runs]
    middle = min(runs, key=lambda run: abs(run["seconds"] - median(times)))
    return {**middle, "repeats": len(runs), "all_seconds": times}


def run(
    models: Sequence[Geometry], concepts: Sequence[int], repeats: int, budget: float, console: Console, neighbors: int = 10,
    rate_size: int = 2048,
) -> dict[str, Any]:  # fmt: skip
    """All cases, ours and plain in turn; what takes longer than a third of ``budget`` is run once."""
    rates = {str(t).split(".")[-1]: matmul_rate(t, rate_size) for t in (torch.float64, torch.float32)}
    rows: list[dict[str, Any]] = []
    for geometry in models:
        one = Case(geometry, 1, neighbors=neighbors)
        per_unit = {}
        for form in FORMS:
            console.print(f"{geometry.name}: trying one layer of the plain formula ({form})")
            pilot = in_fresh_process(measure_plain, one, 1, 1, form)["measured_seconds"]
            per_unit[form] = pilot / cost(geometry.outs[geometry.spread(1)[0]], geometry.width, form)
        for count in concepts:
            case = replace(one, concepts=count)
            plans = {form: fitting(case, per_unit[form], form, budget) for form in FORMS}
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{form: [] for form in FORMS}}
            for i in range(repeats):
                for name, done in runs.items():
                    if i and done[0].get("measured_seconds", done[0]["seconds"]) > budget / 3:
                        continue
                    console.print(f"{geometry.name}, {count} concepts, run {i + 1}: {name}")
                    done.append(
                        in_fresh_process(measure_ours, case)
                        if name == "ours"
                        else in_fresh_process(measure_plain, case, *plans[name], name)
                    )
            row = {name: _repeated(done) for name, done in runs.items()}
            rows.append({"model": geometry.name, "concepts": count, "rows": case.rows, "limit": limit(case, rates), **row})
    for each in tables(rows, {g.name: len(g.outs) for g in models}):
        console.print(each)
    for row in rows:
        if row["concepts"] == 100:
            ratio = row["public"]["seconds"] / row["ours"]["seconds"]
            console.print(f"{row['model']}: {ratio:.0f} times as fast as the public form at 100 concepts "
                          f"(goal {GOAL}): {verdict(ratio >= GOAL)}")  # fmt: skip
    for g in models:
        sizes = [row["ours"]["memory"] for row in rows if row["model"] == g.name]
        growth = max(sizes) / max(sizes[0], 1)
        console.print(
            f"{g.name}: memory at most {growth:.2f} times that of the first case (goal {FLAT}): {verdict(growth <= FLAT)}"
        )
    return {"rates": rates, "geometries": [asdict(g) for g in models], "rows": rows}


def tables(rows: Sequence[dict[str, Any]], layers: dict[str, int]) -> tuple[Table, Table]:
    """Ours against the operation count, and the plain formula against ours. ``layers``: projections by model."""
    ours = Table(title="Closed form: seconds without text encoding; memory is growth of the resident set")
    for name in ("model", "concepts", "rows", "ours", "memory", "limit", "ours / limit", "runs"):
        ours.add_column(name, justify="right")
    plain = Table(title="The plain formula in float32")
    for name in ("model", "concepts", "form", "seconds", "memory", "/ ours", "differs", "what was run"):
        plain.add_column(name, justify="right")
    for row in rows:
        mine, bound = row["ours"], row["limit"]["seconds"]
        ours.add_row(row["model"], str(row["concepts"]), f"{row['rows']:,}", f"{mine['seconds']:.2f} s",
                     f"{mine['memory'] / 1e6:.0f} MB",
                     f"{bound:.2f} s", f"{mine['seconds'] / bound:.2f}", str(mine["repeats"]))  # fmt: skip
        for form in FORMS:
            r, whole = row[form], layers[row["model"]]
            part = r["layers"] < whole or r["concepts"] < row["concepts"]
            what = (
                f"extrapolated from {r['layers']} of {whole} layers, {r['concepts']} concepts"
                if part
                else f"all, {r['repeats']} runs"
            )
            plain.add_row(row["model"], str(row["concepts"]), form, f"{r['seconds']:.1f} s", f"{r['memory'] / 1e9:.2f} GB",
                          f"{r['seconds'] / mine['seconds']:.0f}x", f"{r['difference']:.0e}", what)  # fmt: skip
    return ours, plain
