"""The embedded model's judge: which concept a picture shows, or none, and in which style."""

from __future__ import annotations

import torch
from torch import Tensor, nn

OTHER = "other"
WIDTHS = (32, 64, 128, 192)


def _layer(n_in: int, n: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU())


class Classifier(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] to (concept logits (B, C + 1), style logits (B, S)).

    The last concept logit is "other". Concept logits are divided by a temperature fitted on
    validation pictures, so that their softmax can be read as a probability.
    """

    def __init__(self, concepts: int, styles: int):
        super().__init__()
        a, b, c, d = WIDTHS
        self.features = nn.Sequential(
            _layer(3, a, 2), _layer(a, b, 2), _layer(b, b, 1), _layer(b, c, 2), _layer(c, c, 1), _layer(c, d, 2),
        )  # fmt: skip
        self.drop = nn.Dropout(0.3)
        self.concept = nn.Linear(d * 16, concepts + 1)
        self.style = nn.Linear(d * 16, styles)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x * 2 - 1).flatten(1)
        return self.concept(self.drop(h)) / self.temperature, self.style(h)
