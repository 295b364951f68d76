"""Stage 4: latents of all training pictures. ``python -m tools.demo_training.encode``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from .run import save_atomic
from .tiny_vae import TinyVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    args = parser.parse_args()
    data = np.load(args.work / "pictures.npz")
    vae = TinyVAE()
    vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True))
    pictures = torch.from_numpy(data["X"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = torch.cat([vae.taesd_encoder(x.float() / 255) for x in pictures.split(64)])
    print(f"{len(latents)} latents, deviation by channel {latents.std((0, 2, 3)).tolist()}, largest {latents.abs().max():.2f}")
    save_atomic({"latents": latents, "meta": torch.from_numpy(data["M"].astype(np.int64))}, args.work / "latents.pt")


if __name__ == "__main__":
    main()
