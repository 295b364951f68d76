"""The VAE: TAESD's architecture, trained at reduced width where pictures are large.

Convolutions at 64x64 pixels cost 64 times those at 8x8, so the outer layers get fewer channels
(``WIDTHS``). There is no normalisation in TAESD: zero-padding the weights to 64 channels
everywhere gives the standard network with the same outputs. For refinement the decoder grows (``widen``).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 64)  # channels at 64, 32, 16 and 8 pixels
DECODER_WIDTHS = (32, 64, 64, 64)  # of the decoder that is kept
FULL = 64
LATENT = 4


def conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Block(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.conv = nn.Sequential(conv(n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def encoder(w: tuple[int, int, int, int] = WIDTHS) -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, w[0]), Block(w[0])]
    for a, b in pairwise(w):
        layers += [conv(a, b, stride=2, bias=False), Block(b), Block(b), Block(b)]
    return nn.Sequential(*layers, conv(w[3], LATENT))


def decoder(w: tuple[int, int, int, int] = WIDTHS) -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), conv(LATENT, w[3]), nn.ReLU()]
    for a, b in ((w[3], w[2]), (w[2], w[1]), (w[1], w[0])):
        layers += [Block(a), Block(a), Block(a), nn.Upsample(scale_factor=2), conv(a, b, bias=False)]
    return nn.Sequential(*layers, Block(w[0]), conv(w[0], 3))


class TinyVAE(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] to latents (B, 4, 8, 8) of unit variance, and back."""

    def __init__(self, decoder_widths: tuple[int, int, int, int] = DECODER_WIDTHS):
        super().__init__()
        self.taesd_encoder, self.taesd_decoder = encoder(), decoder(decoder_widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Block):  # residual branches start small
                module.conv[4].weight.data.mul_(0.2)
        nn.init.constant_(self.taesd_decoder[-1].bias, 0.7)

    @torch.no_grad()
    def scale_to(self, x: Tensor) -> None:
        """Scales the last layers so that latents of ``x`` start with deviation 1 and pictures with 0.2."""
        z = self.taesd_encoder(x)
        self.taesd_encoder[-1].weight /= z.std()
        self.taesd_decoder[-1].weight *= 0.2 / self.taesd_decoder(z / z.std()).std()

    def forward(self, x: Tensor, noise: float = 0.0, earlier: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 64, 64) and their latents; half of the pictures are decoded from ``earlier`` latents if given."""
        z = self.taesd_encoder(x)
        shown = z if earlier is None else torch.where(torch.rand(len(z), 1, 1, 1) < 0.5, earlier, z)
        return self.taesd_decoder(shown + noise * torch.randn_like(z)), z


@torch.no_grad()
def widen(slim: TinyVAE) -> TinyVAE:
    """The same autoencoder with ``DECODER_WIDTHS``: new channels are computed from the start, but nothing old reads them yet."""
    wide = TinyVAE()
    old = slim.state_dict()
    for name, value in wide.state_dict().items():
        kept = tuple(slice(n) for n in old[name].shape)
        if value.ndim == 4:
            value[: old[name].shape[0]] = 0
        value[kept] = old[name]
    return wide


def padded_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the standard 64-channel TAESD's weights, by name."""
    with torch.device("meta"):
        return {
            name: tuple(value.shape)
            for name, value in nn.ModuleDict({"taesd_encoder": encoder((FULL,) * 4), "taesd_decoder": decoder((FULL,) * 4)})
            .state_dict()
            .items()
        }
