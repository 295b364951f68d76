"""Finished concepts of a mass erasure, a LoRA file each: a stopped run does not train them again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from platformdirs import user_cache_path

from .core.adapters import Factors
from .core.concepts import Concept, Preserved
from .formats.checkpoint import Checkpoint
from .formats.lora import read_lora, write_lora
from .formats.metadata import ErasureMetadata
from .mass import MassConfig
from .resume import described
from .settings import as_table


class FolderShelf:
    """LoRA files in a folder, whole or not at all, named by the concept and by all that decides what it becomes.

    Args:
        folder: where they are kept
        key: hash of model, settings, and all concepts: each LoRA starts from weights that were refined for all of them
        base: the checkpoint, for names of its layers and for the files' metadata
    """

    def __init__(self, folder: Path, key: str, base: Checkpoint, config: MassConfig, sha256: str):
        self.folder, self.key, self.base, self.config, self.sha256 = folder, key, base, config, sha256

    @classmethod
    def of(
        cls, concepts: Sequence[Concept], retained: Sequence[Preserved], config: MassConfig, base: Checkpoint, sha256: str,
        folder: Path | None = None,
    ) -> FolderShelf:  # fmt: skip
        """A shelf in the user's cache, or in ``folder``."""
        where = folder or user_cache_path("realera-nodes", appauthor=False) / "concepts"
        settings = as_table(config)
        for unused in ("fusion", "alignment" if config.method == "mace" else "suppression"):
            del settings[unused]  # they do not change a LoRA
        facts = [sha256, settings, [described(c) for c in concepts], [asdict(p) for p in retained]]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(where, key, base, config, sha256)

    def path(self, concept: Concept) -> Path:
        """The concept's file, there or not."""
        own = hashlib.sha256(json.dumps(described(concept), sort_keys=True).encode()).hexdigest()[:8]
        words = re.sub(r"[^a-z0-9]+", "-", concept.phrase.casefold()).strip("-")[:40]
        return self.folder / f"{words}-{own}-{self.key}.safetensors"

    def load(self, concept: Concept) -> Factors | None:
        """The finished LoRA, or None. ErasureError: the file is damaged."""
        path = self.path(concept)
        return read_lora(path, self.base.architecture.projections) if path.exists() else None

    def save(self, concept: Concept, factors: Factors) -> None:
        """Writes a finished LoRA in float32. ErasureError: it cannot be written."""
        metadata = ErasureMetadata(
            f"{self.config.method}: one concept's LoRA", (concept.phrase,), (concept.anchor,), config=as_table(self.config),
            base_sha256=self.sha256, base_name=self.base.path.name,
        )  # fmt: skip
        ranks = {n: down.shape[0] for n, (down, _) in factors.items()}
        path = self.path(concept)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = metadata.to_safetensors(self.base.architecture.kind, ranks, self.base.metadata)
        write_lora(path, factors, text, torch.float32, overwrite=True)
