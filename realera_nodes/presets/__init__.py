"""The papers' own lists and settings as data: what to erase, what to keep, with what hyper-parameters, and how to measure it.

Each file of this folder is a family of sets; a preset is one set, with the family's values where it has none of its own.
Lists and numbers are the papers', character for character; what a paper does not print is not here, and the files say so.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from ..core.concepts import Concept, check_together, same
from ..core.errors import ErasureError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRIORS = ("captions", "weights")


@dataclass(frozen=True)
class MethodTable:
    """Hyper-parameters of MACE as its Table 10 and section 3.2 print them.

    Attributes:
        steps, lr, rank: of each concept's LoRA
        images: pictures of each concept that its LoRA is trained on
        t1, t2, gamma: of the timestep density (Eq. 5)
        lambda_1: weight of the general prior in the refinement (Eq. 1, 19), or of ||W' - W||^2 where prior is "weights"
        lambda_2: the same in the fusion (Eq. 7)
        lambda_3: weight of the domain prior, made from the retained phrases; None: there is none
        prior: "captions" (general knowledge from captions) or "weights" (||W' - W||^2 in its place: the object variant)
    """

    steps: int
    lr: float
    rank: int
    images: int
    t1: float
    t2: float
    gamma: float
    lambda_1: float
    lambda_2: float
    prior: str
    lambda_3: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "images"):
            if getattr(self, name) < 1:
                raise ErasureError(f"{name} of a preset is {getattr(self, name)}: it must be 1 or more.")
        for name in ("lr", "gamma", "lambda_1", "lambda_2", "lambda_3"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ErasureError(f"{name} of a preset is {value}: it must be above 0 and finite.")
        if not 0 <= self.t1 < self.t2:
            raise ErasureError(f"t1 and t2 of a preset are {self.t1} and {self.t2}: t1 must be 0 or more and below t2.")
        if self.prior not in PRIORS:
            raise ErasureError(f'prior of a preset is "{self.prior}": choose one of {", ".join(PRIORS)}.')


@dataclass(frozen=True)
class Evaluation:
    """How a paper measures a preset. None of it is for the eraser.

    Attributes:
        prompts: with {} for the concept; empty where the paper prints none
        synonyms: further words for an erased concept, by its phrase (generality)
        others: concepts that are neither erased nor given to the eraser, and must stay (specificity)
        images_per_concept, images_per_synonym, images_per_other, images_per_retained: how many pictures of each; 0: not measured
    """

    prompts: tuple[str, ...] = ()
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    images_per_concept: int = 0
    images_per_synonym: int = 0
    images_per_other: int = 0
    images_per_retained: int = 0

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise ErasureError(f'the evaluation prompt "{prompt}" of a preset must hold {{}} once.')


@dataclass(frozen=True)
class Preset:
    """One set of a paper's experiments.

    Attributes:
        concepts: to erase, each with its mapping concept as anchor; without aliases, as synonyms are for evaluation
        retained: phrases that the eraser is told to keep
        method: the paper's hyper-parameters for this set
        evaluate: how the paper measures it
        source: where in the paper it stands

    Raises:
        ErasureError: a phrase is on two lists, or twice on one.
    """

    name: str
    description: str
    source: str
    concepts: tuple[Concept, ...]
    retained: tuple[str, ...]
    method: MethodTable
    evaluate: Evaluation

    def __post_init__(self) -> None:
        check_together(self.concepts)
        erased = [c.phrase for c in self.concepts]
        for what, phrases in (("retained", self.retained), ("measured as another concept", self.evaluate.others)):
            for i, phrase in enumerate(phrases):
                if any(same(phrase, e) for e in erased):
                    raise ErasureError(f'"{phrase}" of preset {self.name} is both erased and {what}: keep it on one list.')
                if any(same(phrase, p) for p in phrases[:i]):
                    raise ErasureError(f'"{phrase}" of preset {self.name} is {what} twice: keep one.')


def preset_names() -> tuple[str, ...]:
    """Names of all presets, in the order of the files."""
    return tuple(_sets())


def load_preset(name: str) -> Preset:
    """The preset of a name. ErasureError: there is none."""
    if name not in _sets():
        raise ErasureError(f'there is no preset "{name}": choose one of {", ".join(_sets())}.')
    family, chosen = _sets()[name]
    erase = chosen.get("erase") or family["erase"][: chosen["first"]]
    measured: dict[str, Any] = {**family.get("evaluate", {}), **chosen.get("evaluate", {})}
    classes, synonyms = measured.pop("classes", ()), measured.pop("synonyms", {})
    return Preset(
        name,
        chosen["description"],
        family["source"],
        tuple(Concept(phrase, chosen["anchor"], family["kind"]) for phrase in erase),
        tuple(family.get("retain", ())),
        MethodTable(**{**family["method"], **chosen.get("method", {}), "prior": family["prior"]}),
        Evaluation(
            **{**measured, "prompts": tuple(measured.get("prompts", ()))},
            synonyms={phrase: tuple(synonyms[phrase]) for phrase in erase if phrase in synonyms},
            others=tuple(c for c in classes if c not in erase),
        ),
    )


@functools.cache
def _sets() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Preset name -> (its family's table, its own)."""
    found = {}
    for file in sorted(files(__name__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            family = tomllib.loads(file.read_text(encoding="utf-8"))
            found.update({chosen["name"]: (family, chosen) for chosen in family["sets"]})
    return found
