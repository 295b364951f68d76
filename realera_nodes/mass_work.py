"""What the stages of a mass erasure share: prompts, priors, the refinement, one concept's LoRA, and their fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .core.adapters import Factors
from .core.closed_form import Grams, Transform, solve
from .core.concepts import Concept, Preserved, check_lists
from .core.fusion import Fused, Fusion
from .core.neighbors import sample_neighbors
from .core.refinement import context_rows, in_batches, keep_priors, refine_pairs
from .core.spans import ErasurePair
from .core.suppression import concept_pictures, concept_prompts, suppress
from .core.templates import contexts_of
from .core.training import TrainState
from .erasure import ErasureConfig, align, make_pairs, mine, trajectories
from .mass_config import MassConfig
from .mining import Mined, Progress, prior_gram, silent
from .priors import Prior, domain_gram, kept_prompts
from .resume import Answers


class Work:
    """What the stages of one mass erasure share, each made when it is first asked for.

    Args:
        prior: general and domain prior in place of the shipped captions; its list is kept beside ``retained``
        start: weights' changes that LoRAs are trained from, in place of this work's own refinement
        answers: what the model answered an earlier run that was stopped

    Raises:
        ErasureError: the lists contradict each other, or the prior is another text encoder's. Nothing is computed before.
    """

    def __init__(
        self, backend: Any, concepts: tuple[Concept, ...], retained: tuple[Preserved, ...], config: MassConfig,
        progress: Progress, prior: Prior | None = None, start: Mapping[str, Tensor] | None = None, answers: Answers | None = None,
    ):  # fmt: skip
        check_lists(concepts, (*retained, *(prior.retained if prior else ())))
        if prior is not None:
            prior.require(backend)
        self.backend, self.concepts, self.retained, self.config = backend, concepts, retained, config
        self.progress, self.prior, self._start, self.answers = progress, prior, start, answers or Answers()

    @cached_property
    def groups(self) -> list[list[ErasurePair]]:
        """RealEra's pairs, by concept."""
        return make_pairs(self.backend, self.concepts)

    @cached_property
    def mined_of(self) -> list[Mined]:
        """Words around each concept; none in MACE. A word that one concept erases is not kept for another's sake."""
        if self.config.method == "mace" or not self.config.neighbors.words:
            return [Mined() for _ in self.concepts]
        own, ready = self.config, self.answers
        runs = trajectories(self.backend, self.groups, self.concepts, own.alignment, self.progress, ready)
        found = mine(self.backend, self.groups, self.concepts, runs, own.neighbors, self.progress, answers=ready)
        erased = {pair.prompt for m in found for pair, _ in m.near}
        return [replace(m, far=[p for p in m.far if p not in erased]) for m in found]

    @cached_property
    def mined(self) -> Mined:
        return sum(self.mined_of, Mined())

    @cached_property
    def general(self) -> Tensor | None:
        """Mean Gram of the captions that hold no erased word, (d, d)."""
        if not (self.config.refinement.lambda_1 or self.config.refinement.lambda_2):
            return None
        if self.prior is not None:
            return self.prior.general
        erased = [p for c in self.concepts for p in c.phrases]
        return prior_gram(self.backend, [*erased, *self.mined.words], self.progress, start=True)

    @cached_property
    def domain(self) -> Tensor | None:
        """Sum of p p^T over the retained list and the concepts' own preserved phrases, in their kinds' prompts, (d, d)."""
        phrases = {
            kind: (*self.retained, *(k for c in self.concepts if c.kind == kind for k in c.preserve))
            for kind in sorted({c.kind for c in self.concepts})
        }
        kept = kept_prompts(phrases, self.config.refinement.contexts)
        for prompt in self.mined.far:
            kept.setdefault(prompt, 1.0)
        own = domain_gram(self.backend, kept)
        given = self.prior.domain if self.prior else None
        return own if given is None else given if own is None else own + given

    @cached_property
    def refinement(self) -> Transform | None:
        """Eq. 2 and 19 over all concepts; ``realera-mass`` adds random neighbors and named words, by their context rows."""
        if not self.config.refine:
            return None
        own = self.config.refinement
        grams = Grams(self.backend.context_width)
        for e, targets in in_batches(self._rows()):
            grams.erase(e, targets)
        keep_priors(grams, own, self.general, self.domain)
        self.progress("refinement", 0, 1)
        transform = solve(grams, 1.0, own.ridge, own.max_condition)
        self.progress("refinement", 1, 1)
        return transform

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        own, backend = self.config.refinement, self.backend
        for i, concept in enumerate(self.concepts):
            self.progress("contexts", i, len(self.concepts))
            self._encode_ahead(concept)
            for pair in refine_pairs([concept], backend.encode, backend.phrase_ids, own.contexts):
                yield context_rows(pair, own.head)
        self.progress("contexts", len(self.concepts), len(self.concepts))
        if self.config.method == "realera-mass":
            generator = torch.Generator().manual_seed(self.config.neighbors.seed)
            for pair in (p for group in self.groups for p in group):
                samples = sample_neighbors(pair, replace(self.config.neighbors, n=0), generator)
                yield from _with_head(pair, 1 + len(samples.neighbors) if own.head else 0)
                yield samples.neighbors[:, pair.start :].flatten(0, 1), samples.anchors[:, pair.start :].flatten(0, 1)
            for pair, _ in self.mined.near:
                yield from _with_head(pair, int(own.head))

    def _encode_ahead(self, concept: Concept) -> None:
        """One batch in place of two prompts at a time."""
        templates = contexts_of(concept, self.config.refinement.contexts)
        self.backend.encode([t.format(p) for p in (*concept.phrases, concept.anchor) for t in templates])

    def fusion_states(self, concept: Concept) -> Iterator[Tensor]:
        """States on which the fused weights should do what this concept's LoRA does, (77, d) each."""
        templates = contexts_of(concept, self.config.refinement.contexts)
        yield from self.backend.encode([t.format(p) for p in concept.phrases for t in templates]).states
        if self.config.method == "realera-mass":
            yield from (pair.text.states[0] for pair, _ in self.mined_of[self.concepts.index(concept)].near)

    @cached_property
    def refined_deltas(self) -> dict[str, Tensor]:
        """Where every LoRA starts."""
        if self._start is not None:
            return dict(self._start)
        if self.refinement is None:
            return {}
        return {name: self.refinement.delta(w) for name, w in self.backend.projections().items()}


