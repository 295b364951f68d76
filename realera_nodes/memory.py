"""Memory that is free, and what a job needs of it: said before it starts, and not by an allocator in the middle."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .core.errors import ErasureError

#: activations at a time, in units of one latent at the UNet's first width: of a forward, and of one that is trained through.
#: Measured on SD1.x's geometry on a CPU, and rounded down; a GPU's kernels need less beside them
FORWARD, TRAINED = 30, 300
#: the same of the VAE's decoder, in units of one picture at its last width
DECODED = 9
#: pictures that are drawn together, each with and without its prompt, and latents of which mining asks at a time
DRAWN, ASKED = 4, 32
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """So many bytes, on the model's device or in the machine's memory, for what, and what to do where they are not free."""

    size: float
    what: str
    advice: str
    device: bool = True


def available(device: torch.device) -> float:
    """Free bytes of a device, or of the machine where it has no memory of its own."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    free = float(psutil.virtual_memory().available)
    try:  # a container's own limit
        limit, used = (float((_CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()).get(
            "inactive_file", 0
        )
        return min(free, limit - used + float(cached))
    except (OSError, ValueError):  # there is none, or it is "max"
        return free


def drawing(backend: Any, pictures: int) -> list[Need]:
    """What it takes to draw, and to keep ``pictures`` of them."""
    side = backend.side
    widths = backend.pipe.vae.config
    last = (getattr(widths, "block_out_channels", None) or widths.decoder_block_out_channels)[0]
    decoded = DRAWN * DECODED * last * side * side * _bytes(backend)
    return [
        Need(_share(backend) * decoded, f"decoding {DRAWN} pictures of {side} pixels", "lower size"),
        Need(2 * DRAWN * latent(backend, FORWARD), f"drawing {DRAWN} pictures of {side} pixels", "lower size"),
        Need(pictures * 3.0 * side * side * 4, f"keeping {pictures} pictures of {side} pixels", "lower pictures or size", False),
    ]


def latent(backend: Any, units: int) -> float:
    """Bytes that one latent takes inside the UNet."""
    height = backend.side // backend.pipe.vae_scale_factor
    return _share(backend) * units * backend.unet.config.block_out_channels[0] * height * height * _bytes(backend)


def _bytes(backend: Any) -> int:
    return next(backend.unet.parameters()).element_size()


def _share(backend: Any) -> float:
    return 1.0 if backend.device.type == "cpu" else 0.5


def require_memory(backend: Any, needs: list[Need]) -> None:
    """Raises ErasureError, naming what is needed, what is free and the setting to lower, for the first need that is too much."""
    for need in needs:
        free = available(backend.device if need.device else torch.device("cpu"))
        if need.size > free:
            raise ErasureError(
                f"{need.what} needs about {need.size / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: {need.advice}."
            )


def free_memory() -> None:
    """Gives back what no object holds any more, a GPU's cache too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
