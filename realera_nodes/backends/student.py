"""The network in training on diffusers: peft's LoRA on for the student, off for the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapters import AdapterSettings, Factors, initial_factors
from ..core.attention import AttentionMaps, AttentionProbe, cross_attentions
from ..core.spans import TextStates

ADAPTER = "erasure"


class PeftStudent:
    """The network inside ``DiffusersBackend.training``: student by default, teacher inside ``teacher()``."""

    def __init__(self, backend: Any, originals: Mapping[str, nn.Parameter], config: AdapterSettings):
        self.backend, self.original, self.scale = backend, dict(originals), config.scale
        unet = backend.unet
        self.layers = {n: m for n, m in unet.named_modules() if hasattr(m, "lora_A") and ADAPTER in m.lora_A}
        shapes = {n: (m.lora_B[ADAPTER].weight.shape[0], m.lora_A[ADAPTER].weight.shape[1]) for n, m in self.layers.items()}
        start = initial_factors(shapes, config.rank, torch.Generator().manual_seed(config.seed))
        with torch.no_grad():
            for name, (down, up) in start.items():
                self.layers[name].lora_A[ADAPTER].weight.data = down.to(backend.device)  # float32 master weights
                self.layers[name].lora_B[ADAPTER].weight.data = up.to(backend.device)
        self.edited = {name: backend.linear(name).weight for name in self.original}

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        dtype = self.backend.unet.dtype
        if dtype == torch.float32:  # torch 2.1 refuses that type on a CPU, though switched off
            return self.backend.predict_noise(z, t, text)
        with torch.autocast(self.backend.device.type, dtype=dtype):
            return self.backend.predict_noise(z, t, text)

    def attention(self, z: Tensor, t: Tensor, text: TextStates, columns: Tensor | None = None) -> AttentionMaps:
        """Probabilities of all text attention layers, (B, heads, pixels, tokens) by layer (core.suppression)."""
        with AttentionProbe(cross_attentions(self.backend.unet)) as probe:
            self.predict_noise(z, t, text)
            return probe.probabilities(columns)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        unet = self.backend.unet
        unet.disable_adapters()
        try:
            for name, w in self.original.items():
                self.backend.linear(name).weight = w
            yield
        finally:
            for name, w in self.edited.items():
                self.backend.linear(name).weight = w
            unet.enable_adapters()

    @contextmanager
    def student(self) -> Iterator[None]:
        yield

    def parameters(self) -> list[nn.Parameter]:
        return [layer[ADAPTER].weight for name in sorted(self.layers)
                for layer in (self.layers[name].lora_A, self.layers[name].lora_B)]  # fmt: skip

    def factors(self) -> Factors:
        """name -> (down, up), the scale alpha / rank inside up."""
        return {
            n: (
                m.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
                self.scale * m.lora_B[ADAPTER].weight.detach().float().cpu(),
            )
            for n, m in sorted(self.layers.items())
        }
