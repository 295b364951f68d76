"""What to erase: a concept, what it becomes, the prompts it is edited under, and what must stay."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .errors import ErasureError

#: prompts under which a concept is mined, edited and trained; {} is the phrase
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("a photo of the {}", "a photo of {}", "{}"),
    "person": ("a photo of {}", "a portrait of {}", "{}"),
    "style": ("{}", "an image in the style of {}", "a painting by {}"),
    "explicit": ("{}", "a photo of {}"),
}


@dataclass(frozen=True)
class Preserved:
    """A phrase that must keep its meaning; ``weight`` multiplies its rows in the preserve sum of Eq. 7."""

    phrase: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.phrase.strip():
            raise ErasureError("a preserved phrase is empty: write the concept to keep, or leave it out.")
        if not 0 < self.weight < math.inf:
            raise ErasureError(f'the weight of preserved "{self.phrase}" is {self.weight}: it must be above 0 and finite.')


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
        if not self.phrase.strip():
            raise ErasureError("the concept to erase is empty: write a word or phrase.")
        if not self.anchor.strip():
            raise ErasureError(f'the anchor of "{self.phrase}" is empty: write what it should become, such as "sky".')
        if self.kind not in TEMPLATES:
            raise ErasureError(f'unknown kind "{self.kind}": choose one of {", ".join(TEMPLATES)}.')
        for phrase in self.phrases:
            if not phrase.strip():
                raise ErasureError(f'an alias of "{self.phrase}" is empty: write a phrase, or leave it out.')
            if same(phrase, self.anchor):
                raise ErasureError(f'"{phrase}" is both erased and the anchor: choose another anchor.')
        for kept in self.preserve:
            if any(same(kept.phrase, p) for p in self.phrases):
                raise ErasureError(f'"{kept.phrase}" is both erased and preserved: keep it on one list.')
        for template in self.templates or ():
            if not holds_one_phrase(template):
                raise ErasureError(f'the template "{template}" must hold {{}} once, where the phrase goes.')
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


def holds_one_phrase(template: str) -> bool:
    """Whether ``template.format(phrase)`` puts the phrase in once: one bare {}, no other field, no loose brace."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        return False
    return fields == [("", "", None)]


def same(a: str, b: str) -> bool:
    """Whether two phrases are one to a tokenizer that folds case and spaces."""
    return " ".join(a.casefold().split()) == " ".join(b.casefold().split())


def check_together(concepts: tuple[Concept, ...] | list[Concept]) -> None:
    """Raises ErasureError where concepts contradict each other: none, one twice, or erased here and preserved there."""
    if not concepts:
        raise ErasureError("no concept to erase was given: name at least one.")
    erased: dict[str, Concept] = {}
    for concept in concepts:
        for phrase in concept.phrases:
            key = " ".join(phrase.casefold().split())
            if key in erased:
                raise ErasureError(f'"{phrase}" is on the list twice: keep one.')
            erased[key] = concept
    for concept in concepts:
        for phrase in (concept.anchor, *(p.phrase for p in concept.preserve)):
            if " ".join(phrase.casefold().split()) in erased:
                role = "the anchor of" if same(phrase, concept.anchor) else "preserved for"
                raise ErasureError(f'"{phrase}" is erased, but also {role} "{concept.phrase}": keep it on one list.')


def check_lists(concepts: Sequence[Concept], retained: Sequence[Preserved]) -> None:
    """Raises ErasureError for an empty list, a concept twice, and one that is both erased and retained: it is named."""
    check_together(tuple(concepts))
    erased = [p for c in concepts for p in c.phrases]
    for kept in retained:
        if any(same(kept.phrase, p) for p in erased):
            raise ErasureError(f'"{kept.phrase}" is both erased and retained: keep it on one list.')
