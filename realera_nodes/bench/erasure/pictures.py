"""Pictures by what made them: a stopped run draws none twice, and methods with equal weights share them.

A picture's name is a hash of the weights' content, the prompt, the seed and the sampler. It is kept as PNG, and what is judged is
always what was kept: 8 bits a channel, whether it was drawn now or in an earlier run.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.errors import ErasureError
from ...formats.atomic import atomic_file
from .protocols import Ask


@dataclass(frozen=True)
class Sampler:
    """All that decides a picture beside weights, prompt and seed; ``batch`` does not, but for rounding."""

    steps: int
    guidance: float
    side: int
    dtype: str = "float32"
    name: str = "ddim"


@dataclass(frozen=True)
class Shot:
    """One picture: the prompt it answers, its seed, and its name in the store."""

    ask: Ask
    seed: int
    key: str


class PictureStore:
    """Pictures in a folder, in folders of two letters."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"

    def read(self, keys: Sequence[str]) -> Tensor:
        """(N, 3, H, W) in [0, 1]. ErasureError: one is missing or damaged."""
        pictures = []
        for key in keys:
            try:
                with Image.open(self.path(key)) as image:
                    pictures.append(torch.from_numpy(np.asarray(image.convert("RGB")).copy()))
            except FileNotFoundError as error:
                raise ErasureError(f"{self.path(key)} is gone: delete rows.jsonl, so that its row is made anew.") from error
            except OSError as error:
                raise ErasureError(f"{self.path(key)} is damaged: delete it; it will be drawn again.") from error
        return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255

    def write(self, key: str, picture: Tensor) -> None:
        """One picture (3, H, W) in [0, 1], whole or not at all."""
        array = (picture.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG")
        with atomic_file(self.path(key), overwrite=True) as f:
            f.write(buffer.getvalue())


def picture_key(weights: str, prompt: str, seed: int, sampler: Sampler) -> str:
    """``weights``: hash of the model and of what was changed in it."""
    facts = json.dumps([weights, prompt, seed, asdict(sampler)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def shots_of(asks: Iterable[Ask], weights: str, sampler: Sampler) -> list[Shot]:
    """Every ask at every seed."""
    return [Shot(ask, seed, picture_key(weights, ask.prompt, seed, sampler)) for ask in asks for seed in ask.seeds]


def draw_missing(
    backend: Any, store: PictureStore, shots: Sequence[Shot], sampler: Sampler, batch: int,
    edited: Callable[[], AbstractContextManager[None]], on_pictures: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Draws what the store lacks, inside ``edited()``; returns how many that were. ``on_pictures(done, total)``."""
    wanted = {shot.key: shot for shot in shots}  # two asks may be one picture
    missing = [shot for key, shot in wanted.items() if not store.path(key).exists()]
    total, done = len(wanted), len(wanted) - len(missing)
    if on_pictures:
        on_pictures(done, total)
    if not missing:
        return 0
    with edited():
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            pictures = backend.pictures([s.ask.prompt for s in part], [s.seed for s in part], sampler.steps,
                                        sampler.guidance, batch=batch)  # fmt: skip
            for shot, picture in zip(part, pictures, strict=True):
                store.write(shot.key, picture)
            done += len(part)
            if on_pictures:
                on_pictures(done, total)
    return len(missing)


def distances(backend: Any, a: Tensor, b: Tensor) -> tuple[list[float], list[float]]:
    """Mean squared differences of pictures (N, 3, H, W): of pixels, and of the latents that the model's VAE encodes them to."""
    latents = backend.encode_pictures(a) - backend.encode_pictures(b)
    return (a - b).square().mean((1, 2, 3)).tolist(), latents.square().mean((1, 2, 3)).tolist()
