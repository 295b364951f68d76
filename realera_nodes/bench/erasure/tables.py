"""A benchmark's rows as tables: table.md, table.csv, table.json, and pictures.csv, which says what each picture is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.atomic import atomic_file
from ..speed.measure import machine
from .measures import Column, Estimate, columns_of, estimates

ARROWS = {"up": " ↑", "down": " ↓", "": ""}


@dataclass(frozen=True)
class Summary:
    """A run's numbers.

    Attributes:
        methods: in the order in which they were asked for
        found: method -> column -> estimate over its cases
        cases: method -> case -> column -> number
    """

    columns: tuple[Column, ...]
    methods: tuple[str, ...]
    found: Mapping[str, Mapping[str, Estimate]]
    cases: Mapping[str, Mapping[str, Mapping[str, float]]]


def summarise(rows: Sequence[Mapping[str, Any]], accuracy: str = "top1", seed: int = 0) -> Summary:
    """Estimates of every method over its rows. ``seed``: of the bootstrap, the same for each method."""
    columns = columns_of(rows, accuracy)
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    found, cases = {}, {}
    for method, own in by_method.items():
        found[method], plain = estimates(own, columns, seed)
        cases[method] = {row["case"]: numbers for row, numbers in zip(own, plain, strict=True)}
    return Summary(tuple(columns), tuple(by_method), found, cases)


def markdown(title: str, summary: Summary, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: the table over all cases, one of the first overall score by case, and what was run."""
    shown = [c for c in summary.columns if c.shown]
    lines = [f"# {title}", "", "| method | " + " | ".join(c.name + ARROWS[c.goal] for c in shown) + " |",
             "|---" * (len(shown) + 1) + "|"]  # fmt: skip
    for method in summary.methods:
        own = summary.found[method]
        cells = [own[c.name].text(c) if c.name in own else "-" for c in shown]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    cases = list(next(iter(summary.cases.values())))
    score = next((c for c in shown if c.name in ("H_o", "H_c", "H_a")), None)
    if score is not None and len(cases) > 1:
        lines += ["", f"{score.name} by case:", "", "| method | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
        for method, numbers in summary.cases.items():
            values = [numbers.get(c, {}).get(score.name) for c in cases]
            cells = ["-" if v is None else f"{score.scale * v:.{score.digits}f}" for v in values]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    first = rows[0]
    pictures = len({key for row in rows for key in row["picture"]})
    s = first["sampler"]
    lines += [
        "", f"Means over {len(cases)} case(s) with 95% bootstrap intervals over cases, concepts and seeds; arrows say which "
        f"way is better. Scorer: {first['scorer']}; {pictures} pictures, DDIM, {s['steps']} steps, guidance {s['guidance']:g}, "
        f"{s['dtype']}. Seconds and memory (peak, model included) are those of erasing one case.", "",
        "Erased: " + "; ".join(", ".join(f"{c} -> {a}" for c, a in row["concepts"])
                               for row in {r["case"]: r for r in rows}.values()) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def as_csv(summary: Summary) -> str:
    """One line a method and case, and one a method over all cases with its bounds; numbers as shown, percent where scaled."""
    names = [c.name for c in summary.columns]
    lines: list[list[Any]] = [["method", "case", "bound", *names]]
    for method in summary.methods:
        for bound in ("mean", "low", "high"):
            own = summary.found[method]
            values = [getattr(own[c.name], bound) * c.scale if c.name in own else "" for c in summary.columns]
            lines.append([method, "all", bound, *values])
        for case, numbers in summary.cases[method].items():
            lines.append(
                [method, case, "mean", *(numbers[c.name] * c.scale if c.name in numbers else "" for c in summary.columns)]
            )
    return _csv(lines)


def as_json(summary: Summary, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """All numbers unscaled, each method's settings, and what the machine is."""
    settings: dict[str, Any] = {}
    for row in rows:
        settings.setdefault(row["method"], row["config"])
    table = {
        **facts, "machine": machine(), "sampler": rows[0]["sampler"], "scorer": rows[0]["scorer"],
        "methods": {
            method: {
                "all": {name: asdict(estimate) for name, estimate in summary.found[method].items()},
                "cases": summary.cases[method], "config": settings[method],
            }
            for method in summary.methods
        },
    }  # fmt: skip
    return json.dumps(table, indent=1)


def picture_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which picture answers which prompt of which method: for detectors that run elsewhere, and for looking."""
    names = ("group", "label", "prompt", "seed", "picture")
    lines: list[list[Any]] = [["method", "case", *names]]
    for row in rows:
        lines += [[row["method"], row["case"], *shot] for shot in zip(*(row[n] for n in names), strict=True)]
    return _csv(lines)


def write_tables(
    out: Path, title: str, rows: Sequence[Mapping[str, Any]], accuracy: str = "top1", facts: Mapping[str, Any] | None = None
) -> Summary:
    """Writes all tables under ``out``, over those of an earlier run."""
    summary = summarise(rows, accuracy)
    write(out / "table.md", markdown(title, summary, rows))
    write(out / "table.csv", as_csv(summary))
    write(out / "table.json", as_json(summary, rows, facts or {}))
    write(out / "pictures.csv", picture_list(rows))
    return summary


def write(path: Path, text: str) -> None:
    with atomic_file(path, overwrite=True) as f:
        f.write(text.encode())


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()
