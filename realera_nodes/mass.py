"""Many concepts at once: MACE, and RealEra inside MACE's frame.

1. Refinement: one closed form over all concepts (core.refinement). ``realera-mass`` adds what was mined around each.
2. A LoRA for each concept, trained alone from the refined weights: by attention suppression (MACE Eq. 3) or by noise
   alignment (RealEra Eq. 8-9, ``realera-mass``). Finished ones are kept on a shelf, so that a stopped run goes on.
3. Fusion of all LoRAs in one closed form (core.fusion), one after the other: memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .core.adapters import Factors, merged
from .core.alignment import AlignmentConfig
from .core.closed_form import Grams, LowRank, Transform, solve
from .core.concepts import Concept, Preserved, check_together, same
from .core.errors import ErasureError
from .core.fusion import Fusion, concept_gram, naive_sum
from .core.neighbors import NeighborConfig, sample_neighbors
from .core.refinement import RefinementConfig, add_priors, context_rows, in_batches, refine_pairs, retained_gram
from .core.spans import ErasurePair
from .core.suppression import SuppressionConfig, concept_pictures, suppress
from .core.templates import CONTEXTS
from .core.training import TrainState
from .erasure import ErasureConfig, align, make_pairs, mine, trajectories
from .mining import Mined, Progress, prior_gram, silent

METHODS = ("mace", "realera-mass")
FUSIONS = ("closed-form", "sum", "none")


@dataclass(frozen=True)
class MassConfig:
    """Everything a mass erasure is told beside its concepts.

    Attributes:
        method: "mace", or "realera-mass": neighbors join the refinement, and noise alignment trains the LoRAs
        refine: do the closed-form refinement
        fusion: "closed-form" (Eq. 7), "sum" (Eq. 6, the ablation), or "none": no LoRA is trained, the refinement is all
        suppression: of "mace"; alignment, neighbors: of "realera-mass"
    """

    method: str = "mace"
    refine: bool = True
    fusion: str = "closed-form"
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    suppression: SuppressionConfig = field(default_factory=SuppressionConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    neighbors: NeighborConfig = field(default_factory=NeighborConfig)

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("fusion", FUSIONS)):
            if getattr(self, name) not in known:
                raise ErasureError(f'{name} is "{getattr(self, name)}": choose one of {", ".join(known)}.')
        if not self.refine and self.fusion == "none":
            raise ErasureError("refine is off and fusion is none: nothing would be erased; switch one of them on.")

    @property
    def training(self) -> SuppressionConfig | AlignmentConfig:
        """Settings of the LoRAs."""
        return self.suppression if self.method == "mace" else self.alignment


class Shelf(Protocol):
    """Where finished concepts wait: a folder, or nothing at all."""

    def load(self, concept: Concept) -> Factors | None: ...

    def save(self, concept: Concept, factors: Factors) -> None: ...


class NoShelf:
    """Keeps nothing: every run starts anew."""

    def load(self, concept: Concept) -> Factors | None:
        return None

    def save(self, concept: Concept, factors: Factors) -> None:
        pass


@dataclass
class MassErasure:
    """What a mass erasure made: W0 becomes W0 + W0 (T - I) + up @ down.

    Attributes:
        transform: the closed forms' part; factors: the LoRAs' part
        trained: concepts whose LoRA was trained in this run; the others came from the shelf
        losses: by concept, of the LoRAs that were trained in this run
        condition: of the fusion's matrix, or of the refinement's
    """

    concepts: tuple[Concept, ...]
    config: MassConfig
    retained: tuple[Preserved, ...] = ()
    mined: Mined = field(default_factory=Mined)
    transform: Transform | None = None
    factors: Factors = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.config.method

    @cached_property
    def low_rank(self) -> LowRank | None:
        """T - I as thin factors."""
        return self.transform.low_rank() if self.transform is not None else None

    def edits(self, name: str) -> bool:
        """Whether the closed form changes a projection of this name."""
        return self.transform is not None and name.endswith(("attn2.to_k", "attn2.to_v"))

    def touches(self, name: str) -> bool:
        """Whether a projection of this name changes."""
        return self.edits(name) or name in self.factors

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        """The change of one projection (out, d); None where it stays."""
        total = self.transform.delta(weight) if self.transform is not None and self.edits(name) else None
        if name in self.factors:
            lora = merged(self.factors, name).to(weight.device)
            total = lora if total is None else total + lora
        return total

    def deltas(self, projections: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.delta(name, w) for name, w in projections.items()}
        return {name: d for name, d in found.items() if d is not None}


def check_mass(concepts: Sequence[Concept], retained: Sequence[Preserved]) -> None:
    """Raises ErasureError for an empty list, a concept twice, and one that is both erased and retained: it is named."""
    check_together(tuple(concepts))
    erased = [p for c in concepts for p in c.phrases]
    for kept in retained:
        if any(same(kept.phrase, p) for p in erased):
            raise ErasureError(f'"{kept.phrase}" is both erased and retained: keep it on one list.')


def erase_many(
    backend: Any, concepts: Sequence[Concept], config: MassConfig, retained: Sequence[Preserved] = (),
    progress: Progress = silent, shelf: Shelf | None = None, on_state: Callable[[TrainState], None] = lambda state: None,
) -> MassErasure:  # fmt: skip
    """Erases all concepts. The model is left as it is; the result says how its weights change.

    ``on_state`` is called after every step of each concept's training.

    Raises:
        ErasureError: contradictory lists, settings that admit nothing, a damaged model.
    """
    check_mass(concepts, retained)
    work = Work(backend, tuple(concepts), tuple(retained), config, progress, on_state)
    result = MassErasure(work.concepts, config, work.retained, work.mined)
    if config.fusion == "none":
        result.transform = work.refinement
        return result
    shapes = {name: tuple(w.shape) for name, w in backend.projections().items()}
    loras = train_missing(work, result, shelf or NoShelf())
    if config.fusion == "sum":
        summed = naive_sum(((factors, 1.0) for _, factors in loras), shapes, normalise=False)
        result.transform, result.factors = work.refinement, _thin(summed)
        return result
    fusion = Fusion(shapes)
    for concept, factors in loras:
        fusion.add(factors, concept_gram(work.fusion_states(concept), backend.context_width), concept.phrase)
    fused = fusion.solve(config.refinement, work.general, work.domain, work.refinement)
    result.transform, result.factors = fused.transform, fused.factors
    return result


def train_missing(work: Work, result: MassErasure, shelf: Shelf) -> Iterator[tuple[Concept, Factors]]:
    """Each concept's LoRA, from the shelf or trained now; one at a time is in memory."""
    total = len(work.concepts)
    for i, concept in enumerate(work.concepts):
        factors = shelf.load(concept)
        if factors is None:
            factors, state = train_concept(work, i)
            shelf.save(concept, factors)
            result.trained.append(concept.phrase)
            result.losses[concept.phrase] = list(state.losses)
        work.progress("concepts", i + 1, total)
        yield concept, factors


