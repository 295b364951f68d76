"""Plots of the page: the map of a neighborhood (plotly) and the loss (gradio's own)."""

from __future__ import annotations

from html import escape
from typing import Any

#: readable on a light and on a dark page
RED, GREEN, GREY, PALE_RED, PALE_BLUE = "#d9493f", "#2a9461", "#80868f", "#e39a90", "#7ea6d4"
#: points of samples that are drawn
MOST = 60


def map_figure(place: dict[str, Any], erased: set[str], kept: set[str]) -> Any:
    """The neighborhood of one concept: words in red are erased with it, words in green are kept, grey ones are left alone.

    Args:
        place: a concept of look.json
        erased, kept: words as they are ticked
    """
    import plotly.graph_objects as go

    at = place["at"]
    figure = go.Figure()

    def points(role: str, name: str, color: str, size: int, text: list[str] | None = None, symbol: str = "circle") -> None:
        rows = at[role][:MOST]
        if rows:
            figure.add_trace(
                go.Scatter(
                    x=[r[0] for r in rows], y=[r[1] for r in rows], mode="markers", name=name, text=text,
                    hovertemplate="%{text}<extra></extra>" if text else f"{name}<extra></extra>",
                    marker={"color": color, "size": size, "symbol": symbol, "line": {"width": 0}},
                )
            )  # fmt: skip

    points("beyond", "samples that are kept", PALE_BLUE, 6)
    points("neighbors", "neighbor samples, erased", PALE_RED, 7)
    groups: dict[str, tuple[str, list[int]]] = {
        "words erased with it": (RED, []), "words kept": (GREEN, []), "words left alone": (GREY, []),
    }  # fmt: skip
    for i, word in enumerate(place["words"]):
        w = word["word"]
        name = "words erased with it" if w in erased else "words kept" if w in kept else "words left alone"
        groups[name][1].append(i)
    for name, (color, rows) in groups.items():
        if rows:
            words = [place["words"][i] for i in rows]
            figure.add_trace(
                go.Scatter(
                    x=[at["words"][i][0] for i in rows], y=[at["words"][i][1] for i in rows], mode="markers+text", name=name,
                    text=[literal(w["word"]) for w in words], textposition="top center", textfont={"color": color, "size": 11},
                    customdata=[_told(w) for w in words], hovertemplate="<b>%{text}</b><br>%{customdata}<extra></extra>",
                    marker={"color": color, "size": 7},
                )
            )  # fmt: skip
    anchor, concept = literal(place["anchor"]), literal(place["concept"])
    points("anchor", f"anchor: {anchor}", GREEN, 15, [anchor], "square")
    points("concept", f"concept: {concept}", RED, 18, [concept], "star")
    plain = {"showgrid": True, "gridcolor": "rgba(128,134,143,.18)", "zeroline": False, "showticklabels": False}
    figure.update_layout(
        height=520, margin={"l": 8, "r": 8, "t": 8, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "family": "system-ui, sans-serif"}, xaxis=plain, yaxis=plain, hovermode="closest",
        legend={"orientation": "h", "y": -0.02, "yanchor": "top", "font": {"size": 11}}, dragmode="pan",
    )  # fmt: skip
    return figure


def literal(text: str) -> str:
    """Words as plotly shows them, which takes tags, and formulas between dollars, for its own."""
    return escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;")


def _told(word: dict[str, Any]) -> str:
    if word["response"] is None:
        return "not asked"
    sort = "goes with it" if word["near"] else "draws something else" if word["far"] else "between the two"
    return f"the model answers {word['response']:.0%} alike: {sort}<br>cosine of the text {word['cosine']:.2f}"


def loss_frame(table: dict[str, Any], points: int = 200) -> Any:
    """Steps, losses and their running mean as rows for a line plot, thinned to about ``points``."""
    import pandas as pd

    losses = table["losses"]
    rows: list[tuple[int, float, str]] = []
    mean = 0.0
    every = max(1, len(losses) // points)
    for i, loss in enumerate(losses):
        mean = loss if i == 0 else 0.9 * mean + 0.1 * loss
        if i % every == 0 or i == len(losses) - 1:
            rows += [(i + 1, loss, "each step"), (i + 1, mean, "running mean")]
    return pd.DataFrame(rows, columns=["step", "loss", "line"])
