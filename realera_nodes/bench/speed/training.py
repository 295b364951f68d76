"""A training step of RealEra beside what it cannot do without: one forward, and one forward with backward.

Both go through the same peft-adapted UNet with the same number of latents, in turn within one run: after each step of
``align_noise`` the plain pass of that step's size is timed. An even step has twice the latents of an odd one (neighbors
and beyond-concept samples).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...backends.diffusers import DiffusersBackend, PeftStudent
from ...core.alignment import AlignmentConfig, Trajectories, align_noise
from ...core.neighbors import NeighborConfig
from ...core.spans import ErasurePair, TextStates
from ...core.training import TrainState
from ...demo.expand import SCHEDULER_CONFIG, UNET_CONFIG
from .measure import verdict

TOKENS, START = 77, 2
GOAL = 1.2


@dataclass(frozen=True)
class Model:
    """A UNet to measure: diffusers' configuration without weights."""

    name: str
    config: dict[str, Any] = field(hash=False)


EMBEDDED = Model("embedded model", dict(UNET_CONFIG))


def sd14_geometry(width: int = 128, side: int = 32) -> Model:
    """SD1.4's levels, 16 transformers, 8 heads and context, with ``width`` channels in place of 320."""
    config = {
        "sample_size": side, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
        "attention_head_dim": 8, "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    return Model(f"SD1.4's attention, {width} channels, {side}x{side}", config)


def make_backend(model: Model) -> DiffusersBackend:
    """A backend around a UNet of random weights; it has no text encoder and no VAE."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(model.config).eval()
    scheduler = DDIMScheduler.from_config(SCHEDULER_CONFIG)
    return DiffusersBackend(
        SimpleNamespace(unet=unet, scheduler=scheduler, vae_scale_factor=8, tokenizer=None, text_encoder=None)
    )


def make_pair(width: int, generator: torch.Generator) -> ErasurePair:
    """A prompt and its anchor's, of random states."""
    ids = [list(range(TOKENS))]
    text, anchor = (TextStates(torch.randn(1, TOKENS, width, generator=generator), ids) for _ in range(2))
    return ErasurePair("", "", text, anchor, START, START + 1, anchor.states[0])


def plain_pass(student: PeftStudent, z: Tensor, t: Tensor, states: Tensor, parameters: Sequence[Tensor]) -> float:
    """Seconds of one forward without gradients, adapters off, and one forward and backward with them. Sets no gradients."""
    unet = student.backend.unet
    unet.disable_adapters()
    start = time.perf_counter()
    with torch.no_grad():
        target = unet(z, t, states)[0]
    seconds = time.perf_counter() - start
    unet.enable_adapters()
    start = time.perf_counter()
    torch.autograd.grad(torch.nn.functional.mse_loss(unet(z, t, states)[0], target), list(parameters))
    return seconds + time.perf_counter() - start


def measure(model: Model, repeats: int, batch: int) -> dict[str, Any]:
    """Seconds of odd and even steps and of the plain passes beside them; the first of each is not counted."""
    backend = make_backend(model)
    generator = torch.Generator().manual_seed(0)
    side = model.config["sample_size"]
    pairs = [make_pair(backend.context_width, generator) for _ in range(2)]
    runs = [Trajectories(torch.randn(2, 4, 4, side, side, generator=generator), torch.tensor([900, 600, 300, 50])) for _ in pairs]
    # as after the closed form: the student's projections are others than the teacher's
    deltas = {name: 0.01 * torch.randn(w.shape, generator=generator) * w.std() for name, w in backend.projections().items()}
    config = AlignmentConfig(steps=2 * (repeats + 1), batch=batch)
    ours: dict[str, list[float]] = {"odd": [], "even": []}
    plain: dict[str, list[float]] = {"odd": [], "even": []}
    with backend.training(deltas, config) as student:
        parameters = student.parameters()
        inputs = {
            kind: (
                torch.randn(n, 4, side, side, generator=generator),
                torch.full((n,), 500),
                torch.randn(n, TOKENS, backend.context_width),
            )
            for kind, n in (("odd", batch), ("even", 2 * batch))
        }
        start = time.perf_counter()

        def on_step(state: TrainState) -> None:
            nonlocal start
            kind = "odd" if state.step % 2 else "even"
            ours[kind].append(time.perf_counter() - start)
            plain[kind].append(plain_pass(student, *inputs[kind], parameters))
            start = time.perf_counter()

        final = align_noise(student, pairs, runs, NeighborConfig(), config, on_step)
    steps = {
        kind: {"latents": batch * (2 if kind == "even" else 1), "ours": median(ours[kind][1:]), "plain": median(plain[kind][1:]),
               "ratio": median(ours[kind][1:]) / median(plain[kind][1:])}
        for kind in ours
    }  # fmt: skip
    return {"model": model.name, "parameters": sum(p.numel() for p in backend.unet.parameters()),
            "repeats": repeats, "projections": len(backend.names),
            "steps": steps, "losses": final.losses}  # fmt: skip


def run(models: Sequence[Model], repeats: int, batch: int, console: Console) -> list[dict[str, Any]]:
    """All models; prints the table."""
    results = []
    table = Table(title="A training step: the plain forward, forward and backward is the limit")
    for name in ("model", "parameters", "step", "latents", "ours", "plain", "ratio", f"goal {GOAL}"):
        table.add_column(name, justify="right")
    for model in models:
        console.print(f"{model.name}: {2 * (repeats + 1)} steps, a plain pass beside each")
        result = measure(model, repeats, batch)
        results.append(result)
        for kind, s in result["steps"].items():
            table.add_row(model.name, f"{result['parameters'] / 1e6:.1f} M", kind, str(s["latents"]), f"{s['ours'] * 1e3:.0f} ms",
                          f"{s['plain'] * 1e3:.0f} ms", f"{s['ratio']:.2f}", verdict(s["ratio"] <= GOAL))  # fmt: skip
    console.print(table)
    return results
