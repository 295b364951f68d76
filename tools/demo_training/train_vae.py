"""Stage 2: the VAE. ``python -m tools.demo_training.train_vae --minutes 25`` (see docs/demo-model.md).

Two single-threaded processes, gradients averaged at each step (DistributedDataParallel over gloo):
faster on a CPU than one process with two threads. Resumable: run it again and it goes on.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .optim import Muon
from .run import Log, launch, save_atomic
from .tiny_vae import WIDTHS, TinyVAE, widen


def psnr(vae: TinyVAE, pictures: Tensor) -> tuple[float, float]:
    """(mean of the pictures' PSNR, PSNR of the mean squared error) in dB; ``pictures`` uint8 (N, 3, 64, 64)."""
    errors = []
    with torch.no_grad():
        for chunk in pictures.split(64):
            x = chunk.float() / 255
            errors.append((vae(x)[0].clamp(0, 1) - x).square().mean((1, 2, 3)))
    e = torch.cat(errors)
    return (-10 * e.log10()).mean().item(), -10 * math.log10(e.mean().item())


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Squared error, with a little absolute error and edge error so that flat areas and outlines stay crisp."""
    d = y - x
    edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return 4 * d.square().mean() + 0.1 * d.abs().mean() + 0.05 * edges


def refinement_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean logarithm of each picture's squared error, which is its PSNR, with a little of ``reconstruction_loss``."""
    return 0.02 * (y - x).square().mean((1, 2, 3)).add(1e-5).log().mean() + 0.2 * reconstruction_loss(y, x)


def latent_loss(z: Tensor) -> Tensor:
    """Keeps each latent channel near mean 0 and variance 1 and inside TAESD's +-3 clamp."""
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
    return mean.square().mean() + (var - 1).square().mean() + 0.05 * F.relu(z.abs() - 2.5).square().mean()


def worker(rank: int, world: int, args: argparse.Namespace) -> None:
    data = np.load(args.work / "pictures.npz")
    concept, filler, held = (torch.from_numpy(data[k]).permute(0, 3, 1, 2).contiguous() for k in ("J", "F", "H"))
    torch.manual_seed(0)
    vae = TinyVAE() if args.refine else TinyVAE(WIDTHS)
    stage = "refine" if args.refine else "vae"
    if args.refine:
        vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True))
    else:
        vae.scale_to(concept[:: len(concept) // 64].float() / 255)
    earlier = copy.deepcopy(vae.taesd_encoder).requires_grad_(False)
    checkpoint = args.work / f"{stage}_train.pt"
    net = DistributedDataParallel(vae)
    kernels = [p for p in vae.parameters() if p.ndim == 4 and p.requires_grad]
    biases = [p for p in vae.parameters() if p.ndim == 1 and p.requires_grad]
    optimizers = [Muon(kernels, lr=args.lr), torch.optim.AdamW(biases, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["vae"])
        average, step, elapsed = saved["average"], saved["step"], saved["elapsed"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    log = Log(args.work / f"{stage}.csv", ["step", "seconds", "mse", "train_psnr", "held_psnr", "lr"]) if rank == 0 else None
    generator = torch.Generator().manual_seed(1000 * rank + step)
    torch.manual_seed(rank + step)
    budget, start, last_save, mse = args.minutes * 60, time.time() - elapsed, time.time(), 0.0
    clock, resumed_at = torch.zeros(1), step

    def record(elapsed: float) -> dict:
        return {
            "vae": vae.state_dict(),
            "average": average,
            "step": step,
            "elapsed": elapsed,
            "optimizers": [o.state_dict() for o in optimizers],
        }

    while True:
        if (step - resumed_at) % 20 == 0:
            clock.fill_((time.time() - start) / budget)
            torch.distributed.broadcast(clock, 0)  # both stop, and decay, together
            progress = clock.item()
        if progress >= 1:
            break
        lr = args.lr * min(1, (step + 1) / 50) * max(0.01, min(1, (1 - progress) / 0.7))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        half = args.batch // 2
        x = torch.cat(
            [
                concept[torch.randint(len(concept), (args.batch - half,), generator=generator)],
                filler[torch.randint(len(filler), (half,), generator=generator)],
            ]
        )
        x = x.float().div_(255)
        if args.refine:  # the UNet may already have learned the latents: the encoder stays near, the decoder reads both
            before = earlier(x)
            y, z = net(x, noise=args.noise, earlier=before)
            loss = refinement_loss(y, x) + 0.1 * F.mse_loss(z, before)
        else:
            y, z = net(x, noise=args.noise)
            loss = reconstruction_loss(y, x) + 0.01 * latent_loss(z)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        mse = 0.98 * mse + 0.02 * (y.detach() - x).square().mean().item()
        if step % 10 == 0:
            weight = 1 - min(0.97, step / (step + 100))
            for k, v in vae.state_dict().items():
                average[k].lerp_(v, weight)
        if log and (step % 250 == 0 or step in (20, 60, 120)):
            now = time.time() - start
            ema = copy.deepcopy(vae)
            ema.load_state_dict(average)
            corrected = mse / (1 - 0.98**step)
            log.row(step, round(now), f"{corrected:.5f}", f"{-10 * math.log10(corrected):.2f}",
                    f"{psnr(ema, held[:128])[0]:.2f}", f"{lr:.2e}")  # fmt: skip
        if rank == 0 and step % 20 == 0 and time.time() - last_save > 120:
            last_save = time.time()
            save_atomic(record(last_save - start), checkpoint)
    if rank == 0:
        save_atomic(record(time.time() - start), checkpoint)
        vae.load_state_dict(average)
        mean, of_mean = psnr(vae, held)
        if args.refine:
            with torch.no_grad():
                x = held.float() / 255
                print(f"latents moved by {(vae.taesd_encoder(x) - earlier(x)).square().mean().sqrt():.3f} (root mean square)")
        print(f"held-out drawings: mean PSNR {mean:.2f} dB, of the mean error {of_mean:.2f} dB")
        save_atomic((vae if args.refine else widen(vae)).state_dict(), args.work / "vae.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=4, help="pictures a step and process")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation of the noise on latents")
    parser.add_argument("--refine", action="store_true", help="go on with vae.pt, decoder widened, latents kept near")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    launch(worker, args, args.processes)


if __name__ == "__main__":
    main()
