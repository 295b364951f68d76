"""The neighborhood of a concept, looked at: samples, words and a 2-D map of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .core.concepts import Concept, check_together
from .core.neighbors import NeighborSamples, sample_neighbors
from .core.spans import ErasurePair
from .erasure import ErasureConfig, make_pairs, mine, trajectories
from .formats.atomic import atomic_file
from .mining import Mined, Progress, silent


@dataclass(frozen=True)
class Neighborhood:
    """A concept, its samples under the first template, and the words around it with their end-of-text states."""

    concept: Concept
    pair: ErasurePair
    samples: NeighborSamples
    mined: Mined
    words: list[str]
    word_states: Tensor
    preserved: list[str]
    preserved_states: Tensor


def survey(
    backend: Any, concepts: Sequence[Concept], config: ErasureConfig, extra: Sequence[str] = (), progress: Progress = silent,
    judge: bool = True, shown: int = 24,
) -> tuple[Mined, list[Neighborhood]]:  # fmt: skip
    """Mines concepts without changing anything, and what is to be drawn around each.

    Args:
        extra: the user's own words to judge
        judge: ask the model about words; without, samples are all that is shown
        shown: words of a map beside ``extra``
    """
    check_together(list(concepts))
    by_concept = make_pairs(backend, concepts)
    each = [Mined({c.phrase: []}) for c in concepts]
    if judge:
        runs = trajectories(backend, by_concept, concepts, config.alignment, progress)
        each = mine(backend, by_concept, concepts, runs, config.neighbors, progress, extra)
    generator = torch.Generator().manual_seed(config.neighbors.seed)
    around = []
    for concept, group, mined in zip(concepts, by_concept, each, strict=True):
        samples = sample_neighbors(group[0], config.neighbors, generator)
        near = [w.word for w in mined.near_of(concept.phrase)]
        stay = [w.word for w in mined.named[concept.phrase] if w.word not in set(near)]
        first = near[: shown - min(shown // 3, len(stay))]  # a third is for words that lie near and stay
        words = list(dict.fromkeys([*first, *extra, *stay, *near]))[: shown + len(extra)]
        kept = [k.phrase for k in concept.preserve]
        states = [_states(backend, concept, phrases) for phrases in (words, kept)]
        around.append(Neighborhood(concept, group[0], samples, mined, words, states[0], kept, states[1]))
    return sum(each, Mined()), around


def _states(backend: Any, concept: Concept, phrases: list[str]) -> Tensor:
    template = concept.prompts[0]
    return backend.end_states([template.format(p) for p in phrases]) if phrases else torch.zeros(0, backend.context_width)


def project(around: Neighborhood) -> dict[str, Tensor]:
    """2-D coordinates by PCA over all shown points, by role: (n, 2) each. The concept is the origin."""
    last = around.pair.stop  # the token after the phrase: end of text in short templates
    e = around.pair.text.states[0, last]
    groups = {
        "concept": e[None], "anchor": around.pair.targets[last][None], "neighbors": around.samples.neighbors[:, last],
        "beyond": around.samples.beyond[:, last], "words": around.word_states, "preserved": around.preserved_states,
    }  # fmt: skip
    everything = torch.cat(list(groups.values())) - e
    _, _, v = torch.pca_lowrank(everything, q=2, center=True, niter=4)
    flip = torch.where(v.sum(0) < 0, -1.0, 1.0)  # a map should not mirror itself from run to run
    return {name: (x - e) @ (v * flip) for name, x in groups.items()}


def draw_map(around: Neighborhood, path: Path, overwrite: bool = False) -> None:
    """The map as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    at = project(around)
    near = set(around.mined.words)
    plt.rcParams["text.parse_math"] = False  # a phrase may hold dollars
    figure, axes = plt.subplots(figsize=(9, 7), dpi=110)
    axes.scatter(*at["beyond"].T, s=16, c="#9db7d5", label=f"beyond-concept samples (kept), {len(at['beyond'])}")
    axes.scatter(*at["neighbors"].T, s=22, c="#e8998d", label=f"neighbor samples (erased), {len(at['neighbors'])}")
    for role, marker, color in (("anchor", "s", "#1b6e3c"), ("concept", "*", "#b3261e")):
        name = around.concept.anchor if role == "anchor" else around.concept.phrase
        axes.scatter(*at[role].T, s=170, marker=marker, c=color, label=f"{role}: {name}", zorder=5)
    for words, states, color in ((around.words, at["words"], ""), (around.preserved, at["preserved"], "#1b6e3c")):
        for text, point in zip(words, states.tolist(), strict=True):
            ink = color or ("#b3261e" if text in near else "#555555")
            axes.plot(*point, ".", color=ink, ms=5)
            axes.annotate(text, point, xytext=(4, 3), textcoords="offset points", color=ink, fontsize=8)
    axes.set_title(f'Around "{around.concept.phrase}": words in red go with it, words in grey stay')
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.legend(loc="best", fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    try:
        with atomic_file(path, overwrite=overwrite) as f:
            figure.savefig(f, format="png")
    finally:
        plt.close(figure)
