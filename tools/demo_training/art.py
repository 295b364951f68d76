"""Stage 1a: drawings. Icons of the npm packages, rendered once to RGBA arrays.

Three sets give the pictures their natural styles (see ``pictures.STYLES``):
``twemoji`` (plain prompts), ``fluent-emoji`` (glossy 3d) and ``noto`` (storybook).
Icons that belong to no concept are rendered too: the VAE learns from them, and a tenth of
them is kept aside to measure it on drawings it never saw.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SETS = ("twemoji", "fluent-emoji", "noto")
SIZE = 128  # pixels of a stored drawing; pictures are 64x64, so this is 2x oversampled
FILLER_CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")


@dataclass
class IconSet:
    """One iconify package: its drawings by slug, aliases resolved."""

    name: str
    data: dict

    @classmethod
    def load(cls, node_modules: Path, name: str) -> IconSet:
        return cls(name, json.loads((node_modules / "@iconify-json" / name / "icons.json").read_text(encoding="utf-8")))

    def __contains__(self, slug: str) -> bool:
        return slug in self.data["icons"] or slug in self.data.get("aliases", {})

    def find(self, slug: str) -> dict:
        if slug in self.data["icons"]:
            return self.data["icons"][slug]
        if slug in self.data.get("aliases", {}):
            return self.find(self.data["aliases"][slug]["parent"])
        raise KeyError(f"{self.name} has no icon {slug!r}")

    def render(self, slug: str, size: int = SIZE) -> np.ndarray:
        """The drawing as uint8 RGBA of shape (size, size, 4), box-filtered from 3x."""
        icon = self.find(slug)
        default_w, default_h = self.data.get("width", 16), self.data.get("height", 16)
        view = (icon.get("left", 0), icon.get("top", 0), icon.get("width", default_w), icon.get("height", default_h))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, view))}" width="{3 * size}" height="{3 * size}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        return np.array(Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size), Image.Resampling.BOX))


def is_held_out(slug: str) -> bool:
    """A tenth of the filler icons, chosen by name so that the choice never moves."""
    return hashlib.sha256(slug.encode()).digest()[0] < 26


def render_all(node_modules: Path, slugs: list[str]) -> dict[str, np.ndarray]:
    """All drawings: ``concept`` (len(slugs), 3 sets), ``filler`` and ``held_out``, uint8 RGBA."""
    sets = [IconSet.load(node_modules, name) for name in SETS]
    concept = np.stack([np.stack([s.render(slug) for s in sets]) for slug in slugs])
    used = set(slugs)
    filler: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    # not every package sorts its icons into categories; the names are shared
    listed = node_modules / "@iconify-json" / SETS[0] / "metadata.json"
    categories = json.loads(listed.read_text(encoding="utf-8"))["categories"]
    members = sorted({slug for c in FILLER_CATEGORIES for slug in categories[c]})
    for icons in sets:
        for slug in members:
            # "cat", "automobile-2" ... beside a concept's own slug would leak its drawing into the held-out part
            related = any(slug.startswith(u) or u.startswith(slug) for u in used)
            if related or slug not in icons:
                continue
            (held_out if is_held_out(slug) else filler).append(icons.render(slug))
    return {"concept": concept, "filler": np.stack(filler), "held_out": np.stack(held_out)}
