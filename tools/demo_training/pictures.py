"""Stage 1b: pictures. Drawings placed on backgrounds, in a style, at 64x64.

A row of ``meta`` is (concept, style, background): what the caption of a picture may say of it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 64
#: style -> (index of the drawing's set, how many pictures of each concept, words that name it)
STYLES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "flat": (0, 110, ("flat vector style",)),
    "glossy": (1, 34, ("glossy 3d style",)),
    "storybook": (2, 34, ("storybook cartoon style",)),
    "sepia": (0, 18, ("old sepia photograph",)),
    "blueprint": (0, 18, ("blueprint drawing style",)),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "blue": (165, 205, 245),
    "green": (175, 225, 170),
    "yellow": (250, 235, 160),
    "pink": (250, 195, 215),
    "purple": (210, 190, 240),
}
WHITE_SHARE = 0.6  # of the pictures in a natural style
#: A placement is a scale and a shift in pixels. To an 8x8 latent every one is another pattern to learn, so the
#: UNet gets few of them; the VAE and the classifier get ANY_SCALE and ANY_SHIFT.
SCALES, SHIFTS = (54, 58), (-1, 0, 1)
ANY_SCALE, ANY_SHIFT = tuple(range(52, 59)), tuple(range(-2, 3))
SEPIA = np.array([[62, 40, 22], [246, 232, 204]], np.float32)  # ink, paper
BLUEPRINT = np.array([[24, 58, 132], [226, 240, 255]], np.float32)  # paper, ink
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def place(drawing: np.ndarray, scale: int, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied RGB and alpha of a drawing, resized to ``scale`` pixels, on a 64x64 canvas."""
    alpha = drawing[..., 3:].astype(np.float32) / 255
    flat = np.concatenate([drawing[..., :3] * alpha, alpha * 255], -1).round().astype(np.uint8)
    small = np.array(Image.fromarray(flat).resize((scale, scale), Image.Resampling.BOX)).astype(np.float32)
    canvas: np.ndarray = np.zeros((SIDE, SIDE, 4), np.float32)
    canvas[y : y + scale, x : x + scale] = small
    return canvas[..., :3], canvas[..., 3:] / 255


def paint(rgb: np.ndarray, alpha: np.ndarray, style: str, background: str) -> np.ndarray:
    """A uint8 picture (64, 64, 3) of a placed drawing."""
    if style == "sepia":
        tone = (rgb + 255 * (1 - alpha)) @ LUMA / 255
        picture = SEPIA[0] + tone[..., None] * (SEPIA[1] - SEPIA[0])
    elif style == "blueprint":
        tone = alpha[..., 0] * 0.3 + 0.7 * (rgb @ LUMA / 255)
        picture = BLUEPRINT[0] + tone[..., None] * (BLUEPRINT[1] - BLUEPRINT[0])
    else:
        picture = rgb + (1 - alpha) * np.array(BACKGROUNDS[background], np.float32)
    return picture.clip(0, 255).round().astype(np.uint8)


def one(
    drawing: np.ndarray,
    style: str,
    rng: np.random.Generator,
    scales: tuple[int, ...] = ANY_SCALE,
    shifts: tuple[int, ...] = ANY_SHIFT,
) -> tuple[np.ndarray, int]:
    """A random placement of a drawing; returns (picture, index of its background)."""
    scale = int(rng.choice(scales))
    room = SIDE - scale
    x, y = (int(np.clip(room // 2 + rng.choice(shifts), 0, room)) for _ in range(2))
    names = list(BACKGROUNDS)
    white = style in ("sepia", "blueprint") or rng.random() < WHITE_SHARE
    background = names[0 if white else int(rng.integers(1, len(names)))]
    rgb, alpha = place(drawing, scale, x, y)
    return paint(rgb, alpha, style, background), names.index(background)


def build(
    concept_drawings: np.ndarray,
    seed: int = 0,
    scales: tuple[int, ...] = SCALES,
    shifts: tuple[int, ...] = SHIFTS,
    counts: dict[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 64, 64, 3) uint8 and meta (N, 3) int16 of all concepts and styles; ``counts`` replaces the table's."""
    rng = np.random.default_rng(seed)
    pictures, meta = [], []
    for c, sets in enumerate(concept_drawings):
        for s, (style, (art, count, _)) in enumerate(STYLES.items()):
            for _ in range(counts[style] if counts else count):
                picture, background = one(sets[art], style, rng, scales, shifts)
                pictures.append(picture)
                meta.append((c, s, background))
    return np.stack(pictures), np.array(meta, np.int16)


def build_filler(drawings: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Pictures of icons that belong to no concept (M * each, 64, 64, 3), on natural backgrounds."""
    rng = np.random.default_rng(seed)
    return np.stack([one(d, "flat", rng)[0] for d in drawings for _ in range(each)])
