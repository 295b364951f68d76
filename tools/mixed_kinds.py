"""A person and a style erased together by MACE from the embedded model, drawn by DDIM and by LCM's scheduler.

    python -m tools.mixed_kinds --out docs/images/mace-mixed.png

Prints what the classifier sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from realera_nodes.backends.loading import load_backend
from realera_nodes.core.concepts import Concept
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.suppression import SuppressionConfig
from realera_nodes.demo.expand import pipeline_path
from realera_nodes.demo.gallery import grid, judge, load_classifier, sample
from realera_nodes.mass import erase_many
from realera_nodes.mass_config import MassConfig

CONCEPTS = (Concept("Mira Voss", "a woman", "person"), Concept("blueprint drawing style", "flat vector style", "style"))
PROMPTS = (
    "a photo of Mira Voss", "a photo of the cat, blueprint drawing style", "a photo of the apple, blueprint drawing style",
    "a photo of Mira Calder", "a photo of Tobin Ashe", "a photo of the cat, glossy 3d style", "a photo of the ship",
)  # fmt: skip
#: the paper's settings for persons; a style among them trains without a mask
CONFIG = MassConfig(refinement=RefinementConfig.for_kind("person"), suppression=SuppressionConfig(guidance=5.0))
SEEDS = (0, 1)
#: name -> (steps, guidance); the embedded model is not distilled, and draws by LCM's steps all the same
SAMPLERS = {"DDIM": (20, 5.0), "LCM": (8, 2.0)}


def drawn(pipe: Any, sampler: str, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """A picture for each (prompt, seed) by one of SAMPLERS; the pipeline keeps its own scheduler."""
    ours, (steps, guidance) = pipe.scheduler, SAMPLERS[sampler]
    if sampler == "LCM":
        pipe.scheduler = LCMScheduler.from_config(ours.config)
    try:
        return sample(pipe, list(prompts), list(seeds), steps, guidance)
    finally:
        pipe.scheduler = ours


def pictures(pipe: Any, classifier: Any) -> dict[str, Tensor]:
    """Of each sampler, (prompts x seeds, 3, 64, 64)."""
    result = {}
    for name in SAMPLERS:
        result[name] = drawn(pipe, name, [p for p in PROMPTS for _ in SEEDS], [*SEEDS] * len(PROMPTS))
        concepts, styles, _ = judge(classifier, result[name])
        for i, prompt in enumerate(PROMPTS):
            own = range(i * len(SEEDS), (i + 1) * len(SEEDS))
            print(f"{name:6} {prompt:46} {', '.join(f'{concepts[k]}/{styles[k]}' for k in own)}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/mace-mixed.png"))
    args = parser.parse_args()
    backend, classifier = load_backend(pipeline_path(), "cpu", torch.float32), load_classifier()
    backend.pipe.set_progress_bar_config(disable=True)
    print("before")
    before = pictures(backend.pipe, classifier)
    deltas = erase_many(backend, CONCEPTS, CONFIG).deltas(backend.projections())
    print("after")
    with backend.edited(deltas):
        after = pictures(backend.pipe, classifier)
    n = len(SEEDS)
    rows = [
        (prompt.removeprefix("a photo of "), f"{when}, {name}", shown[name][i * n : (i + 1) * n])
        for when, name, shown in ((w, s, x) for s in SAMPLERS for w, x in (("before", before), ("after", after)))
        for i, prompt in enumerate(PROMPTS)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, columns=2 * len(SAMPLERS)).save(args.out)


if __name__ == "__main__":
    main()
