"""Stage 6: the classifier. ``python -m tools.demo_training.train_classifier`` (about five minutes).

It must know a concept through the VAE's blur, and must say "other" to what is none: noise,
half-erased pictures, icons of other things. So it trains on real pictures, on VAE
reconstructions with slightly disturbed latents, and on five kinds of "other".
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realera_nodes.demo.classifier import Classifier
from realera_nodes.demo.concepts import demo_concepts

from .optim import Muon
from .pictures import ANY_SCALE, ANY_SHIFT, STYLES, build
from .run import save_atomic
from .tiny_vae import TinyVAE

OTHER_SHARE = 0.3


class Judged:
    """Draws training batches; ``labels`` of "other" pictures are the last class."""

    def __init__(self, work: Path, seed: int):
        data = np.load(work / "pictures.npz")
        self.real = torch.from_numpy(data["J"]).permute(0, 3, 1, 2)
        self.real_meta = torch.from_numpy(data["JM"].astype(np.int64))
        self.filler = torch.from_numpy(data["F"]).permute(0, 3, 1, 2)
        encoded = torch.load(work / "latents.pt", weights_only=True)
        self.latents, self.meta = encoded["latents"], encoded["meta"]
        self.vae = TinyVAE()
        self.vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
        self.g = torch.Generator().manual_seed(seed)
        self.other = len(demo_concepts())
        self.pool: dict[str, Tensor] = {}
        self.refill(2048)

    def pick(self, n: int, of: int) -> Tensor:
        return torch.randint(of, (n,), generator=self.g)

    def decode(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.vae.taesd_decoder(c).clamp(0, 1) for c in z.split(64)])

    def refill(self, n: int) -> None:
        """Decodes a pool of reconstructions, mixtures and noise (decoding at each step would cost more than learning)."""
        i, j = self.pick(n, len(self.latents)), self.pick(n // 2, len(self.latents))
        z = self.latents[i]
        noise = torch.randn(z.shape, generator=self.g) * (torch.rand(n, 1, 1, 1, generator=self.g) * 0.35)
        self.pool = {"recon": self.decode(z + noise), "label": self.meta[i]}
        k = i[: n // 2]
        k, j = (v[self.meta[k, 0] != self.meta[j, 0]] for v in (k, j))
        share = 0.4 + 0.2 * torch.rand(len(k), 1, 1, 1, generator=self.g)
        self.pool["mixed"] = self.decode(share * self.latents[k] + (1 - share) * self.latents[j])
        self.pool["noise"] = self.noise(n // 4)

    def noise(self, n: int) -> Tensor:
        """Pixel noise at several scales, decoded latent noise, and pictures drowned in latent noise."""
        third = n // 3
        coarse = []
        for size in (2, 4, 8, 16, 64):
            x = torch.rand(third // 5 + 1, 3, size, size, generator=self.g)
            coarse.append(F.interpolate(x, size=64, mode="bilinear" if self.pick(1, 2) else "nearest"))
        z = torch.randn(third, 4, 8, 8, generator=self.g) * (0.2 + 1.0 * torch.rand(third, 1, 1, 1, generator=self.g))
        drowned = self.latents[self.pick(third, len(self.latents))] * 0.5
        drowned = drowned + torch.randn(drowned.shape, generator=self.g) * 0.9
        return torch.cat([*coarse, self.decode(z), self.decode(drowned)])

    def others(self, n: int) -> Tensor:
        """Noise, mixtures of two concepts, shuffled quarters, plain colours and icons of other things."""
        part = n // 6
        mixed, noise = self.pool["mixed"], self.pool["noise"]
        shuffled = self.real[self.pick(part, len(self.real))].float() / 255
        order = torch.randperm(16, generator=self.g)
        tiles = F.unfold(shuffled, 16, stride=16)[..., order]
        plain = torch.rand(part, 3, 1, 1, generator=self.g).expand(-1, -1, 64, 64)
        filler = self.filler[self.pick(2 * part, len(self.filler))].float() / 255
        return torch.cat([
            mixed[self.pick(n - 5 * part, len(mixed))], noise[self.pick(part, len(noise))],
            F.fold(tiles, 64, 16, stride=16), plain, filler,
        ])  # fmt: skip

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pictures, concept labels, style labels); style is -1 where there is no concept."""
        n_other = int(n * OTHER_SHARE)
        n_recon = (n - n_other) // 2
        i, j = self.pick(n - n_other - n_recon, len(self.real)), self.pick(n_recon, len(self.pool["recon"]))
        other = self.others(n_other)
        x = torch.cat([self.real[i].float() / 255, self.pool["recon"][j], other])
        meta = torch.cat([self.real_meta[i], self.pool["label"][j]])
        labels = torch.cat([meta[:, 0], torch.full((len(other),), self.other)])
        styles = torch.cat([meta[:, 1], torch.full((len(other),), -1)])
        return self.augment(x), labels, styles

    def augment(self, x: Tensor) -> Tensor:
        dx, dy = (self.pick(2, 9) - 4).tolist()
        x = F.pad(x, (4, 4, 4, 4), mode="replicate")[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]
        if self.pick(1, 3) == 0:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = (x - 0.5) * (0.85 + 0.3 * torch.rand(len(x), 1, 1, 1, generator=self.g)) + 0.5
        return x + torch.randn(x.shape, generator=self.g) * (0.05 * torch.rand(len(x), 1, 1, 1, generator=self.g))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least cross-entropy, by scan."""
    scan = torch.logspace(-1, 1, 81)
    return scan[torch.stack([F.cross_entropy(logits / t, labels) for t in scan]).argmin()].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judge", action="store_true", help="train nothing: measure classifier.pt on what vae.pt draws now")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = Judged(args.work, seed=0)
    net = Classifier(len(demo_concepts()), len(STYLES)).train()
    if args.judge:
        net.load_state_dict(torch.load(args.work / "classifier.pt", weights_only=True))
        evaluate(net.eval(), args.work, data, fit_it=False)
        return
    muon = [p for p in net.parameters() if p.ndim > 1]
    optimizers = [
        Muon(muon, lr=2e-3, weight_decay=0.05),
        torch.optim.AdamW([p for p in net.parameters() if p.ndim == 1], lr=2e-3),
    ]
    start = time.time()
    for step in range(args.steps):
        if step and step % 250 == 0:
            data.refill(2048)
        x, labels, styles = data.batch(96)
        concept, style = net(x)
        loss = F.cross_entropy(concept, labels, label_smoothing=0.05) + 0.5 * F.cross_entropy(style, styles, ignore_index=-1)
        for o in optimizers:
            o.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / args.steps)
            o.zero_grad(set_to_none=True)
        loss.backward()
        for o in optimizers:
            o.step()
        if step % 100 == 0:
            print(f"step {step} {time.time() - start:.0f} s loss {loss.item():.3f}", flush=True)
    evaluate(net.eval(), args.work, data)
    save_atomic(net.state_dict(), args.work / "classifier.pt")


@torch.no_grad()
def evaluate(net: Classifier, work: Path, data: Judged, fit_it: bool = True) -> None:
    """Measures on placements never seen in training; the temperature is fitted to half of them."""
    drawings = np.load(work / "drawings.npz")["concept"]
    x, meta = build(drawings, seed=12345, scales=ANY_SCALE, shifts=ANY_SHIFT, counts=dict.fromkeys(STYLES, 4))
    x, meta = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(meta.astype(np.int64))
    mixed = Judged(work, seed=777)
    sets = {"real": (x, meta[:, 0]), "reconstructed": (torch.cat([mixed.vae(c)[0].clamp(0, 1) for c in x.split(64)]), meta[:, 0]),
            "noise": (mixed.noise(600)[:200], None), "mixed": (mixed.pool["mixed"][:200], None)}  # fmt: skip
    logits = {k: torch.cat([net(c)[0] for c in pictures.split(128)]) for k, (pictures, _) in sets.items()}
    fit = torch.cat([logits["real"][::2], logits["reconstructed"][::2], logits["noise"][::2], logits["mixed"][::2]])
    other = torch.full((200,), data.other)
    labels = torch.cat([meta[::2, 0], meta[::2, 0], other[:100], other[:100]])
    if fit_it:
        net.temperature.fill_(fit_temperature(fit, labels))
    result = {"temperature": round(net.temperature.item(), 3)}
    for k, (_, label) in sets.items():
        p = (logits[k] / net.temperature).softmax(1)
        top = p.argmax(1)
        if label is None:
            result[k] = {"to other": (top == data.other).float().mean().item(), "mean confidence of the rest":
                         p.max(1).values[top != data.other].mean().nan_to_num().item()}  # fmt: skip
        else:
            style = torch.cat([net(c)[1] for c in sets[k][0].split(128)]).argmax(1)
            result[k] = {"accuracy": (top == label).float().mean().item(), "mean confidence": p.max(1).values.mean().item(),
                         "styles": (style == meta[:, 1]).float().mean().item(), "pictures": len(label)}  # fmt: skip
    print(json.dumps(result, indent=1))
    (work / "classifier.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
