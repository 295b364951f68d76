"""One erasure, start to end: pairs, neighbors, closed form, noise alignment. What the command line, nodes and panel call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .core.adapters import Factors
from .core.alignment import AlignmentConfig, Trajectories, align_noise
from .core.closed_form import ClosedFormConfig, Grams, LowRank, Transform, solve
from .core.concepts import Concept, check_together
from .core.neighbors import NeighborConfig, NeighborSamples, sample_neighbors
from .core.prior import mean_gram
from .core.spans import ErasurePair, make_pair
from .core.training import TrainState
from .mining import Mined, Progress, mine_words, prior_gram, silent
from .outcome import Outcome
from .resume import Answers

#: words that the noise alignment keeps, at most: their states are held in memory
KEPT = 256


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
class Erasure(Outcome):
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
        if self.transform is not None and self.edits(name):
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

    def edits(self, name: str) -> bool:
        """Whether the closed form changes a projection of this name."""
        selected = name.endswith(("attn2.to_k", "attn2.to_v")) and self.config.closed_form.edits(name)
        return self.transform is not None and selected

    def touches(self, name: str) -> bool:
        """Whether a projection of this name changes."""
        return self.edits(name) or name in self.factors

    @property
    def losses(self) -> list[float]:  # type: ignore[override]
        """Of the noise alignment, by step."""
        return self.state.losses if self.state else []

    @property
    def method(self) -> str:  # type: ignore[override]
        """ "realera", or which of its parts ran."""
        c = self.config
        parts = {"closed-form": c.closed_form_on, "noise-alignment": c.alignment_on, "neighbors": c.neighbors_on,
                 "beyond-concept": c.beyond_on}  # fmt: skip
        return "realera" if all(parts.values()) else "realera: " + " + ".join(n for n, on in parts.items() if on)


def make_pairs(backend: Any, concepts: Sequence[Concept]) -> list[list[ErasurePair]]:
    """For each concept, its pairs: every phrase in every template."""
    result = []
    for concept in concepts:
        pairs = []
        for phrase in concept.phrases:
            for template in concept.prompts:
                pairs.append(make_pair(template, phrase, concept.anchor, backend.encode, backend.phrase_ids))
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
    """The sums of Eq. 7: concepts and neighbors to their anchors; beyond-concept samples, preserved phrases and prior kept.

    Every erased prompt's own head (``ErasurePair.head``) stays with it, which the paper does not say: the start token is in every
    prompt, the empty one among them, and an edit that forgets it moves every picture's unconditional half.
    """
    grams = Grams(backend.context_width)
    head = config.closed_form.head

    def keep(mean: Tensor, weight: float) -> float:
        """Keeps a mean Gram, as so many rows for each erased one; says how many those are."""
        rows = weight * grams.rows
        grams.add_prior(mean * rows, rows)
        return rows

    for pair, sample in zip(pairs, samples, strict=True):
        grams.erase(*pair.rows)
        prompts = 1
        if config.neighbors_on:
            grams.erase(sample.neighbors[:, pair.start :], sample.anchors[:, pair.start :])
            prompts += len(sample.neighbors)
        if head:
            grams.hold(pair.head, head * prompts)
        if config.beyond_on:
            grams.preserve(sample.beyond[:, pair.start :])
    if config.neighbors_on:
        for pair, weight in mined.near:
            grams.erase(*pair.rows, weight=weight)
            if head:
                grams.hold(pair.head, head * weight)
    own = 1.0
    if config.beyond_on and mined.far and config.closed_form.beyond:
        rows = keep(mean_gram(backend.rows, mined.far, backend.context_width), config.closed_form.beyond)
        # what the user asks to keep weighs no less than what was mined
        own = max(1.0, rows / (len(mined.far) * pairs[0].text.states.shape[1]))
    for prompt, weight in kept_prompts(concepts):
        grams.preserve(backend.encode([prompt]).states[0], own * weight)
    if prior is not None and config.closed_form.prior:
        keep(prior, config.closed_form.prior)
    return grams


def erase(
    backend: Any, concepts: Sequence[Concept], config: ErasureConfig, progress: Progress = silent,
    state: TrainState | None = None, on_state: Callable[[TrainState], None] | None = None, answers: Answers | None = None,
) -> Erasure:  # fmt: skip
    """Erases concepts from a model. The model itself is left as it is; the result says how its weights change.

    ``state`` and ``answers`` are an earlier run's, which was stopped.

    Raises:
        ErasureError: contradictory concepts, settings that admit nothing, a damaged model.
    """
    concepts = tuple(concepts)
    check_together(concepts)
    by_concept = make_pairs(backend, concepts)
    asks = config.neighbors_on and config.neighbors.words > 0
    draws = asks or config.alignment_on
    runs = trajectories(backend, by_concept, concepts, config.alignment, progress, answers) if draws else {}
    found = mine(backend, by_concept, concepts, runs, config.neighbors, progress, answers=answers) if asks else []
    mined = sum(found, Mined())
    result = Erasure(concepts, config, mined)
    if config.closed_form_on:
        result.transform = edit(backend, by_concept, concepts, mined, config, progress)
    if config.alignment_on:
        deltas = result.deltas(backend.projections())
        result.factors, result.state = align(
            backend, by_concept, concepts, mined, config, runs, deltas, progress, state, on_state
        )
    return result


#: for each concept its pairs, as ``make_pairs`` gives them
Groups = Sequence[Sequence[ErasurePair]]


def trajectories(
    backend: Any, by_concept: Groups, concepts: Sequence[Concept], config: AlignmentConfig, progress: Progress,
    answers: Answers | None = None,
) -> dict[str, Trajectories]:  # fmt: skip
    """Anchor trajectories of the original model by anchor prompt: one template a concept stands for all of them."""
    runs: dict[str, Trajectories] = {}
    made: dict[str, Trajectories] = {}
    for i, (concept, group) in enumerate(zip(concepts, by_concept, strict=True)):
        progress("anchor trajectories", i, len(concepts))
        first = concept.prompts[0].format(concept.anchor)
        if first not in made:
            made[first] = _drawn(backend, first, config, answers or Answers())
        runs.update({pair.anchor_prompt: made[first] for pair in group})
    progress("anchor trajectories", len(concepts), len(concepts))
    return runs


def _drawn(backend: Any, prompt: str, config: AlignmentConfig, answers: Answers) -> Trajectories:
    settings = prompt, config.trajectories, config.trajectory_steps, config.guidance, config.seed
    return Trajectories(**answers.once([*settings], lambda: vars(backend.trajectories(*settings))))


def mine(
    backend: Any, by_concept: Groups, concepts: Sequence[Concept], runs: Mapping[str, Trajectories], config: NeighborConfig,
    progress: Progress, extra: Sequence[str] = (), answers: Answers | None = None,
) -> list[Mined]:  # fmt: skip
    """Words around each concept; added up they are what an edit takes. ``extra`` are the user's own words to judge."""
    return [
        mine_words(backend, concept, concepts, runs[group[0].anchor_prompt], config, progress, extra, answers)
        for concept, group in zip(concepts, by_concept, strict=True)
    ]


