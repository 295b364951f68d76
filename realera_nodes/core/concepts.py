"""What to erase: a concept, what it becomes, the prompts it is edited under, and what must stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .errors import ErasureError
from .phrases import folded, phrase_of, same, template_of, told

#: prompts under which a concept is mined, edited and trained; {} is the phrase
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("a photo of the {}", "a photo of {}", "{}"),
    "person": ("a photo of {}", "a portrait of {}", "{}"),
    "style": ("{}", "an image in the style of {}", "a painting by {}"),
    "explicit": ("{}", "a photo of {}"),
}


#: weight of a preserved phrase, at most
HEAVIEST = 1e6


@dataclass(frozen=True)
class Preserved:
    """A phrase that must keep its meaning; ``weight`` multiplies its rows in the preserve sum of Eq. 7."""

    phrase: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        empty = "a preserved phrase is empty: write the concept to keep, or leave it out."
        object.__setattr__(self, "phrase", phrase_of(self.phrase, empty, "a preserved phrase"))
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= HEAVIEST:
            large = isinstance(weight, int | float) and HEAVIEST < weight < math.inf
            wanted = f"it must be at most {HEAVIEST:g}" if large else "it must be above 0 and finite"
            raise ErasureError(f'the weight of preserved "{self.phrase}" is {told(weight)}: {wanted}.')
        object.__setattr__(self, "weight", float(weight))


@dataclass(frozen=True)
class Concept:
    """A concept to erase.

    Attributes:
        phrase, anchor: what it is called, and what it becomes
        aliases: further phrases that are erased with it
        images: pictures of it (N, 3, H, W) in [0, 1], for methods that train on pictures; None: the model draws them
        masks: where it is in ``images``, (N, H, W) in [0, 1], 1 on the concept

    Raises:
        ErasureError: empty phrase or anchor, concept equal to anchor, unknown kind, a phrase both erased and preserved,
            a template without exactly one ``{}``, masks without as many pictures.

    Phrases and templates are kept as ``core.phrases`` spells them.
    """

    phrase: str
    anchor: str
    kind: str = "object"
    aliases: tuple[str, ...] = ()
    preserve: tuple[Preserved, ...] = ()
    templates: tuple[str, ...] | None = None
    images: Tensor | None = field(default=None, compare=False, repr=False)
    masks: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        phrase = phrase_of(self.phrase, "the concept to erase is empty: write a word or phrase.", "the concept to erase")
        where = f'the anchor of "{phrase}"'
        anchor = phrase_of(self.anchor, f'{where} is empty: write what it should become, such as "sky".', where)
        alias = f'an alias of "{phrase}"'
        aliases = tuple(phrase_of(a, f"{alias} is empty: write a phrase, or leave it out.", alias) for a in self.aliases)
        templates = None if self.templates is None else tuple(map(template_of, self.templates))
        for name, value in (("phrase", phrase), ("anchor", anchor), ("aliases", aliases), ("templates", templates)):
            object.__setattr__(self, name, value)
        if self.kind not in TEMPLATES:
            raise ErasureError(f'unknown kind "{self.kind}": choose one of {", ".join(TEMPLATES)}.')
        for p in self.phrases:
            if same(p, self.anchor):
                raise ErasureError(f'"{p}" is both erased and the anchor: choose another anchor.')
        for kept in self.preserve:
            if any(same(kept.phrase, p) for p in self.phrases):
                raise ErasureError(f'"{kept.phrase}" is both erased and preserved: keep it on one list.')
        if self.masks is not None and (self.images is None or len(self.images) != len(self.masks)):
            count = 0 if self.images is None else len(self.images)
            raise ErasureError(f'"{self.phrase}" has {len(self.masks)} masks for {count} pictures: give one for each picture.')

    @property
    def phrases(self) -> tuple[str, ...]:
        """The concept and its aliases, all mapped to the anchor."""
        return (self.phrase, *self.aliases)

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.templates or TEMPLATES[self.kind]


def check_together(concepts: tuple[Concept, ...] | list[Concept]) -> None:
    """Raises ErasureError where concepts contradict each other: none, one twice, or erased here and preserved there."""
    if not concepts:
        raise ErasureError("no concept to erase was given: name at least one.")
    erased: dict[str, Concept] = {}
    for concept in concepts:
        for phrase in concept.phrases:
            key = folded(phrase)
            if key in erased:
                raise ErasureError(f'"{phrase}" is on the list twice: keep one.')
            erased[key] = concept
    for concept in concepts:
        for phrase in (concept.anchor, *(p.phrase for p in concept.preserve)):
            if folded(phrase) in erased:
                role = "the anchor of" if same(phrase, concept.anchor) else "preserved for"
                raise ErasureError(f'"{phrase}" is erased, but also {role} "{concept.phrase}": keep it on one list.')


def check_lists(concepts: Sequence[Concept], retained: Sequence[Preserved]) -> None:
    """Raises ErasureError for an empty list, a concept twice, and one that is both erased and retained: it is named."""
    check_together(tuple(concepts))
    erased = [p for c in concepts for p in c.phrases]
    for kept in retained:
        if any(same(kept.phrase, p) for p in erased):
            raise ErasureError(f'"{kept.phrase}" is both erased and retained: keep it on one list.')
