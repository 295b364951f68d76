"""The noise schedule of a model that ComfyUI has loaded, also under patches that change how it is sampled.

Erasing asks the network about noisy latents at timesteps, so the levels of noise must be those that it knows its timesteps
by. Whether a schedule has them is tried out, as patches of other packs are of any class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: the object of a MODEL that holds its schedule
SCHEDULE = "model_sampling"
#: timesteps that a schedule is tried at
TRIED = 101
NOT_DISCRETE = "the model's noise schedule is not one of 1000 discrete steps (eps or v prediction): use such a model."


def trained_schedule(model: Any) -> tuple[Any, str]:
    """A MODEL with the noise schedule that its network was trained on, and the sentence that refuses it; "" where none does.

    A patch whose schedule is one of discrete steps stays (eps, v or x0 prediction, zero terminal SNR: without it, the host
    reads such files wrongly). One that only picks some of the steps below it (LCM) is taken off: below it lie all. Any other
    has levels of noise that the network's timesteps do not stand for.
    """
    if SCHEDULE not in model.object_patches:
        return model, "" if discrete(model.get_model_object(SCHEDULE)) else NOT_DISCRETE
    patch = model.object_patches[SCHEDULE]
    if discrete(patch):
        return model, ""
    below = model.clone()
    del below.object_patches[SCHEDULE]
    base = below.get_model_object(SCHEDULE)
    if not discrete(base):
        return model, NOT_DISCRETE
    if picks(patch, base):
        return below, ""
    kinds = ", ".join(kind.__name__ for kind in type(patch).__bases__)
    return model, (
        f"the model carries a sampling patch ({kinds}) whose levels of noise are not those of its 1000 trained steps: remove it "
        "before the erasure, or put it behind it."
    )


def discrete(sampling: Any) -> bool:
    """Whether timesteps 0, 1, 2 ... stand for the levels of ``sigmas``, both ways, and the input is scaled to variance 1 (VP)."""
    sigmas = getattr(sampling, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        return False
    steps = torch.linspace(0, len(sigmas) - 1, TRIED, device=sigmas.device).round().unique()
    levels = sigmas.float()[steps.long()]
    # the host asks for levels one by one, and not every schedule answers otherwise
    found = torch.tensor([float(sampling.sigma(step)) for step in steps], device=levels.device)
    return (
        _close(found, levels)
        and bool((_told(sampling, levels) - steps).abs().max() <= 1)
        and _close(_scaled(sampling, levels), (1 + levels.square()).rsqrt())
    )


def picks(sampling: Any, base: Any) -> bool:
    """Whether a schedule's levels are some of those of ``base``: the network is told the same timesteps, and read alike."""
    levels = getattr(sampling, "sigmas", None)
    if not isinstance(levels, Tensor) or levels.ndim != 1:
        return False
    levels = levels.float()
    told, meant = (_told(s, levels) for s in (sampling, base))
    return (
        bool((told - meant).abs().max() <= 1)
        and _close(_scaled(sampling, levels), _scaled(base, levels))
        and all(_close(_read(sampling, levels, *part), _read(base, levels, *part)) for part in ((1.0, 0.0), (0.0, 1.0)))
    )


def predicted(sampling: Any) -> str:
    """What an output of the network is read as, by the picture that a schedule makes of it: "eps", "v" or "other"."""
    sigma = torch.tensor([10.0])
    try:
        picture = float(_read(sampling, sigma, 1.0, 0.0))
    except (AttributeError, TypeError):  # a patch that is asked otherwise
        return "other"
    meant = {"eps": -10.0, "v": -10.0 / 101**0.5}
    return next((name for name, value in meant.items() if abs(picture - value) < 0.02 * abs(value)), "other")


def _told(sampling: Any, sigmas: Tensor) -> Tensor:
    """The timesteps that the network is told at each level, (N,)."""
    return sampling.timestep(sigmas).float().to(sigmas.device)


def _scaled(sampling: Any, sigmas: Tensor) -> Tensor:
    """What the network sees of a latent of ones at each level, (N,)."""
    return sampling.calculate_input(sigmas, torch.ones(len(sigmas), 1, 1, 1, device=sigmas.device)).flatten()


def _read(sampling: Any, sigmas: Tensor, output: float, latent: float) -> Tensor:
    """The picture that an output of the network for a latent is read as at each level, (N,)."""
    shape = (len(sigmas), 1, 1, 1)
    parts = (torch.full(shape, value, device=sigmas.device) for value in (output, latent))
    return sampling.calculate_denoised(sigmas, *parts).flatten()


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a.float().to(b.device), b.float(), rtol=1e-2, atol=1e-2).all())