def edit(
    backend: Any, by_concept: Groups, concepts: Sequence[Concept], mined: Mined, config: ErasureConfig, progress: Progress
) -> Transform:
    """The closed form over concepts and what was mined around them (Eq. 7)."""
    pairs = [pair for group in by_concept for pair in group]
    generator = torch.Generator().manual_seed(config.neighbors.seed)
    on = config.neighbors
    sampling = replace(on, m=on.m if config.neighbors_on else 0, n=on.n if config.beyond_on else 0)
    # a generator: with many concepts all samples together would not fit
    samples = (sample_neighbors(pair, sampling, generator) for pair in pairs)
    erased = [phrase for c in concepts for phrase in c.phrases]
    prior = prior_gram(backend, [*erased, *mined.words], progress) if config.closed_form.prior else None
    grams = build_grams(backend, pairs, samples, mined, concepts, config, prior)
    progress("closed form", 0, 1)
    transform = solve(grams, config.closed_form.lambda_1, config.closed_form.ridge, config.closed_form.max_condition)
    progress("closed form", 1, 1)
    return transform


def align(
    backend: Any, by_concept: Groups, concepts: Sequence[Concept], mined: Mined, config: ErasureConfig,
    runs: Mapping[str, Trajectories], deltas: Mapping[str, Tensor], progress: Progress,
    state: TrainState | None = None, on_state: Callable[[TrainState], None] | None = None,
) -> tuple[Factors, TrainState]:  # fmt: skip
    """The noise alignment (Eq. 8-9): the backend's model is the teacher, with ``deltas`` it is where the student starts."""
    pairs = [pair for group in by_concept for pair in group]
    far = mined.far[:: -(-len(mined.far) // KEPT)] if config.beyond_on and mined.far else []
    kept = [*(prompt for prompt, _ in kept_prompts(concepts)), *far]
    near = [pair for pair, _ in mined.near] if config.neighbors_on else []
    a = config.alignment
    a = replace(a, neighbors=a.neighbors and config.neighbors_on, beyond=a.beyond and config.beyond_on)

    def on_step(now: TrainState) -> None:
        progress("noise alignment", now.step, a.steps)
        if on_state:
            on_state(now)

    kept_states = backend.encode(kept) if kept else None
    with backend.training(deltas, a) as student:
        trained = align_noise(
            student, pairs, [runs[p.anchor_prompt] for p in pairs], config.neighbors, a, on_step, state, kept_states,
            near, [runs[p.anchor_prompt] for p in near],
        )  # fmt: skip
        return student.factors(), trained
