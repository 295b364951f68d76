"""The UNet: SD1.x's architecture with two levels, trained at half width where pictures are large.

Level 0 works on 8x8 latents and has no transformers, level 1 works on 4x4 and has four. ComfyUI knows SD1.x by its 320 channels,
but most of the work is worth doing at 4x4, so level 0 trains with 160. Those 160 are the first half of the
320 that the written checkpoint has, the others being zero: GroupNorm's groups of ten channels stay
whole, LayerNorm divides by the padded width, attention heads keep the scale of 40 dimensions.
``padded_state`` writes the standard weights; a test holds both networks to the same output.

Module names are LDM's (``input_blocks.3.1.transformer_blocks.0.attn2.to_k`` ...).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realera_nodes.demo.layout import pad

FULL, SLIM, TIME, CONTEXT, HEADS = 320, 160, 1280, 768, 8
GROUP = 10  # channels in a GroupNorm group at 320


class PaddedLayerNorm(nn.Module):
    """LayerNorm of ``width`` channels that are followed by zeros up to 320."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == FULL:
            return F.layer_norm(x, (FULL,), self.weight, self.bias, 1e-5)
        mean = x.sum(-1, keepdim=True) / FULL
        variance = x.square().sum(-1, keepdim=True) / FULL - mean.square()
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


def group_norm(channels: int, group: int = GROUP, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(channels // group, channels, eps=eps)


class ResBlock(nn.Module):
    def __init__(self, n_in: int, n: int, concatenated: bool = False):
        super().__init__()
        group = 2 * GROUP if concatenated else GROUP  # 640 channels in 32 groups
        self.in_layers = nn.Sequential(group_norm(n_in, group), nn.SiLU(), nn.Conv2d(n_in, n, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(TIME, n))
        self.out_layers = nn.Sequential(group_norm(n), nn.SiLU(), nn.Dropout(0), nn.Conv2d(n, n, 3, padding=1))
        self.skip_connection = nn.Conv2d(n_in, n, 1) if n_in != n or concatenated else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        b, n, width = x.shape
        q, k, v = (
            t.view(b, -1, HEADS, width // HEADS).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scale = (FULL // HEADS) ** -0.5
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return self.to_out(out.transpose(1, 2).reshape(b, n, width))


class GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(width, width), Attention(width, CONTEXT), FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (PaddedLayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, bias)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width)])

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context, bias)
        return x + self.proj_out(y.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    def __init__(self, n_in: int, n: int):
        super().__init__()
        self.op = nn.Conv2d(n_in, n, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, n_in: int, n: int):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def timestep_embedding(t: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(FULL // 2, dtype=torch.float32) / (FULL // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class SlimUNet(nn.Module):
    """eps(x_t, t, text): x (B, 4, 8, 8), t (B,), context (B, L, 768), bias (B, 1, 1, L) or None -> (B, 4, 8, 8).

    ``slim`` is level 0's width: 160 to train, 320 for the standard network.
    """

    def __init__(self, slim: int = SLIM):
        super().__init__()
        s, f = slim, FULL
        self.time_embed = nn.Sequential(nn.Linear(FULL, TIME), nn.SiLU(), nn.Linear(TIME, TIME))
        self.input_blocks = nn.ModuleList([
            nn.ModuleList([nn.Conv2d(4, s, 3, padding=1)]),
            nn.ModuleList([ResBlock(s, s)]),
            nn.ModuleList([Downsample(s, f)]),
            nn.ModuleList([ResBlock(f, f), SpatialTransformer(f)]),
        ])  # fmt: skip
        self.middle_block = nn.ModuleList([ResBlock(f, f), SpatialTransformer(f), ResBlock(f, f)])
        self.output_blocks = nn.ModuleList([
            nn.ModuleList([ResBlock(2 * f, f, True), SpatialTransformer(f)]),
            nn.ModuleList([ResBlock(2 * f, f, True), SpatialTransformer(f), Upsample(f, s)]),
            nn.ModuleList([ResBlock(2 * s, s, True)]),
            nn.ModuleList([ResBlock(2 * s, s, True)]),
        ])  # fmt: skip
        self.out = nn.Sequential(group_norm(s), nn.SiLU(), nn.Conv2d(s, 4, 3, padding=1))
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, ResBlock):  # branches start at zero, so the network starts as its skips
                nn.init.zeros_(module.out_layers[3].weight)
            if isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
                for block in module.transformer_blocks:
                    # text states have unit variance per channel and 192 true dimensions
                    nn.init.normal_(block.attn2.to_k.weight, std=CONTEXT**-0.5)
                    nn.init.normal_(block.attn2.to_v.weight, std=CONTEXT**-0.5)
        nn.init.zeros_(self.out[2].weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(t))

        def run(block: nn.ModuleList, h: Tensor) -> Tensor:
            for module in block:
                if isinstance(module, ResBlock):
                    h = module(h, emb)
                elif isinstance(module, SpatialTransformer):
                    h = module(h, context, bias)
                else:
                    h = module(h)
            return h

        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], 1))
        return self.out(x)


def padded_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the standard network's weights, by name."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in SlimUNet(FULL).state_dict().items()}


def padded_state(slim: dict[str, Tensor]) -> dict[str, Tensor]:
    """The standard 320-channel weights of a slim state: same keys, zeros where level 0 has no channels."""
    return {name: pad(name, slim[name], shape) for name, shape in padded_shapes().items()}
