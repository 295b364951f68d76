"""DDIM sampling on the slim networks: what the diffusers pipeline does, at half the cost."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .slim_unet import SlimUNet
from .text import TextStates
from .tiny_vae import TinyVAE
from .train_unet import ALPHA_BAR


class Sampler:
    """Draws pictures with the weights of a training folder (``tag``: which UNet trial)."""

    def __init__(self, work: Path, tag: str = ""):
        self.unet, self.vae, self.text = SlimUNet(), TinyVAE(), TextStates(work)
        self.unet.load_state_dict(torch.load(work / f"unet{tag}.pt", weights_only=True))
        self.vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int], steps: int = 20, guidance: float = 5.0) -> Tensor:
        """One picture for each (prompt, seed), (N, 3, 64, 64) in [0, 1]; timesteps and noise as the pipeline's."""
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        states, bias = self.text([*prompts, *[""] * len(prompts)])
        jump = 1000 // steps
        for t in reversed(range(1, 1 + jump * steps, jump)):
            alpha = ALPHA_BAR[t]
            before = ALPHA_BAR[t - jump] if t >= jump else ALPHA_BAR[0]
            conditional, empty = self.unet(x.repeat(2, 1, 1, 1), torch.full((2 * len(x),), t), states, bias).chunk(2)
            eps = empty + guidance * (conditional - empty)
            clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
            x = before.sqrt() * clean + (1 - before).sqrt() * eps
        return self.vae.taesd_decoder(x).clamp(0, 1)
