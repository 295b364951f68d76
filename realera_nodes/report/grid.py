"""The labelled grid: one row a prompt, the original's pictures beside the erased model's, same seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.phrases import spelled

COLORS = {"concept": "#b3261e", "synonym": "#b3261e", "associated": "#b3261e", "preserved": "#1b6e3c", "unrelated": "#1b6e3c"}
GAP, HEAD, LABEL = 2, 26, 230


def to_image(picture: Tensor, side: int) -> Image.Image:
    """(3, H, W) in [0, 1] as a square image."""
    array = (picture.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    image = Image.fromarray(array)
    return image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)


def before_after(
    rows: Sequence[tuple[str, str, str, Tensor, Tensor]], titles: tuple[str, str] = ("before", "after")
) -> Image.Image:
    """Rows of (group, label, note, before (n, 3, H, W), after (n, 3, H, W))."""
    count = max(len(r[3]) for r in rows)
    side = max(64, min(128, rows[0][3].shape[-1]))
    block = count * (side + GAP)
    sheet = Image.new("RGB", (LABEL + 2 * block + 14, HEAD + len(rows) * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    for k, title in enumerate(titles):
        draw.text((LABEL + k * (block + 12) + 2, 6), title, fill="black", font=font)
    for i, (group, label, note, old, new) in enumerate(rows):
        y = HEAD + i * (side + GAP)
        draw.text((6, y + side // 2 - 24), group, fill=COLORS.get(group, "gray"), font=small)
        draw.text((6, y + side // 2 - 10), _fit(draw, label, LABEL - 12, font), fill="black", font=font)
        draw.text((6, y + side // 2 + 8), _fit(draw, note, LABEL - 12, small), fill="gray", font=small)
        for k, pictures in enumerate((old, new)):
            for j, picture in enumerate(pictures):
                sheet.paste(to_image(picture, side), (LABEL + k * (block + 12) + j * (side + GAP), y))
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> str:
    text = spelled(text)  # a line break has no length
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
