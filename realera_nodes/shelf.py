"""Finished concepts of a mass erasure, a LoRA file each: a stopped run does not train them again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .cache import cached, keep, read_or
from .core.adapters import Factors
from .core.concepts import Concept, Preserved
from .formats.architecture import Kind
from .formats.checkpoint import Checkpoint
from .formats.lora import read_lora, write_lora
from .formats.metadata import ErasureMetadata
from .mass_config import MassConfig
from .priors import Prior
from .resume import described
from .settings import as_table


@dataclass(frozen=True)
class Base:
    """The model that a shelf's LoRAs belong to.

    Attributes:
        projections: names of its layers; kind: "sd1", "sd2" or "sdxl"
        sha256: what tells it from other models; name: what people call it
        metadata: its file's
        prediction: "epsilon" or "v_prediction", if it is known
        size: side of the pictures in pixels that they are trained on; None: the model's own
    """

    projections: tuple[str, ...]
    kind: Kind
    sha256: str
    name: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    prediction: str | None = None
    size: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, sha256: str = "", prediction: str | None = None, size: int | None = None) -> Base:
        """A checkpoint's, whose file is hashed for it where ``sha256`` is not known yet; ``prediction`` if not as it says."""
        architecture = checkpoint.architecture
        names = tuple(architecture.projections)
        predicts = checkpoint.prediction(prediction).type
        sha256 = sha256 or checkpoint.sha256()
        return cls(names, architecture.kind, sha256, checkpoint.path.name, checkpoint.metadata, predicts, size)


#: raised where LoRAs of the same settings come out otherwise than before: finished ones are then trained anew
RULES = 2


class FolderShelf:
    """LoRA files in a folder, whole or not at all, named by the concept and by all that decides what it becomes.

    Args:
        folder: where they are kept
        key: hash of model, settings, and all concepts: each LoRA starts from weights that were refined for all of them
        base: for names of its layers and for the files' metadata
    """

    def __init__(self, folder: Path, key: str, base: Base, config: MassConfig):
        self.folder, self.key, self.base, self.config = folder, key, base, config

    @classmethod
    def of(
        cls, concepts: Sequence[Concept], retained: Sequence[Preserved], config: MassConfig, base: Base,
        folder: Path | None = None, prior: Prior | None = None,
    ) -> FolderShelf:  # fmt: skip
        """A shelf in the user's cache, or in ``folder``."""
        where = folder or cached("concepts", "x").parent
        settings = as_table(config)
        for unused in ("fusion", "alignment" if config.method == "mace" else "suppression"):
            del settings[unused]  # they do not change a LoRA
        facts = [
            RULES,
            base.sha256,
            base.prediction,
            base.size,
            settings,
            [described(c) for c in concepts],
            [asdict(p) for p in retained],
        ]
        facts += [prior_hash(prior)] if prior else []
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(where, key, base, config)

    def path(self, concept: Concept) -> Path:
        """The concept's file, there or not."""
        own = hashlib.sha256(json.dumps(described(concept), sort_keys=True).encode()).hexdigest()[:8]
        words = re.sub(r"[^a-z0-9]+", "-", concept.phrase.casefold()).strip("-")[:40]
        return self.folder / f"{words}-{own}-{self.key}.safetensors"

    def load(self, concept: Concept) -> Factors | None:
        """The finished LoRA, or None where there is none that can be read."""
        return read_or(self.path(concept), lambda p: read_lora(p, self.base.projections), f'the LoRA of "{concept.phrase}"')

    def save(self, concept: Concept, factors: Factors) -> None:
        """Writes a finished LoRA in float32. Where it cannot be kept, a line tells: another run would train it again."""
        metadata = ErasureMetadata(
            f"{self.config.method}: one concept's LoRA", (concept.phrase,), (concept.anchor,), config=as_table(self.config),
            base_sha256=self.base.sha256, base_name=self.base.name, kinds=(concept.kind,),
        )  # fmt: skip
        ranks = {n: down.shape[0] for n, (down, _) in factors.items()}
        text = metadata.to_safetensors(self.base.kind, ranks, self.base.metadata, self.base.prediction)
        keep(self.path(concept), lambda p: write_lora(p, factors, text, torch.float32, overwrite=True),
             f'the LoRA of "{concept.phrase}"')  # fmt: skip


def prior_hash(prior: Prior) -> str:
    """Names a prior by its sums."""
    digest = hashlib.sha256()
    for matrix in (prior.general, prior.domain):
        digest.update(b"" if matrix is None else matrix.numpy().tobytes())
    return digest.hexdigest()[:16]
