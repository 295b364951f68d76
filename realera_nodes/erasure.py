"""One erasure, start to end: pairs, neighbors, closed form, noise alignment. What the command line, nodes and panel call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .core.adapters import Factors
from .core.alignment import AlignmentConfig, TrainState, Trajectories, align_noise
from .core.closed_form import ClosedFormConfig, Grams, LowRank, Transform, solve
from .core.concepts import Concept, check_together
from .core.neighbors import NeighborConfig, NeighborSamples, sample_neighbors
from .core.spans import ErasurePair, TextStates, make_pair
from .mining import Mined, mine_words, prior_gram


@dataclass(frozen=True)
class ErasureConfig:
    """Everything an erasure is told beside its concepts. The four variants of RealEra's Table 3 are flags here.

    Attributes:
        closed_form_on, alignment_on: components A and B of Table 3
        neighbors_on, beyond_on: components C and D
    """

    closed_form_on: bool = True
    alignment_on: bool = True
    neighbors_on: bool = True
    beyond_on: bool = True
    neighbors: NeighborConfig = field(default_factory=NeighborConfig)
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)


@dataclass
class Erasure:
    """What an erasure made; base weights W0 become W0 + W0 (T - I) + up @ down."""

    concepts: tuple[Concept, ...]
    config: ErasureConfig
    mined: Mined
    transform: Transform | None = None
    factors: Factors = field(default_factory=dict)
    state: TrainState | None = None

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        """The change of one projection (out, d); None where it stays."""
        total = None
        if self.transform is not None and name.endswith(("attn2.to_k", "attn2.to_v")) and self.config.closed_form.edits(name):
            total = self.transform.delta(weight, self.config.closed_form.strength)
        if name in self.factors:
            down, up = self.factors[name]
            lora = (up @ down).to(weight.device)
            total = lora if total is None else total + lora
        return total

    @cached_property
    def low_rank(self) -> LowRank | None:
        """T - I as thin factors: one d x d SVD, done when it is first asked for."""
        return self.transform.low_rank() if self.transform is not None else None

    def touches(self, name: str) -> bool:
        """Whether a projection of this name changes."""
        edited = (
            self.transform is not None and name.endswith(("attn2.to_k", "attn2.to_v")) and self.config.closed_form.edits(name)
        )
        return edited or name in self.factors

    def deltas(self, projections: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.delta(name, w) for name, w in projections.items()}
        return {name: d for name, d in found.items() if d is not None}


#: called with (stage, done, total); may raise to cancel
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


def make_pairs(backend: Any, concepts: Sequence[Concept]) -> list[list[ErasurePair]]:
    """For each concept, its pairs: every phrase in every template."""
    result = []
    for concept in concepts:
        pairs = []
        for phrase in concept.phrases:
            for template in concept.prompts:
                prompt, anchor = template.format(phrase), template.format(concept.anchor)
                pairs.append(make_pair(prompt, anchor, phrase, concept.anchor, backend.encode, backend.phrase_ids))
        result.append(pairs)
    return result


def kept_prompts(concepts: Sequence[Concept]) -> list[tuple[str, float]]:
    """(prompt, weight) of the user's preserved phrases, in their concept's templates."""
    kept: dict[str, float] = {}
    for concept in concepts:
        for preserved in concept.preserve:
            for template in concept.prompts:
                prompt = template.format(preserved.phrase)
                kept[prompt] = max(preserved.weight, kept.get(prompt, 0.0))
    return list(kept.items())


def build_grams(
    backend: Any, pairs: Sequence[ErasurePair], samples: Iterable[NeighborSamples], mined: Mined,
    concepts: Sequence[Concept], config: ErasureConfig, prior: Tensor | None,
) -> Grams:  # fmt: skip
    """The sums of Eq. 7: concepts and neighbors to their anchors; beyond-concept samples, preserved phrases and prior kept."""
    grams = Grams(backend.context_width)
    for pair, sample in zip(pairs, samples, strict=True):
        grams.erase(*pair.rows)
        if config.neighbors_on:
            grams.erase(sample.neighbors[:, pair.start :], sample.anchors[:, pair.start :])
        if config.beyond_on:
            grams.preserve(sample.beyond[:, pair.start :])
    if config.neighbors_on:
        for pair, weight in mined.near:
            grams.erase(*pair.rows, weight=weight)
    if config.beyond_on:
        for prompt in mined.far:
            grams.preserve(backend.encode([prompt]).states[0, 1:])
    for prompt, weight in kept_prompts(concepts):
        grams.preserve(backend.encode([prompt]).states[0, 1:], weight)
    if prior is not None and config.closed_form.prior:
        grams.add_prior(prior * config.closed_form.prior * grams.rows, config.closed_form.prior * grams.rows)
    return grams


def erase(
    backend: Any, concepts: Sequence[Concept], config: ErasureConfig, progress: Progress = silent,
    state: TrainState | None = None, on_state: Callable[[TrainState], None] | None = None,
) -> Erasure:  # fmt: skip
    """Erases concepts from a model. The model itself is left as it is; the result says how its weights change.

    Raises:
        ErasureError: contradictory concepts, settings that admit nothing, a damaged model.
    """
    concepts = tuple(concepts)
    check_together(concepts)
    by_concept = make_pairs(backend, concepts)
    pairs = [p for group in by_concept for p in group]
    asks = config.neighbors_on and config.neighbors.words > 0
    runs = _trajectories(backend, by_concept, concepts, config.alignment, progress) if asks or config.alignment_on else {}
    mined = Mined()
    if asks:
        for concept, group in zip(concepts, by_concept, strict=True):
            mined = mined + mine_words(backend, concept, concepts, runs[group[0].anchor_prompt], config.neighbors, progress)
    result = Erasure(concepts, config, mined)
    if config.closed_form_on:
        generator = torch.Generator().manual_seed(config.neighbors.seed)
        sampling = replace(
            config.neighbors,
            m=config.neighbors.m if config.neighbors_on else 0,
            n=config.neighbors.n if config.beyond_on else 0,
        )
        # a generator: with many concepts all samples together would not fit
        samples = (sample_neighbors(p, sampling, generator) for p in pairs)
        erased = [phrase for c in concepts for phrase in c.phrases]
        prior = prior_gram(backend, [*erased, *mined.words], progress) if config.closed_form.prior else None
        grams = build_grams(backend, pairs, samples, mined, concepts, config, prior)
        progress("closed form", 0, 1)
        result.transform = solve(grams, config.closed_form.lambda_1, config.closed_form.ridge, config.closed_form.max_condition)
        progress("closed form", 1, 1)
    if config.alignment_on:
        _align(backend, pairs, runs, mined, result, progress, state, on_state)
    return result


def _trajectories(backend, by_concept, concepts, config: AlignmentConfig, progress: Progress) -> dict[str, Trajectories]:
    """Anchor trajectories of the original model by anchor prompt: one template a concept stands for all of them."""
    runs: dict[str, Trajectories] = {}
    made: dict[str, Trajectories] = {}
    for i, (concept, group) in enumerate(zip(concepts, by_concept, strict=True)):
        progress("anchor trajectories", i, len(concepts))
        first = concept.prompts[0].format(concept.anchor)
        if first not in made:
            made[first] = backend.trajectories(first, config.trajectories, config.trajectory_steps, config.guidance, config.seed)
        runs.update({pair.anchor_prompt: made[first] for pair in group})
    progress("anchor trajectories", len(concepts), len(concepts))
    return runs


def _align(backend, pairs, runs, mined: Mined, result: Erasure, progress: Progress, state, on_state) -> None:
    config = result.config
    alignment = config.alignment
    kept = kept_prompts(result.concepts)
    prompts = [p for p, _ in kept] + (mined.far if config.beyond_on else [])
    kept_states: TextStates | None = backend.encode(prompts) if prompts else None
    near = [pair for pair, _ in mined.near] if config.neighbors_on else []
    base = backend.projections()
    deltas = {n: d for n in base if (d := result.delta(n, base[n])) is not None}

    def on_step(now: TrainState) -> None:
        progress("noise alignment", now.step, alignment.steps)
        if on_state:
            on_state(now)

    alignment = replace(
        alignment, neighbors=alignment.neighbors and config.neighbors_on, beyond=alignment.beyond and config.beyond_on
    )
    with backend.training(deltas, alignment) as student:
        result.state = align_noise(
            student,
            pairs,
            [runs[p.anchor_prompt] for p in pairs],
            config.neighbors,
            alignment,
            on_step,
            state,
            kept_states,
            near,
            [runs[p.anchor_prompt] for p in near],
        )
        result.factors = student.factors()


__all__ = ["Erasure", "ErasureConfig", "build_grams", "erase", "make_pairs"]
