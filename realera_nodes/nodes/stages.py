"""The stages of an erasure one by one, as nodes ask for them: mine, edit, train. Values of the pack's sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from ..core.alignment import TrainState, align_noise
from ..core.closed_form import solve
from ..core.concepts import Concept, check_together
from ..core.errors import ErasureError
from ..core.neighbors import NeighborConfig, sample_neighbors
from ..erasure import Erasure, ErasureConfig, Progress, _trajectories, build_grams, kept_prompts, make_pairs
from ..exports import MAX_RANK, EditLora, edit_lora
from ..mining import Mined, mine_words, prior_gram
from ..neighborhood import Neighborhood

SHOWN = 24


@dataclass(frozen=True)
class NeighborSet:
    """The value of REALERA_NEIGHBORS: concepts, what was mined around them, and for which model."""

    concepts: tuple[Concept, ...]
    config: NeighborConfig
    mined: Mined
    clip: Any
    model_hash: str
    encoder_hash: str


def require_same(neighbors: NeighborSet, backend: Any) -> None:
    """Raises ErasureError where neighbors were mined for another model or text encoder."""
    if neighbors.model_hash != backend.model_hash() or neighbors.encoder_hash != backend.encoder_hash():
        raise ErasureError(
            "the neighbors were mined for another model or text encoder: mine them from the MODEL and CLIP used here."
        )


def chosen(concepts: Sequence[Concept] | None, neighbors: NeighborSet | None) -> tuple[Concept, ...]:
    """The concepts of a node that takes them from either input. Raises ErasureError: none, or both and different."""
    if neighbors is not None:
        if concepts and tuple(concepts) != neighbors.concepts:
            raise ErasureError("the concepts differ from those that the neighbors were mined for: connect neighbors only.")
        return neighbors.concepts
    if not concepts:
        raise ErasureError("nothing to erase is connected: connect concepts or neighbors.")
    check_together(tuple(concepts))
    return tuple(concepts)


def mine(
    backend: Any, concepts: tuple[Concept, ...], config: ErasureConfig, extra: Sequence[str], progress: Progress
) -> tuple[Mined, list[Neighborhood]]:  # fmt: skip
    """Words around each concept (none if ``words`` is 0 and no extra ones are given), and its neighborhood to be drawn."""
    check_together(concepts)
    by_concept = make_pairs(backend, concepts)
    generator = torch.Generator().manual_seed(config.neighbors.seed)
    total, around = Mined(), []
    runs = _trajectories(backend, by_concept, concepts, config.alignment, progress) if config.neighbors.words or extra else {}
    for concept, group in zip(concepts, by_concept, strict=True):
        mined = Mined({concept.phrase: []})
        if runs:
            mined = mine_words(backend, concept, concepts, runs[group[0].anchor_prompt], config.neighbors, progress, extra)
        total = total + mined
        samples = sample_neighbors(group[0], config.neighbors, generator)
        near = [w.word for w in mined.near_of(concept.phrase)]
        words = list(dict.fromkeys([*near, *extra, *(w.word for w in mined.named[concept.phrase])]))[: SHOWN + len(extra)]
        kept = [k.phrase for k in concept.preserve]
        states = [_states(backend, concept, phrases) for phrases in (words, kept)]
        around.append(Neighborhood(concept, group[0], samples, mined, words, states[0], kept, states[1]))
    return total, around


def _states(backend: Any, concept: Concept, phrases: list[str]) -> torch.Tensor:
    template = concept.prompts[0]
    return backend.end_states([template.format(p) for p in phrases]) if phrases else torch.zeros(0, backend.context_width)


def edit(backend: Any, concepts: tuple[Concept, ...], mined: Mined, config: ErasureConfig, progress: Progress) -> Erasure:
    """The closed form alone, over what was mined."""
    pairs = [pair for group in make_pairs(backend, concepts) for pair in group]
    generator = torch.Generator().manual_seed(config.neighbors.seed)
    on = config.neighbors
    sampling = replace(on, m=on.m if config.neighbors_on else 0, n=on.n if config.beyond_on else 0)
    samples = (sample_neighbors(pair, sampling, generator) for pair in pairs)  # all together would not fit
    prior = None
    if config.closed_form.prior:
        prior = prior_gram(backend, [*[p for c in concepts for p in c.phrases], *mined.words], progress)
    grams = build_grams(backend, pairs, samples, mined, concepts, config, prior)
    progress("closed form", 0, 1)
    transform = solve(grams, config.closed_form.lambda_1, config.closed_form.ridge, config.closed_form.max_condition)
    progress("closed form", 1, 1)
    return Erasure(concepts, config, mined, transform)


def train(
    backend: Any, concepts: tuple[Concept, ...], mined: Mined, config: ErasureConfig, deltas: Mapping[str, torch.Tensor],
    progress: Progress, on_state: Callable[[TrainState], None],
) -> Erasure:  # fmt: skip
    """The noise alignment alone: the backend's model is the teacher, with ``deltas`` it is where the student starts."""
    by_concept = make_pairs(backend, concepts)
    pairs = [pair for group in by_concept for pair in group]
    runs = _trajectories(backend, by_concept, concepts, config.alignment, progress)
    kept = [*(p for p, _ in kept_prompts(concepts)), *(mined.far if config.beyond_on else [])]
    near = [pair for pair, _ in mined.near] if config.neighbors_on else []
    a = config.alignment
    a = replace(a, neighbors=a.neighbors and config.neighbors_on, beyond=a.beyond and config.beyond_on)

    def on_step(state: TrainState) -> None:
        progress("noise alignment", state.step, a.steps)
        on_state(state)

    kept_states = backend.encode(kept) if kept else None
    with backend.training(deltas, a) as student:
        state = align_noise(
            student, pairs, [runs[p.anchor_prompt] for p in pairs], config.neighbors, a, on_step, None, kept_states,
            near, [runs[p.anchor_prompt] for p in near],
        )  # fmt: skip
        return Erasure(concepts, config, mined, factors=student.factors(), state=state)


def closed_form_lora(erasure: Erasure, weights: Mapping[str, torch.Tensor], max_rank: int = MAX_RANK) -> EditLora:
    """The closed form's edit of the model's own weights as a LoRA."""
    source: Any = SimpleNamespace(architecture=SimpleNamespace(projections=weights), read_projection=weights.__getitem__)
    return edit_lora(erasure, source, max_rank)