def _with_head(pair: ErasurePair, times: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A pair's rows, and the words before its phrase so many times, which stay."""
    yield pair.rows
    if times:
        head = pair.head.repeat(times, 1)
        yield head, head


def train_concept(
    work: Work, index: int, on_state: Callable[[TrainState], None] = lambda state: None
) -> tuple[Factors, TrainState]:
    """One concept's LoRA, alone, from the refined weights. ``on_state`` sees every step, with the student at hand."""
    concept, backend, config = work.concepts[index], work.backend, work.config
    deltas = work.refined_deltas
    if config.method == "realera-mass":
        group, one = work.groups[index], (concept,)
        runs = trajectories(backend, [group], one, config.alignment, silent, work.answers)
        settings = ErasureConfig(neighbors=config.neighbors, alignment=config.alignment)
        return align(backend, [group], one, work.mined_of[index], settings, runs, deltas, work.progress, on_state=on_state)
    own = config.suppression
    templates = [concept.prompts[0]] * (own.images if concept.images is None else len(concept.images))
    if concept.images is None:
        prompts = [t.format(concept.phrase) for t in templates]
        latents = backend.latents(prompts, [own.seed + k for k in range(own.images)], own.image_steps, own.guidance)
    else:
        latents = backend.encode_pictures(concept.images)
    if concept.masks is not None:
        own = replace(own, mask="given")
    elif concept.kind == "style" and own.mask == "attention":
        own = replace(own, mask="none")  # among concepts of several kinds: a style has no place in its pictures
    asked = None
    if own.prompts > 1:
        asked = concept_prompts(contexts_of(concept, own.prompts), concept.phrase, backend.encode, backend.phrase_ids)
    with backend.training(deltas, own) as student:
        pictures = concept_pictures(latents, templates, concept.phrase, backend.encode, backend.phrase_ids, concept.masks, asked)

        def seen(state: TrainState) -> None:
            work.progress("suppression", state.step, own.steps)
            on_state(state)

        state = suppress(student, pictures, backend.alphas(), own, seen)
        return student.factors(), state


def fuse(work: Work, loras: Iterable[tuple[Concept, Factors]], refinement: Transform | None) -> Fused:
    """All LoRAs in one closed form (MACE Eq. 7), one at a time in memory.

    Raises:
        ErasureError: there is none, or one was made for another model: its concept is named.
    """
    backend = work.backend
    fusion = Fusion({name: tuple(w.shape) for name, w in backend.projections().items()})
    for concept, factors in loras:
        fusion.add(factors, work.fusion_states(concept), concept.phrase)
    return fusion.solve(work.config.refinement, work.general, work.domain, refinement)
