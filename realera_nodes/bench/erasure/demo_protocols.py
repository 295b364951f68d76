"""The protocols on the embedded model: its own concepts, its own words, its own classifier.

Erasers see names and anchors alone (splits.toml). Everything that is read from demo/concepts.json goes into prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...core.concepts import Concept, Preserved
from ...core.errors import ErasureError
from ...demo.concepts import DemoConcept, demo_concepts
from ...demo.expand import manifest
from ...demo.gallery import GUIDANCE, prompt_of
from .protocols import Ask, Case, Protocol, Sizes
from .splits import SPLITS, Split, load_split

STEPS = 20


def _split(sizes: Sizes) -> Split:
    if (sizes.split or "test") not in SPLITS:
        raise ErasureError(f'there is no split "{sizes.split}": choose one of {", ".join(SPLITS)}.')
    return load_split(sizes.split or "test")


def _known() -> dict[str, DemoConcept]:
    return {c.name: c for c in demo_concepts()}


def _asks(name: str, sizes: Sizes, pictures: int, cluster: str) -> list[Ask]:
    """All that should be gone once a concept is: its name, synonyms, associated phrases, and words that no caption held."""
    demo = _known()[name]
    labels = [("erased", demo.name), *(("synonym", p) for p in demo.synonyms),
              *(("associated", p) for p in demo.associated), *(("unseen", p) for p in demo.unseen)]  # fmt: skip
    return [Ask(group, p, prompt_of(demo, p), sizes.seeds(pictures), name, cluster) for group, p in labels]


def _stays(name: str, sizes: Sizes, pictures: int, cluster: str) -> Ask:
    demo = _known()[name]
    return Ask("other", name, prompt_of(demo, name), sizes.seeds(pictures), name, cluster)


def objects(sizes: Sizes) -> Protocol:
    """One concept at a time; all other concepts of the split must stay, with those that the split names beside them."""
    split = _split(sizes)
    cases = []
    for concept in split.concepts:
        others = sizes.some([c.phrase for c in split.concepts if c is not concept] + list(split.others))
        asks = [*_asks(concept.phrase, sizes, 4, concept.phrase), *(_stays(o, sizes, 4, concept.phrase) for o in others)]
        cases.append(Case(concept.phrase, (concept,), tuple(asks)))
    return _protocol("objects", cases)


def ablation(sizes: Sizes) -> Protocol:
    return replace(objects(sizes), name="ablation")


def mass(sizes: Sizes) -> Protocol:
    """The ten classes of CIFAR-10 at once."""
    return _together("mass", "ten classes", load_split("mass"), sizes)


def celebrities(sizes: Sizes) -> Protocol:
    """Persons at once; those that must stay are named to the eraser, as MACE's are."""
    split = load_split("persons")
    return _together("celebrities", "persons", split, sizes, tuple(Preserved(o) for o in split.others))


def _together(name: str, title: str, split: Split, sizes: Sizes, kept: tuple[Preserved, ...] = ()) -> Protocol:
    asks = [a for c in split.concepts for a in _asks(c.phrase, sizes, 2, c.phrase)]
    asks += [_stays(o, sizes, 2, o) for o in sizes.some(split.others)]
    return _protocol(name, [Case(title, split.concepts, tuple(asks), kept)])


def styles(sizes: Sizes) -> Protocol:
    """Each of the model's styles becomes the flat one; the others must stay. Judged by the classifier's other output."""
    words, things = dict(manifest()["styles"]), ("cat", "apple", "house", "ship")
    known, flat = _known(), words["flat"]
    cases = []
    for style, phrase in words.items():
        if style != "flat":
            asks = [Ask("erased" if s == style else "other", p, f"{prompt_of(known[t], t)}, {p}", sizes.seeds(4), s, phrase)
                    for s, p in words.items() for t in things]  # fmt: skip
            cases.append(Case(phrase, (Concept(phrase, flat, "style"),), tuple(asks)))
    return replace(_protocol("styles", cases, tuple(words)), scorer="embedded-style")


def coco(sizes: Sizes) -> Protocol:
    """Regular content: concepts outside of all splits' erased ones, in styles and before backgrounds, one concept erased."""
    split = _split(sizes)
    erased = {c.phrase for s in (*SPLITS, "mass", "persons") for c in load_split(s).concepts}
    names = sizes.some([n for n in _known() if n not in erased])
    looks = [*manifest()["styles"].values(), *(f"{b} background" for b in manifest()["backgrounds"])]
    cases = []
    for concept in split.concepts:
        asks = []
        for i, name in enumerate(names):
            prompt = f"{prompt_of(_known()[name], name)}, {looks[i % len(looks)]}"
            asks.append(Ask("caption", name, prompt, sizes.seeds(1), name, concept.phrase))
        cases.append(Case(concept.phrase, (concept,), tuple(asks)))
    return _protocol("coco", cases)


def _protocol(name: str, cases: list[Case], labels: tuple[str, ...] = ()) -> Protocol:
    return Protocol(name, tuple(cases), labels or tuple(_known()), "embedded", STEPS, GUIDANCE)


BUILDERS: dict[str, Callable[[Sizes], Protocol]] = {
    "objects": objects, "ablation": ablation, "mass": mass, "styles": styles, "celebrities": celebrities, "coco": coco,
}  # fmt: skip
