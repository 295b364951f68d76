"""FID of generated pictures to real ones by torchmetrics: Inception's weights must be downloaded once.

torchmetrics resizes with antialiasing; the papers do not say whose FID they print, and numbers of different
implementations are not to be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.errors import ErasureError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Fid:
    """Distances to the pictures of one folder, whose statistics are computed once.

    Args:
        real: folder of real pictures, such as MS-COCO's val2014
        weights: Inception's weights as a file; None: torch-fidelity downloads them

    Raises:
        ErasureError: torchmetrics or the weights are not here, or the folder holds no two pictures.
    """

    def __init__(self, real: Path, weights: Path | None = None, device: str | None = None):
        self.files = sorted(p for p in real.rglob("*") if p.suffix.lower() in _SUFFIXES) if real.is_dir() else []
        if len(self.files) < 2:
            raise ErasureError(f"{real} holds no two pictures: give --real a folder of real ones, such as MS-COCO's val2014.")
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            own = {"feature_extractor_weights_path": str(weights)} if weights else {}
            self.metric: Any = FrechetInceptionDistance(reset_real_features=False, normalize=True, **own)
        except ModuleNotFoundError as error:
            raise ErasureError('FID needs torchmetrics: pip install "torchmetrics[image]", or leave --real out.') from error
        except OSError as error:
            raise ErasureError(
                f"Inception's weights cannot be downloaded ({error}): fetch torch-fidelity's "
                "pt_inception-2015-12-05-6726825d.pth elsewhere and give it as --inception."
            ) from error
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.metric.to(self.device)
        for picture in _pictures(self.files):
            self.metric.update(picture[None].to(self.device), real=True)

    def distance(self, batches: Iterable[Tensor]) -> float:
        """FID of pictures that come as (N, 3, H, W) in [0, 1]."""
        self.metric.reset()  # of the generated ones alone
        for batch in batches:
            self.metric.update(batch.to(self.device), real=False)
        return float(self.metric.compute())


def _pictures(files: Iterable[Path]) -> Iterator[Tensor]:
    for path in files:
        with Image.open(path) as image:
            yield torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
