"""The stages of a mass erasure one by one, as nodes ask for them. Values of the sockets REALERA_LORAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.concepts import Concept, Preserved
from ..core.errors import ErasureError
from ..formats.lora import read_lora
from ..formats.metadata import ErasureMetadata
from ..formats.stream import SafetensorsFile
from ..mass import MassErasure, combine
from ..mass_config import MassConfig
from ..mass_work import Work, train_concept
from ..mining import Progress, silent
from ..priors import Prior

#: methods as records name them
REFINED, SUPPRESSED, FUSED = "mace: refinement", "mace: one concept's LoRA", "mace: fusion"


@dataclass(frozen=True)
class ConceptLora:
    """One LoRA and the concept that it erases; ``source`` is an ErasureLora, or a file that is read when it is fused."""

    concept: Concept
    source: Any

    def factors(self, backend: Any) -> Any:
        """Name -> (down, up). Raises ErasureError: an unusable file, or another model's."""
        return read_lora(self.source, backend.names) if isinstance(self.source, Path) else self.source.factors


def lora_of(source: Any, concept: Concept | None = None) -> ConceptLora:
    """A LoRA with its concept: the one that is given, else what it says of itself.

    Raises:
        ErasureError: it does not say, or it erases several concepts at once.
    """
    if concept is not None:
        return ConceptLora(concept, source)
    if isinstance(source, Path):
        said: Any = ErasureMetadata.from_safetensors(SafetensorsFile.open(source).metadata)
        name = source.name
    else:
        said, name = source.record, "the LoRA"
    if said is None or not said.concepts:
        raise ErasureError(f"{name} does not say which concept it erases: add it by Add Erasure LoRA with its concept connected.")
    if len(said.concepts) > 1:
        raise ErasureError(f"{name} erases {len(said.concepts)} concepts at once: fusion takes LoRAs of one concept each.")
    return ConceptLora(Concept(said.concepts[0], said.anchors[0], (*said.kinds, "object")[0]), source)


def refine(
    backend: Any, concepts: Sequence[Concept], retained: Sequence[Preserved], config: MassConfig, prior: Prior | None,
    progress: Progress,
) -> MassErasure:  # fmt: skip
    """The refinement alone. Raises ErasureError: contradictory lists, a prior of another encoder."""
    work = Work(backend, tuple(concepts), tuple(retained), config, progress, prior)
    return MassErasure(work.concepts, config, work.retained, transform=work.refinement)


def suppress(
    backend: Any, concept: Concept, config: MassConfig, start: Mapping[str, Any], progress: Progress,
    on_state: Callable[[Any], None],
) -> MassErasure:  # fmt: skip
    """One concept's LoRA, from weights that ``start`` says the change of."""
    work = Work(backend, (concept,), (), config, progress, start=start)
    factors, state = train_concept(work, 0, on_state)
    return MassErasure((concept,), config, factors=factors, losses={concept.phrase: list(state.losses)})


def fuse_loras(
    backend: Any, loras: Sequence[ConceptLora], retained: Sequence[Preserved], config: MassConfig, prior: Prior | None,
    refinement: Any, progress: Progress,
) -> MassErasure:  # fmt: skip
    """All LoRAs as one edit, by the fusion of ``config``. Raises ErasureError: two of one concept, one of another model."""
    concepts = tuple(x.concept for x in loras)
    work = Work(backend, concepts, tuple(retained), config, silent, prior)

    def one_by_one() -> Iterator[tuple[Concept, Any]]:
        for i, lora in enumerate(loras):
            progress("LoRAs", i, len(loras))
            yield lora.concept, lora.factors(backend)
        progress("LoRAs", len(loras), len(loras))

    transform, factors = combine(work, one_by_one(), refinement)
    return MassErasure(concepts, config, work.retained, transform=transform, factors=factors)
