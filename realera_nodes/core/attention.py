"""Cross-attention probabilities of a running network, read by hooks on W_Q and W_K: the same for any host.

diffusers and ComfyUI never hold the probabilities, as fused attention returns only its result; but both compute queries and
keys by linear modules ``to_q`` and ``to_k`` of a module with ``heads``. So the probabilities are computed anew from those,
softmax(q k^T / sqrt(d_head)), with the graph that leads there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ErasureError

#: by layer: (B, heads, pixels, tokens)
AttentionMaps = Mapping[str, Tensor]


def cross_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """The text attention modules of a UNet by name, in the network's order.

    Raises:
        ErasureError: there are none.
    """
    found = {name: m for name, m in network.named_modules() if name.endswith("attn2") and _reads_text(m)}
    if not found:
        raise ErasureError("the model has no text attention (attn2 with to_q and to_k): choose SD1.x, SD2.x or SDXL.")
    return found


def _reads_text(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in ("to_q", "to_k", "heads"))


class AttentionProbe:
    """Inside the context, keeps the last queries and keys of each module; no module is changed.

    Enter it after adapters are attached: hooks run in the order of their making, and keys should include the adapters'.

    Args:
        modules: text attention modules by name, each with ``to_q``, ``to_k`` and ``heads``
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules: dict[str, Any] = dict(modules)
        self._queries: dict[str, Tensor] = {}
        self._keys: dict[str, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> AttentionProbe:
        for name, module in self.modules.items():
            for part, kept in ((module.to_q, self._queries), (module.to_k, self._keys)):
                self._handles.append(part.register_forward_hook(_keeper(kept, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for kept in (self._handles, self._queries, self._keys):
            kept.clear()

    def probabilities(self, columns: Sequence[int] | Tensor | None = None) -> dict[str, Tensor]:
        """What each layer attended to in the last forward pass: (B, heads, pixels, tokens) float32 by layer.

        Args:
            columns: only these tokens, in this order. The others' scores are computed all the same, as each probability is
                a share of the sum over all tokens; their probabilities are not.
        """
        return {name: self._layer(name, module, columns) for name, module in self.modules.items()}

    def _layer(self, name: str, module: Any, columns: Sequence[int] | Tensor | None) -> Tensor:
        if name not in self._queries or name not in self._keys:
            raise RuntimeError(f"{name} has not run inside the probe")
        q, k = (x.float().unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (self._queries[name], self._keys[name]))
        scale = getattr(module, "scale", None) or q.shape[-1] ** -0.5
        scores = scale * (q @ k.transpose(-1, -2))
        if columns is None:
            return scores.softmax(-1)
        return (scores[..., columns] - scores.logsumexp(-1, keepdim=True)).exp()


def _keeper(kept: dict[str, Tensor], name: str):
    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[name] = output

    return keep


def layer_size(pixels: int, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a layer with so many pixels, for latents of ``size``: each level halves both, rounded up."""
    h, w = size
    while h * w > pixels and (h, w) != (1, 1):
        h, w = -(-h // 2), -(-w // 2)
    if h * w != pixels:
        raise ValueError(f"no level of {size[0]}x{size[1]} latents has {pixels} pixels")
    return h, w


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) at another resolution (N, h, w): the share of each new pixel that they cover."""
    return F.adaptive_avg_pool2d(masks.float()[:, None], size)[:, 0]


def concept_map(maps: AttentionMaps, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a picture looks at some tokens: (B, h, w), the mean over layers and heads, at the finest layer's resolution.

    Args:
        maps: (B, heads, pixels, tokens) by layer
        weights: (B, tokens), how much each token counts
        size: (h, w) of the latents
    """
    sizes = {name: layer_size(p.shape[2], size) for name, p in maps.items()}
    finest = max(sizes.values())
    total = torch.zeros(len(weights), *finest)
    for name, p in maps.items():
        seen = torch.einsum("bhpn,bn->bp", p, weights.to(p)) / p.shape[1]
        seen = seen.unflatten(1, sizes[name])[:, None]
        total += F.interpolate(seen, size=finest, mode="bilinear", align_corners=False)[:, 0].cpu() / len(maps)
    return total
