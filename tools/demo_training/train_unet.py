"""Stage 5: the UNet. ``python -m tools.demo_training.train_unet --minutes 66`` (see docs/demo-model.md).

Muon for the matrices, AdamW for the rest. Two single-threaded processes average their gradients
at each step and share Muon's work. Run it again and it goes on from
its last checkpoint; a longer ``--minutes`` stretches the learning-rate schedule.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .captions import caption
from .optim import Muon
from .run import Log, launch, reduce_sum, save_atomic
from .slim_unet import SlimUNet
from .text import TextStates

#: SD1.x's noise schedule: share of signal variance left after t steps
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
ADAM_SHARE = 0.6  # of the learning rate, for what Muon does not train
COLUMNS = ["step", "samples", "seconds", "loss", "loss_low_t", "loss_high_t", "grad_norm", "lr"]


def loss_weight(alpha_bar: Tensor) -> Tensor:
    """Weight of the squared noise error: SNR^-0.65, so that every timestep has about the same share of the loss.

    A caption all but determines our pictures: what an ideal denoiser cannot know is 3% of their variance even at
    t = 900. Plain noise prediction gives those timesteps, where a prompt becomes a shape, hardly any
    gradient (their noise error is below 0.01), and min-SNR weights were made for pictures that vary more.
    """
    return ((1 - alpha_bar) / alpha_bar) ** 0.65


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Short warm-up by steps, then linear to 1% by the share of the time that is gone."""
    return peak * min(1, (step + 1) / 60) * max(0.01, min(1, (1 - progress) / 0.9))


def split_parameters(unet: SlimUNet) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices for Muon, the rest for AdamW): time embedding, first and last layers, norms and biases."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in unet.named_parameters():
        edge = name.startswith(("time_embed", "input_blocks.0.", "out.")) or "emb_layers" in name
        (rest if p.ndim == 1 or edge else matrices).append(p)
    return matrices, rest


def worker(rank: int, world: int, args: argparse.Namespace) -> None:
    data = torch.load(args.work / "latents.pt", weights_only=True)
    latents, meta = data["latents"], data["meta"].tolist()
    text = TextStates(args.work)
    torch.manual_seed(0)
    unet = SlimUNet()
    parameters = list(unet.parameters())
    matrices, rest = split_parameters(unet)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.lr, weight_decay=0.01, steps=3, shard=(rank, world)),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    average = [p.detach().clone() for p in parameters]
    step, elapsed = 0, 0.0
    checkpoint = args.work / f"unet_train{args.tag}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, mmap=True)
        unet.load_state_dict(saved["unet"])
        average = [a.clone() for a in saved["average"]]
        step, elapsed = saved["step"], saved["elapsed"]
        # each process keeps the momentum of its own share; a run on another number of processes starts without
        if saved["momentum"] == world:
            states = torch.load(momentum_path(checkpoint, rank), weights_only=True)
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        del saved
    log = Log(args.work / f"unet{args.tag}.csv", COLUMNS) if rank == 0 else None
    torch.manual_seed(1 + rank + 1000 * step)
    rng = random.Random(1 + rank + 1000 * step)
    bf16 = torch.cpu._is_amx_tile_supported()  # emulated, and ten times slower, where the CPU lacks it
    start, budget = time.time() - elapsed, args.minutes * 60
    history: list[list[float]] = []
    order: list[int] = []
    last_save, progress = time.time(), torch.zeros(1)
    resumed_at = step
    while True:
        if (step - resumed_at) % 10 == 0:
            progress.fill_((time.time() - start) / budget)
            dist.broadcast(progress, 0)
            if progress >= 1:
                break
        lr = learning_rate(args.lr, step, progress.item())
        if len(order) < args.batch:
            order = torch.randperm(len(latents)).tolist()
        rows = [order.pop() for _ in range(args.batch)]
        z = latents[rows]
        states, bias = text([caption(meta[i], rng) for i in rows], noise=args.noise)
        t = (((torch.randperm(args.batch) + torch.rand(args.batch)) / args.batch) * 1000).long().clamp(0, 999)
        a = ALPHA_BAR[t][:, None, None, None]
        eps = torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, states, bias)
        error = (predicted.float() - eps).square().mean((1, 2, 3))
        (error * loss_weight(ALPHA_BAR[t])).mean().backward()
        reduce_sum([p.grad for p in parameters if p.grad is not None], 1 / world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, share in zip(optimizers, (1.0, ADAM_SHARE), strict=True):
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        error = error.detach()
        history.append([error.mean().item(), error[t < 250].mean().item(), error[t > 600].mean().item()])
        if step % 5 == 0:
            torch._foreach_lerp_(average, [p.detach() for p in parameters], max(0.008, 5 / (5 + step)))
        if log and (step % 50 == 0 or step == 10):
            recent = np.nanmean(history[-100:], axis=0)
            log.row(
                step,
                step * args.batch * world,
                round(time.time() - start),
                *(f"{v:.4f}" for v in recent),
                f"{norm:.2f}",
                f"{lr:.1e}",
            )
        if step % 20 == 0:
            due = torch.tensor(float(time.time() - last_save > 300))
            dist.broadcast(due, 0)
            if due:
                last_save = time.time()
                save(checkpoint, unet, average, step, last_save - start, optimizers, rank, world, args)
    save(checkpoint, unet, average, step, time.time() - start, optimizers, rank, world, args)


def momentum_path(checkpoint: Path, rank: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.momentum{rank}.pt")


def save(path: Path, unet: SlimUNet, average: list[Tensor], step: int, elapsed: float, optimizers, rank, world, args) -> None:
    """Every process writes its momentum; process 0 also all else that resuming needs, and the averaged weights beside it."""
    save_atomic([o.state_dict() for o in optimizers], momentum_path(path, rank))
    dist.barrier()
    if rank == 0:
        names = [n for n, _ in unet.named_parameters()]
        record = {"unet": unet.state_dict(), "average": average, "step": step, "elapsed": elapsed, "momentum": world}
        save_atomic(record, path)
        save_atomic(dict(zip(names, average, strict=True)), args.work / f"unet{args.tag}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--minutes", type=float, default=66)
    parser.add_argument("--batch", type=int, default=16, help="samples a step and process")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--noise", type=float, default=0.4, help="largest noise on token vectors, relative to their norm")
    parser.add_argument("--tag", default="", help="suffix of the files, to keep trials apart")
    launch(worker, parser.parse_args())


if __name__ == "__main__":
    main()