def train_concept(work: Work, index: int) -> tuple[Factors, TrainState]:
    """One concept's LoRA, alone, from the refined weights."""
    concept, backend, config = work.concepts[index], work.backend, work.config
    deltas = work.refined_deltas
    if config.method == "realera-mass":
        group, one = work.groups[index], (concept,)
        runs = trajectories(backend, [group], one, config.alignment, silent)
        settings = ErasureConfig(neighbors=config.neighbors, alignment=config.alignment)
        return align(backend, [group], one, work.mined_of[index], settings, runs, deltas, work.progress,
                     on_state=work.on_state)  # fmt: skip
    own = config.suppression
    prompts = [concept.prompts[0].format(concept.phrase)] * (own.images if concept.images is None else len(concept.images))
    if concept.images is None:
        latents = backend.latents(prompts, [own.seed + k for k in range(own.images)], own.image_steps, own.guidance)
    else:
        latents = backend.encode_pictures(concept.images)
    if concept.masks is not None:
        own = replace(own, mask="given")

    def on_step(now: TrainState) -> None:
        work.progress("suppression", now.step, own.steps)
        work.on_state(now)

    with backend.training(deltas, own) as student:
        pictures = concept_pictures(latents, prompts, concept.phrase, backend.encode, backend.phrase_ids, concept.masks)
        state = suppress(student, pictures, backend.alphas(), own, on_step)
        return student.factors(), state


