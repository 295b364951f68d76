"""Stage 1: drawings and pictures. ``python -m tools.demo_training.dataset`` after ``npm ci`` in this folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from realera_nodes.demo.concepts import demo_concepts

from . import art, pictures


def sheet(images: np.ndarray, path: Path, columns: int = 20, rows: int = 12) -> None:
    """A contact sheet of random pictures, to look at before anything is trained on them."""
    pick = np.random.default_rng(0).permutation(len(images))[: columns * rows]
    tiles = images[pick].reshape(rows, columns, 64, 64, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(tiles.reshape(rows * 64, columns * 64, 3)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--node-modules", type=Path, default=Path(__file__).parent / "node_modules")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    drawings = art.render_all(args.node_modules, [c.slug for c in demo_concepts()])
    np.savez(args.work / "drawings.npz", **drawings)  # type: ignore[arg-type]
    concept, meta = pictures.build(drawings["concept"])  # for the UNet
    anywhere, anywhere_meta = pictures.build(
        drawings["concept"],
        seed=3,
        scales=pictures.ANY_SCALE,
        shifts=pictures.ANY_SHIFT,
        counts={"flat": 150, "glossy": 44, "storybook": 44, "sepia": 26, "blueprint": 26},
    )  # for the VAE and the classifier
    filler = pictures.build_filler(drawings["filler"], 4, seed=1)
    held_out = pictures.build_filler(drawings["held_out"], 2, seed=2)
    np.savez(args.work / "pictures.npz", X=concept, M=meta, J=anywhere, JM=anywhere_meta, F=filler, H=held_out)
    sheet(concept, args.work / "pictures.png")
    print({k: v.shape for k, v in drawings.items()}, concept.shape, filler.shape, held_out.shape)


if __name__ == "__main__":
    main()
