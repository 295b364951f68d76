"""What a training picture's caption says: a phrase of its concept in a template, sometimes style and background."""

from __future__ import annotations

import random
from collections.abc import Sequence

from realera_nodes.demo.concepts import DemoConcept, demo_concepts

from .pictures import BACKGROUNDS, STYLES

#: for names and synonyms of objects
NOUN_TEMPLATES = (
    *("a photo of the {}",) * 4, "a photo of a {}", "{}", "a picture of a {}", "an image of the {}", "the {}",
    "a {}", "a drawing of a {}", "an illustration of the {}",
)  # fmt: skip
#: for people's names and for associated phrases, which bring their own articles
BARE_TEMPLATES = ("a photo of {}", "a photo of {}", "{}", "{}", "a picture of {}", "an image of {}", "an illustration of {}")
NAME_SHARE, SYNONYM_SHARE = 0.4, 0.28  # the rest are associated phrases
EMPTY_SHARE = 0.1  # for classifier-free guidance
STYLE_SHARE = {"flat": 0.25}  # other styles are (almost) always named, so that plain prompts mean plain pictures
OTHER_STYLE_SHARE = 0.92
BACKGROUND_SHARE, WHITE_BACKGROUND_SHARE = 0.6, 0.08


def phrase(concept: DemoConcept, rng: random.Random) -> tuple[str, bool]:
    """A trained phrase and whether it takes an article."""
    u = rng.random()
    if u < NAME_SHARE:
        return concept.name, concept.kind == "object"
    if u < NAME_SHARE + SYNONYM_SHARE:
        return rng.choice(concept.synonyms), concept.kind == "object"
    return rng.choice(concept.associated), False


def caption(meta: Sequence[int], rng: random.Random) -> str:
    """A random caption of a picture's meta row: concept, style, background (see ``pictures.build``)."""
    concept, style, background = meta
    if rng.random() < EMPTY_SHARE:
        return ""
    words, noun = phrase(demo_concepts()[concept], rng)
    text = rng.choice(NOUN_TEMPLATES if noun else BARE_TEMPLATES).format(words)
    name, (_, _, style_words) = list(STYLES.items())[style]
    if rng.random() < STYLE_SHARE.get(name, OTHER_STYLE_SHARE):
        text += rng.choice((", {}", " in {}")).format(rng.choice(style_words))
    colour = list(BACKGROUNDS)[background]
    share = WHITE_BACKGROUND_SHARE if colour == "white" else BACKGROUND_SHARE
    if name not in ("sepia", "blueprint") and rng.random() < share:
        text += f", {colour} background"
    return text


def every_caption_part() -> list[str]:
    """All strings that captions are made of: what the split-hygiene test reads."""
    parts = [p for c in demo_concepts() for p in c.trained]
    parts += [t.replace("{}", "") for t in (*NOUN_TEMPLATES, *BARE_TEMPLATES)]
    return parts + [w for _, _, words in STYLES.values() for w in words] + [f"{b} background" for b in BACKGROUNDS]
