"""What mass erasures keep, as sums that are built once and used again: general knowledge, and a list of one's own.

Every token of a prompt counts, the start token and all padding too, as in MACE's public code.

Both of MACE's closed forms read no more of them than two d x d matrices (core.refinement.add_priors). They depend on the
text encoder alone, so that a file of them serves every model that shares it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .core.concepts import Preserved
from .core.errors import ErasureError
from .core.prior import captions
from .core.refinement import retained_gram
from .core.templates import CONTEXTS
from .formats.stream import SafetensorsFile, write_tensors
from .mining import Progress, prior_gram, silent

PREFIX = "realera.prior."


@dataclass(frozen=True)
class Prior:
    """Sums over text states of width d.

    Attributes:
        general: mean of p p^T over captions, (d, d) float64
        domain: sum of w p p^T over the retained list, (d, d) float64; None: nothing is retained
        retained: the list, so that a concept that is erased and retained is found
        without: phrases whose captions were left out
        captions: how many captions there are
        encoder: hash of the text encoder
    """

    general: Tensor
    domain: Tensor | None
    retained: tuple[Preserved, ...]
    without: tuple[str, ...]
    captions: int
    encoder: str

    def require(self, backend: Any) -> None:
        """Raises ErasureError for a model with another text encoder."""
        if self.encoder != backend.encoder_hash() or self.general.shape[0] != backend.context_width:
            raise ErasureError("the prior was built for another text encoder: build it with the CLIP that is used here.")


def kept_prompts(by_kind: Mapping[str, Sequence[Preserved]], contexts: int = 30) -> dict[str, float]:
    """Retained phrases in the prompts of their kinds, with their weights. A prompt counts once, by its largest weight."""
    kept: dict[str, float] = {}
    for kind, phrases in by_kind.items():
        for p in phrases:
            for prompt in (t.format(p.phrase) for t in CONTEXTS[kind][:contexts]):
                kept[prompt] = max(p.weight, kept.get(prompt, 0.0))
    return kept


def domain_gram(backend: Any, kept: Mapping[str, float]) -> Tensor | None:
    """Sum of w p p^T over all tokens of prompts with weights w, (d, d); None where there is none."""
    return retained_gram(partial(backend.rows, start=True), list(kept.items()), backend.context_width) if kept else None


def build_prior(
    backend: Any, retained: Sequence[Preserved] = (), kinds: Sequence[str] = ("object",), without: Sequence[str] = (),
    own: Sequence[str] | None = None, contexts: int = 30, progress: Progress = silent,
) -> Prior:  # fmt: skip
    """The prior of a text encoder.

    Args:
        retained: what must stay, under the prompts of ``kinds``
        without: phrases to be erased: captions that hold one are left out
        own: captions in place of the shipped ones

    Raises:
        ErasureError: no caption is left.
    """
    general = prior_gram(backend, without, progress, own, start=True)
    progress("retained concepts", 0, 1)
    domain = domain_gram(backend, kept_prompts(dict.fromkeys(kinds, retained), contexts))
    progress("retained concepts", 1, 1)
    return Prior(general, domain, tuple(retained), tuple(without), len(captions(without, own)), backend.encoder_hash())


def write_prior(path: Path, prior: Prior, overwrite: bool = False) -> None:
    """A safetensors file, whole or not at all. Raises ErasureError: it cannot be written."""
    tensors = {"general": prior.general} | ({} if prior.domain is None else {"domain": prior.domain})
    facts = {
        "retained": [asdict(p) for p in prior.retained], "without": prior.without, "captions": prior.captions,
        "encoder": prior.encoder,
    }  # fmt: skip
    write_tensors(path, tensors, {PREFIX + key: json.dumps(value) for key, value in facts.items()}, overwrite)


def read_prior(path: Path) -> Prior:
    """What ``write_prior`` wrote. Raises ErasureError: no such file, damaged, or no prior."""
    file = SafetensorsFile.open(path)
    if PREFIX + "encoder" not in file.metadata or "general" not in file.entries:
        raise ErasureError(f"{path.name} holds no prior: choose a file that Save Prior wrote.")
    try:
        facts = {key: json.loads(file.metadata[PREFIX + key]) for key in ("retained", "without", "captions", "encoder")}
        retained = tuple(Preserved(**p) for p in facts["retained"])
        without, captioned, encoder = tuple(facts["without"]), int(facts["captions"]), str(facts["encoder"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ErasureError(f"{path.name} is damaged ({error}): build the prior again.") from error
    general, domain = file.read("general"), file.read("domain") if "domain" in file.entries else None
    for matrix in (general, domain):
        odd = matrix is not None and (not matrix.is_floating_point() or matrix.shape != general.shape or matrix.ndim != 2)
        if odd or (matrix is not None and not torch.isfinite(matrix).all()):
            raise ErasureError(f"{path.name} is damaged: build the prior again.")
    return Prior(general, domain, retained, without, captioned, encoder)
