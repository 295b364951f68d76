"""MACE's importance sampling of timesteps, drawn: the density and what ``draw`` makes of it.

python -m tools.timesteps_plot --out docs/images/cfis.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from realera_nodes.core.timesteps import draw, focal_density, uniform_density
from tools.figures import finish

DRAWS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/cfis.png"))
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    found = draw(DRAWS, torch.Generator().manual_seed(0), focal_density())
    axes.hist(found.numpy(), bins=range(0, 1001, 10), density=True, color="#9ecae1", label=f"{DRAWS:,} draws")
    axes.plot(focal_density(), color="#08519c", label="Eq. 5, t1 = 200, t2 = 400, gamma = 0.05")
    axes.plot(focal_density(gamma=0.5), color="#08519c", linestyle=":", label="the same, gamma = 0.5")
    axes.plot(uniform_density(), color="#636363", linestyle="--", label="uniform")
    axes.set(xlabel="timestep t", ylabel="probability", xlim=(0, 1000), ylim=(0, None))
    finish(figure, [axes], args.out)


if __name__ == "__main__":
    main()
