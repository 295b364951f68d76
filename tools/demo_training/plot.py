"""Loss curves of the logs. ``python -m tools.demo_training.plot --out docs/images/demo-training.png``."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tools.figures import finish


def column(path: Path, name: str) -> list[float]:
    with path.open(encoding="utf-8") as f:
        return [float(row[name]) for row in csv.DictReader(f)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo-training.png"))
    args = parser.parse_args()
    vae, unet = args.work / "vae.csv", args.work / "unet.csv"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, label in (("train_psnr", "training pictures"), ("held_psnr", "drawings never seen")):
        left.plot([s / 60 for s in column(vae, "seconds")], column(vae, name), label=label)
    left.set(title="VAE", xlabel="minutes", ylabel="PSNR (dB)", ylim=(12, None))
    for name, label in (("loss", "all t"), ("loss_low_t", "t < 250"), ("loss_high_t", "t > 600")):
        right.plot([s / 60 for s in column(unet, "seconds")], column(unet, name), label=label)
    right.set(title="UNet", xlabel="minutes", ylabel="noise error", yscale="log")
    finish(figure, [left, right], args.out)


if __name__ == "__main__":
    main()
