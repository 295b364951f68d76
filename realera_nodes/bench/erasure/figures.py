"""Figures of a benchmark: methods beside each other on the same prompts and seeds, trade-offs, and surfaces of two settings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ErasureError
from ...formats.atomic import atomic_file
from .pictures import PictureStore
from .tables import Summary, write

#: settings of a surface by its name: RealEra's Figure 5
SURFACES = {"d-s": ("neighbors.d1", "neighbors.s2"), "m-n": ("neighbors.m", "neighbors.n")}
#: their values, if none are given
VALUES = {"d-s": ((0.3, 0.6, 0.9, 1.2), (0.5, 0.65, 0.8, 0.9)), "m-n": ((2, 5, 10, 20), (0, 10, 30, 60))}
#: prompts of a grid at most, by group
SHOWN = {"erased": 3, "synonym": 2, "associated": 2, "unseen": 1, "explicit": 4, "other": 3, "caption": 6}


def surface_methods(name: str, base: str, x: Sequence[float] = (), y: Sequence[float] = ()) -> dict[str, tuple[float, float]]:
    """Method names of a surface over ``base``, with their two values. ErasureError: no such surface, or one value for an axis."""
    if name not in SURFACES:
        raise ErasureError(f'there is no surface "{name}": choose one of {", ".join(SURFACES)}.')
    axes = tuple(tuple(given) or default for given, default in zip((x, y), VALUES[name], strict=True))
    if min(len(set(a)) for a in axes) < 2:
        raise ErasureError("a surface needs two values or more on each axis: give more of them.")
    first, second = SURFACES[name]
    return {f"{base}@{first}={_text(a)}@{second}={_text(b)}": (a, b) for a in axes[0] for b in axes[1]}


def _text(value: float) -> str:
    return f"{value:g}"


def draw_grid(path: Path, rows: Sequence[Mapping[str, Any]], store: PictureStore, case: str | None = None) -> None:
    """Rows of methods, columns of prompts, the first seed of each: of ``case``, or of the first one."""
    case = case or rows[0]["case"]
    own = [row for row in rows if row["case"] == case]
    if not own:
        raise ErasureError(f'no case is called "{case}": choose among {", ".join(dict.fromkeys(r["case"] for r in rows))}.')
    columns = _columns(own[0])
    plt = _pyplot()
    figure, axes = plt.subplots(len(own), len(columns), figsize=(1.25 * len(columns) + 1.2, 1.3 * len(own) + 0.9), dpi=110,
                                squeeze=False)  # fmt: skip
    for number, (line, row) in enumerate(zip(axes, own, strict=True)):
        pictures = store.read([row["picture"][i] for i in columns])
        for cell, i, picture in zip(line, columns, pictures, strict=True):
            cell.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if number == 0:
                cell.set_title(f"{row['group'][i]}\n{_wrapped(row['label'][i])}", fontsize=7)
        line[0].set_ylabel(_wrapped(row["method"], 18), fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(f"{own[0]['protocol']}: {case}, the same seeds for all", fontsize=9)
    _save(plt, figure, path)


def _columns(row: Mapping[str, Any]) -> list[int]:
    """Indices of the shots that are shown: the first seed of some prompts of each group."""
    found, seen = [], set()
    for group, most in SHOWN.items():
        count = 0
        for i, (g, prompt) in enumerate(zip(row["group"], row["prompt"], strict=True)):
            if g == group and prompt not in seen and count < most:
                seen.add(prompt)
                found.append(i)
                count += 1
    return found


def draw_tradeoff(path: Path, summary: Summary) -> bool:
    """Acc_s against Acc_g (Acc_e where nothing has synonyms) with intervals: up and left is better. False: nothing to draw."""
    across = next((n for n in ("Acc_g", "Acc_e", "CLIP_e") if all(n in summary.found[m] for m in summary.methods)), None)
    upward = "CLIP_s" if across == "CLIP_e" else "Acc_s"
    if across is None or not all(upward in summary.found[m] for m in summary.methods):
        return False
    scale = {c.name: c.scale for c in summary.columns}
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 5.2), dpi=110)
    for k, method in enumerate(summary.methods):
        x, y = summary.found[method][across], summary.found[method][upward]
        bars = [
            [[scale[n] * max(0.0, e.mean - e.low)], [scale[n] * max(0.0, e.high - e.mean)]] for n, e in ((across, x), (upward, y))
        ]
        color = f"C{k % 10}"
        axes.errorbar(scale[across] * x.mean, scale[upward] * y.mean, xerr=bars[0], yerr=bars[1], fmt="o^sDvP*X"[k % 8],
                      color=color, capsize=2, lw=0.8, label=method)  # fmt: skip
    axes.set_xlabel(f"{across} (lower is better)")
    axes.set_ylabel(f"{upward} (higher is better)")
    if across.startswith("Acc"):
        lowest = min(100 * summary.found[m][upward].low for m in summary.methods)
        axes.set(xlim=(-3, 103), ylim=(max(-3.0, min(lowest, 90.0) - 3), 102))
    axes.set_title("what goes and what stays, 95% intervals")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="best")
    _save(plt, figure, path)
    return True


def draw_surface(path: Path, name: str, methods: Mapping[str, tuple[float, float]], summary: Summary) -> None:
    """Acc_s - Acc_e over two settings as in RealEra's Figure 5, a map of the latent MSE of what stays, and all in surface.csv.

    Accuracies are coarse: where they are level, the distance of kept pictures still tells settings apart.
    """
    xs, ys = (sorted({point[i] for point in methods.values()}) for i in (0, 1))
    values = {m: {c.name: c.scale * summary.found[m][c.name].mean for c in summary.columns if c.name in summary.found[m]}
              for m in methods}  # fmt: skip
    for own in values.values():
        if {"Acc_e", "Acc_s"} <= own.keys():
            own["Acc_s-e"] = own["Acc_s"] - own["Acc_e"]
    names = list(dict.fromkeys(n for own in values.values() for n in own))
    lines = [
        [f"{x:g}", f"{y:g}", *(f"{values[m][n]:.6g}" if n in values[m] else "" for n in names)] for m, (x, y) in methods.items()
    ]
    write(path.with_suffix(".csv"), "".join(",".join(line) + "\n" for line in [["x", "y", *names], *lines]))
    panels = {"Acc_s-e": "Acc_s - Acc_e (percent)", "latent MSE": "latent MSE of what stays"}
    shown = [n for n in panels if n in names]
    plt = _pyplot()
    figure = plt.figure(figsize=(6 * len(shown), 5.2), dpi=110)
    for number, measure in enumerate(shown):
        z = np.full((len(ys), len(xs)), np.nan)
        for method, (x, y) in methods.items():
            z[ys.index(y), xs.index(x)] = values[method].get(measure, np.nan)
        # settings are spaced evenly: their values often grow by factors
        if measure == "Acc_s-e":
            axes: Any = figure.add_subplot(1, len(shown), number + 1, projection="3d")
            axes.plot_surface(
                np.arange(len(xs))[None], np.arange(len(ys))[:, None], z, cmap="viridis", edgecolor="#333333", lw=0.4
            )
            axes.set_zlim(min(np.nanmin(z), 90) - 1, 100)
        else:  # a map: its slopes run both ways, and would hide each other
            axes = figure.add_subplot(1, len(shown), number + 1)
            axes.imshow(z, cmap="viridis", origin="lower", aspect="auto")
            middle = (np.nanmin(z) + np.nanmax(z)) / 2
            for j, i in np.ndindex(z.shape):
                axes.text(i, j, f"{z[j, i]:.4f}", ha="center", va="center", color="black" if z[j, i] > middle else "white")
        axes.set_xticks(range(len(xs)), [_text(x) for x in xs])
        axes.set_yticks(range(len(ys)), [_text(y) for y in ys])
        axes.set_xlabel(SURFACES[name][0])
        axes.set_ylabel(SURFACES[name][1])
        axes.set_title(panels[measure])
    _save(plt, figure, path)


def _wrapped(text: str, width: int = 16) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["text.parse_math"] = False  # a name may hold dollars
    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        with atomic_file(path, overwrite=True) as f:
            f.write(buffer.getvalue())
    finally:
        plt.close(figure)
