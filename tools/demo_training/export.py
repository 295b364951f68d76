"""Stage 7: trained weights to the package's assets. ``python -m tools.demo_training.export``."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from realera_nodes.demo import expand
from realera_nodes.demo.layout import quantize
from realera_nodes.formats.stream import sha256_of

from . import slim_unet, tiny_vae
from .pictures import BACKGROUNDS, STYLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--tag", default="", help="of the UNet trial to export")
    args = parser.parse_args()

    def load(name: str) -> dict:
        return torch.load(args.work / name, weights_only=True)

    unet = {}
    for name, value in load(f"unet{args.tag}.pt").items():
        if value.ndim > 1:
            unet[name], unet[name + ".scale"] = quantize(value)
        else:
            unet[name] = value.half()
    text = load("text.pt")
    assets = {
        "unet": unet,
        "text": {"codes": text["codes"], "logits": text["logits"]},
        "vae": {k: v.half() for k, v in load("vae.pt").items()},
        "classifier": {k: v.half() if v.is_floating_point() and v.ndim else v for k, v in load("classifier.pt").items()},
    }
    for name, state in assets.items():
        save_file({k: v.contiguous() for k, v in state.items()}, expand.ASSETS / f"{name}.safetensors")
    record = {
        "assets": {f"{n}.safetensors": sha256_of(expand.ASSETS / f"{n}.safetensors") for n in assets},
        "styles": {name: words[0] for name, (_, _, words) in STYLES.items()},
        "backgrounds": list(BACKGROUNDS),
        "unet_shapes": slim_unet.padded_shapes(),
        "vae_shapes": tiny_vae.padded_shapes(),
        "expanded": {},
    }
    expand.MANIFEST.write_text(json.dumps(record), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, pipeline = Path(folder, expand.CHECKPOINT), Path(folder, expand.PIPELINE)
        expand.write_checkpoint(checkpoint)
        expand.write_pipeline(pipeline)
        record["expanded"] = {p.name: expand.tree_hash(p) for p in (checkpoint, pipeline)}
    expand.MANIFEST.write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")
    total = sum(p.stat().st_size for p in expand.ASSETS.iterdir())
    print(f"assets: {total / 1e6:.1f} MB", {p.name: round(p.stat().st_size / 1e6, 2) for p in expand.ASSETS.iterdir()})
    if total > 48e6:
        raise SystemExit("the assets exceed 48 MB")


if __name__ == "__main__":
    main()