class Work:
    """What the stages of one mass erasure share, each made when it is first asked for."""

    def __init__(
        self, backend: Any, concepts: tuple[Concept, ...], retained: tuple[Preserved, ...], config: MassConfig,
        progress: Progress, on_state: Callable[[TrainState], None] = lambda state: None,
    ):  # fmt: skip
        self.backend, self.concepts, self.retained, self.config = backend, concepts, retained, config
        self.progress, self.on_state = progress, on_state

    @cached_property
    def groups(self) -> list[list[ErasurePair]]:
        """RealEra's pairs, by concept."""
        return make_pairs(self.backend, self.concepts)

    @cached_property
    def mined_of(self) -> list[Mined]:
        """Words around each concept; none in MACE. A word that one concept erases is not kept for another's sake."""
        if self.config.method == "mace" or not self.config.neighbors.words:
            return [Mined() for _ in self.concepts]
        runs = trajectories(self.backend, self.groups, self.concepts, self.config.alignment, self.progress)
        found = mine(self.backend, self.groups, self.concepts, runs, self.config.neighbors, self.progress)
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
        erased = [p for c in self.concepts for p in c.phrases]
        return prior_gram(self.backend, [*erased, *self.mined.words], self.progress)

    @cached_property
    def domain(self) -> Tensor | None:
        """Sum of p p^T over the retained list and the concepts' own preserved phrases, in their kinds' prompts, (d, d)."""
        kinds = sorted({c.kind for c in self.concepts})
        kept: dict[str, float] = {}
        for kind in kinds:
            templates = CONTEXTS[kind][: self.config.refinement.contexts]
            for p in (*self.retained, *(k for c in self.concepts if c.kind == kind for k in c.preserve)):
                kept |= {t.format(p.phrase): max(p.weight, kept.get(t.format(p.phrase), 0.0)) for t in templates}
        for prompt in self.mined.far:
            kept.setdefault(prompt, 1.0)
        return retained_gram(self.backend.rows, list(kept.items()), self.backend.context_width) if kept else None

    @cached_property
    def refinement(self) -> Transform | None:
        """Eq. 2 and 19 over all concepts; ``realera-mass`` adds random neighbors and named words, by their context rows."""
        if not self.config.refine:
            return None
        own = self.config.refinement
        grams = Grams(self.backend.context_width)
        for e, targets in in_batches(self._rows()):
            grams.erase(e, targets)
        add_priors(grams, own.refinement_prior, own, self.general, self.domain)
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
                yield pair.rows
                samples = sample_neighbors(pair, replace(self.config.neighbors, n=0), generator)
                yield samples.neighbors[:, pair.start :].flatten(0, 1), samples.anchors[:, pair.start :].flatten(0, 1)
            for pair, _ in self.mined.near:
                yield pair.rows

    def _encode_ahead(self, concept: Concept) -> None:
        """One batch in place of two prompts at a time."""
        templates = tuple(concept.templates or CONTEXTS[concept.kind])[: self.config.refinement.contexts]
        self.backend.encode([t.format(p) for p in (*concept.phrases, concept.anchor) for t in templates])

    def fusion_states(self, concept: Concept) -> Iterator[Tensor]:
        """States on which the fused weights should do what this concept's LoRA does, (77, d) each."""
        templates = tuple(concept.templates or CONTEXTS[concept.kind])[: self.config.refinement.contexts]
        yield from self.backend.encode([t.format(p) for p in concept.phrases for t in templates]).states
        if self.config.method == "realera-mass":
            yield from (pair.text.states[0] for pair, _ in self.mined_of[self.concepts.index(concept)].near)

    @cached_property
    def refined_deltas(self) -> dict[str, Tensor]:
        """Where every LoRA starts."""
        if self.refinement is None:
            return {}
        return {name: self.refinement.delta(w) for name, w in self.backend.projections().items()}


def _thin(deltas: dict[str, Tensor]) -> Factors:
    """Full deltas as factors: exact, with an identity on the smaller side."""
    return {n: (d, torch.eye(len(d))) if d.shape[0] <= d.shape[1] else (torch.eye(d.shape[1]), d) for n, d in deltas.items()}
