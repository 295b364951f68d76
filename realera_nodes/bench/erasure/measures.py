"""Numbers of a table from the measures of single pictures, with 95% intervals by bootstrap.

A method's number is the mean over cases of each case's own, as in the papers: H_o of ten classes is the mean of ten H_o, not H_o
of the mean accuracies. For the intervals cases are drawn anew, in each case the concepts that its prompts belong to (where
several are erased at once), and the seeds, which all prompts of a case share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.metrics import h_a, h_c, h_o

ACCURACIES = ("top1", "probability")
DRAWS, SHARE = 1000, 0.95
#: groups whose pictures should be those of the original
STAYS = ("other", "caption")
Array = np.ndarray


@dataclass(frozen=True)
class Column:
    """One number of a table.

    Attributes:
        goal: "up", "down" or ""
        sources: (group, measure) of the means that ``combine`` takes, or ("", name) for a number of the whole row
        total: sum over pictures instead of mean
        scale, digits: for showing
        shown: in the Markdown table; all are in the others
    """

    name: str
    goal: str
    sources: tuple[tuple[str, str], ...]
    combine: Callable[..., Any] = lambda x: x
    total: bool = False
    scale: float = 100.0
    digits: int = 1
    shown: bool = True


@dataclass(frozen=True)
class Estimate:
    """Mean with the bounds of its 95% interval, unscaled."""

    mean: float
    low: float
    high: float

    def text(self, column: Column) -> str:
        a, b, c = (f"{column.scale * x:.{column.digits}f}" for x in (self.mean, self.low, self.high))
        return a if b == c == a else f"{a} [{b}, {c}]"


def _each(formula: Callable[..., float]) -> Callable[..., Any]:
    """A formula of numbers for arrays of draws."""
    return np.vectorize(formula, otypes=[float])


def _share(hits: Any, faces: Any) -> Any:
    """Hits among pictures with a face; none is recognised where there is no face at all."""
    return np.where(np.asarray(faces) > 0, hits / np.maximum(faces, 1e-12), 0.0)


def columns_of(rows: Sequence[Mapping[str, Any]], accuracy: str = ACCURACIES[0]) -> list[Column]:
    """All columns that rows have the measures for. ``accuracy``: which definition is shown; the other stands beside it."""
    there = {
        (g, m) for row in rows for m, v in row["values"].items() for g, x in zip(row["group"], v, strict=True) if x is not None
    }
    found: list[Column] = []
    for measure in sorted(ACCURACIES, key=lambda m: m != accuracy):
        found += _accuracies(there, measure, measure == accuracy)
    if any(m == "face" for _, m in there):
        for group, name in (("erased", "no face, erased"), ("other", "no face, kept")):
            if (group, "face") in there:
                found.append(Column(name, "", ((group, "face"),), lambda x: 1 - x))
    clips = {"erased": ("CLIP_e", "down"), "other": ("CLIP_s", "up"), "synonym": ("CLIP_g", "down"), "caption": ("CLIP", "up")}
    found += [
        Column(name, goal, ((g, "clip"),), scale=1.0, digits=2) for g, (name, goal) in clips.items() if (g, "clip") in there
    ]
    if {("erased", "clip"), ("other", "clip")} <= there:
        found.append(Column("H_a", "up", (("erased", "clip"), ("other", "clip")), _each(h_a), scale=1.0, digits=2))
    for _, measure in sorted({(g, m) for g, m in there if "@" in m}, key=lambda s: (s[1].partition("@")[2] != "0.6", s[1])):
        shown = measure.startswith("total") or measure.endswith("@0.6")
        found.append(Column(measure, "down", (("explicit", measure),), total=True, scale=1.0, digits=0, shown=shown))
    for group in STAYS:
        for measure in ("pixel", "latent"):
            if (group, measure) in there:
                found.append(Column(f"{measure} MSE", "down", ((group, measure),), scale=1.0, digits=4))
    for name, scale, digits in (("FID", 1.0, 2), ("seconds", 1.0, 1), ("memory", 2**-20, 0)):
        if any(row["row"].get(name) is not None for row in rows):
            found.append(Column("MB" if name == "memory" else name, "down", (("", name),), scale=scale, digits=digits))
    return found


def _accuracies(there: set[tuple[str, str]], measure: str, shown: bool) -> list[Column]:
    tail = "" if shown else f" ({'top-1' if measure == 'top1' else measure})"
    faces = any(m == "face" for _, m in there)

    def of(*groups: str) -> tuple[tuple[str, str], ...]:
        return tuple((g, m) for g in groups for m in ((measure, "face") if faces else (measure,)))

    def accuracy(values: Sequence[Any]) -> list[Any]:
        return [_share(*values[i : i + 2]) for i in range(0, len(values), 2)] if faces else list(values)

    columns = {"Acc_e": ("down", "erased"), "Acc_s": ("up", "other"), "Acc_g": ("down", "synonym"),
               "residue": ("down", "associated"), "unseen": ("down", "unseen"), "Acc": ("up", "caption")}  # fmt: skip
    found = [
        Column(name + tail, goal, of(group), lambda *v: accuracy(v)[0], shown=shown)
        for name, (goal, group) in columns.items()
        if (group, measure) in there
    ]
    means: tuple[tuple[str, Callable[..., float], tuple[str, ...]], ...] = (
        ("H_o", h_o, ("erased", "other", "synonym")),
        ("H_c", h_c, ("erased", "other")),
    )
    for name, formula, groups in means:
        if all((g, measure) in there for g in groups):
            together = _each(formula)
            column = Column(name + tail, "up", of(*groups), lambda *v, f=together: f(*accuracy(v)), shown=shown)
            place = next((i for i, c in enumerate(found) if c.name.startswith("residue")), len(found))
            found.insert(place, column)
            break  # H_c is for what has no synonyms
    return found


@dataclass(frozen=True)
class _Group:
    """A measure of a group's prompts at their seeds: values (asks, seeds), and each ask's cluster."""

    values: Array
    clusters: tuple[str, ...]

    def mean(self, weights: Array, seeds: Array) -> Array:
        """Weighted means (draws,); ``weights`` (draws, asks), ``seeds`` (draws, seeds)."""
        top = np.einsum("ra,as,rs->r", weights, self.values, seeds, optimize=True)
        return top / (weights.sum(1) * seeds.sum(1))


def _groups(row: Mapping[str, Any]) -> dict[tuple[str, str], _Group]:
    """Of each (group, measure)."""
    found = {}
    for measure, values in row["values"].items():
        asks: dict[str, dict[tuple[str, str], list[float]]] = {}
        for group, cluster, prompt, value in zip(row["group"], row["cluster"], row["prompt"], values, strict=True):
            if value is not None:
                asks.setdefault(group, {}).setdefault((cluster, prompt), []).append(value)
        for group, lists in asks.items():
            # all prompts of a group are drawn at as many seeds
            found[group, measure] = _Group(np.array(list(lists.values()), dtype=float), tuple(c for c, _ in lists))
    return found


def estimates(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], seed: int = 0, draws: int = DRAWS
) -> tuple[dict[str, Estimate], list[dict[str, float]]]:
    """A method's estimates by column over its rows, one a case; and each case's own numbers. Same rows and seed, same bounds."""
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, Array]] = []
    plain: list[dict[str, float]] = []
    for row in rows:
        groups, one = _groups(row), _Draws(rng, draws)
        drawn.append({c.name: x for c in columns if (x := _value(c, row, groups, one)) is not None})
        plain.append({c.name: float(x[0]) for c in columns if (x := _value(c, row, groups, _Plain())) is not None})
    cases = _counts(rng, draws, len(rows))
    found = {}
    for c in columns:
        there = [i for i, d in enumerate(drawn) if c.name in d]
        if not there:
            continue
        weights: Array = cases[:, there].astype(float)
        weights[weights.sum(1) == 0] = 1.0  # a draw without any case that has the number says nothing of it
        means = (weights * np.stack([drawn[i][c.name] for i in there], 1)).sum(1) / weights.sum(1)
        low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        found[c.name] = Estimate(float(np.mean([plain[i][c.name] for i in there])), float(low), float(high))
    return found, plain


def _value(column: Column, row: Mapping[str, Any], groups: Mapping[tuple[str, str], _Group], draw: Any) -> Array | None:
    """The column's value at each draw, or None where the row has not what it takes."""
    if column.sources[0][0] == "":
        value = row["row"].get(column.sources[0][1])
        return None if value is None else np.full(draw.count, float(value))
    if not all(source in groups for source in column.sources):
        return None
    means = [g.mean(draw.clusters(g.clusters), draw.seeds(g.values.shape[1])) for g in (groups[s] for s in column.sources)]
    size = groups[column.sources[0]].values.size if column.total else 1
    return np.asarray(column.combine(*means), dtype=float) * size


def _counts(rng: np.random.Generator, draws: int, n: int) -> Array:
    """How often each of n things is in each draw of n with replacement, (draws, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), draws)


class _Draws:
    """A case's draws: groups over the same concepts, or with as many seeds, share theirs."""

    def __init__(self, rng: np.random.Generator, count: int):
        self.rng, self.count = rng, count
        self._clusters: dict[tuple[str, ...], dict[str, Array]] = {}
        self._seeds: dict[int, Array] = {}

    def clusters(self, names: tuple[str, ...]) -> Array:
        kinds = tuple(sorted(set(names)))
        if kinds not in self._clusters:
            self._clusters[kinds] = dict(zip(kinds, _counts(self.rng, self.count, len(kinds)).T, strict=True))
        return np.stack([self._clusters[kinds][n] for n in names], 1).astype(float)

    def seeds(self, n: int) -> Array:
        if n not in self._seeds:
            self._seeds[n] = _counts(self.rng, self.count, n).astype(float)
        return self._seeds[n]


class _Plain:
    """Everything once: the numbers themselves."""

    count = 1

    def clusters(self, names: tuple[str, ...]) -> Array:
        return np.ones((1, len(names)))

    def seeds(self, n: int) -> Array:
        return np.ones((1, n))
