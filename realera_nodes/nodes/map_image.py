"""The neighbor map as a picture, with Pillow alone: the host has no plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..neighborhood import Neighborhood, project

WIDTH, HEIGHT, MARGIN, LEGEND = 900, 640, 40, 74
COLORS = {"beyond": "#9db7d5", "neighbors": "#e8998d", "preserved": "#1b6e3c", "anchor": "#1b6e3c", "concept": "#b3261e"}
RED, GREY = "#b3261e", "#555555"


def points(around: Neighborhood) -> dict[str, Any]:
    """The map as plain values: 2-D points by role, words with whether they go with the concept."""
    near = set(around.mined.words)
    at = {role: [[round(v, 4) for v in p] for p in xy.tolist()] for role, xy in project(around).items()}
    return {
        "concept": around.concept.phrase,
        "anchor": around.concept.anchor,
        "points": at,
        "words": [{"word": w, "near": w in near} for w in around.words],
        "preserved": list(around.preserved),
    }


def draw(plain: Mapping[str, Any]) -> Image.Image:
    """What ``points`` returns, drawn."""
    at = plain["points"]
    everything = [p for xy in at.values() for p in xy]
    low = [min(p[k] for p in everything) for k in (0, 1)]
    high = [max(p[k] for p in everything) for k in (0, 1)]

    def place(p: list[float]) -> tuple[float, float]:
        x, y = ((p[k] - low[k]) / ((high[k] - low[k]) or 1) for k in (0, 1))
        return MARGIN + x * (WIDTH - 3 * MARGIN), HEIGHT - MARGIN - y * (HEIGHT - LEGEND - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for role, size in (("beyond", 4), ("neighbors", 5), ("words", 2), ("preserved", 3), ("anchor", 9), ("concept", 9)):
        names = {"words": [w["word"] for w in plain["words"]], "preserved": plain["preserved"]}.get(role)
        inks = [RED if w["near"] else GREY for w in plain["words"]] if role == "words" else None
        for i, p in enumerate(at[role]):
            x, y = place(p)
            ink = inks[i] if inks else COLORS[role]
            (pen.rectangle if role == "anchor" else pen.ellipse)((x - size, y - size, x + size, y + size), fill=ink)
            if names:
                pen.text((x + 5, y - 15), names[i], fill=ink, font=font)
    _legend(pen, font, plain)
    return image


def _legend(pen: ImageDraw.ImageDraw, font: Any, plain: Mapping[str, Any]) -> None:
    at = plain["points"]
    title = ImageFont.load_default(size=15)
    pen.text((MARGIN, 8), f'Around "{plain["concept"]}": words in red go with it, words in grey stay', fill="black", font=title)
    entries = [
        ("concept", f"concept: {plain['concept']}"), ("anchor", f"anchor: {plain['anchor']}"),
        ("neighbors", f"{len(at['neighbors'])} neighbor samples (erased)"),
        ("beyond", f"{len(at['beyond'])} beyond-concept samples (kept)"),
    ]  # fmt: skip
    x = MARGIN
    for role, text in entries:
        shape = pen.rectangle if role == "anchor" else pen.ellipse
        shape((x, 40, x + 10, 50), fill=COLORS[role])
        pen.text((x + 16, 38), text, fill="black", font=font)
        x += 34 + int(pen.textlength(text, font=font))
