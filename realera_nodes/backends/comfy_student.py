"""Teacher and student in one network that ComfyUI has loaded: hooks on its layers, on and off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapters import AdapterSettings, Factors, HookAdapters, initial_factors
from ..core.attention import AttentionMaps, AttentionProbe, cross_attentions
from ..core.spans import TextStates
from .comfy_weights import working_dtype


def thaw(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """Replaces parameters and buffers that were made in inference mode, which autograd refuses, by copies of the same bits.

    All parameters stop requiring gradients; returns those that did with their flags, to be put back.
    """
    flags = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_inference():
                module._parameters[name] = nn.Parameter(p.clone(), requires_grad=False)
            elif p is not None and p.requires_grad:
                flags.append((p, True))
                p.requires_grad_(False)
        for name, b in module._buffers.items():
            if b is not None and b.is_inference():
                module._buffers[name] = b.clone()
    return flags


def freeze_quantised(model: nn.Module) -> None:
    """Makes quantised parameters tensors of inference mode again, by copies of the same bits, as the host has them.

    Loading outside of inference mode and ``thaw`` turn them into ordinary ones, which the host then cannot move in it.
    """
    with torch.inference_mode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and type(p) is not nn.Parameter and not p.is_inference():
                    module._parameters[name] = nn.Parameter(p.clone(), requires_grad=False)


class EditedAdapters(HookAdapters):
    """W x + scale up down x + delta x, while on."""

    def __init__(self, modules: Mapping[str, nn.Module], factors: Factors, scale: float):
        super().__init__(modules, factors, scale)
        self.fixed: dict[str, tuple[nn.Module, Tensor]] = {}

    def attach(self) -> None:
        super().attach()
        for module, delta in self.fixed.values():
            self.handles.append(module.register_forward_hook(self._fixed_hook(delta)))

    def _fixed_hook(self, delta: Tensor):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return output + inputs[0] @ delta.T.to(inputs[0]) if self.on else None

        return add


class HookStudent:
    """The network inside ``ComfyBackend.training``: the original as the teacher, with edits and adapters as the student."""

    def __init__(
        self, backend: Any, modules: Mapping[str, nn.Module], wanted: Sequence[str], deltas: Mapping[str, Tensor],
        config: AdapterSettings,
    ):  # fmt: skip
        self.backend, self.scale = backend, config.scale
        device = backend.patcher.load_device
        shapes = {n: (modules[n].weight.shape[0], modules[n].weight.shape[1]) for n in wanted}
        start = initial_factors(shapes, config.rank, torch.Generator().manual_seed(config.seed))
        factors = {n: (down.to(device), up.to(device)) for n, (down, up) in start.items()}  # float32 master weights
        self.adapters = EditedAdapters({n: modules[n] for n in wanted}, factors, config.scale)
        for name, delta in deltas.items():
            own = delta.detach().to(device, working_dtype(modules[name].weight), copy=True)
            self.adapters.fixed[name] = (modules[name], own)
        self.adapters.attach()

    def remove(self) -> None:
        """Takes all hooks off the network."""
        self.adapters.remove()

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        return self.backend.predict_noise(z, t, text)

    def attention(self, z: Tensor, t: Tensor, text: TextStates, columns: Tensor | None = None) -> AttentionMaps:
        """Probabilities of all text attention layers, (B, heads, pixels, tokens) by layer (core.suppression)."""
        with AttentionProbe(cross_attentions(self.backend.patcher.model.diffusion_model)) as probe:
            self.predict_noise(z, t, text)
            return probe.probabilities(columns)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The original network: all hooks off."""
        before, self.adapters.on = self.adapters.on, False
        try:
            yield
        finally:
            self.adapters.on = before

    def student(self) -> AbstractContextManager[None]:
        """The edited network with its adapters."""
        return self.adapters.enabled()

    def parameters(self) -> list[nn.Parameter]:
        return self.adapters.parameters()

    def factors(self) -> Factors:
        """name -> (down, up) on the CPU, the scale alpha / rank inside up."""
        return {n: (down.float().cpu(), self.scale * up.float().cpu()) for n, (down, up) in self.adapters.factors().items()}
