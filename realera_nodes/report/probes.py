"""What a report asks the model to draw: the concept, what evokes it, what must stay, what has nothing to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.concepts import Concept, same
from ..mining import Mined

GROUPS = ("concept", "synonym", "associated", "preserved", "unrelated")
UNRELATED = ("a bowl of fruit", "a castle on a hill", "a red umbrella", "a wooden chair", "a cup of coffee", "a mountain lake")


@dataclass(frozen=True)
class Probe:
    """A prompt of the report.

    Attributes:
        label: the phrase; template: what it stands in, at {}
        expected: what a classifier should see in it under the original model
        anchor: what the phrase is to become; None where it is to stay
    """

    group: str
    label: str
    template: str
    expected: str | None = None
    anchor: str | None = None

    @property
    def prompt(self) -> str:
        return self.template.format(self.label)


def strongest_words(concepts: Sequence[Concept], mined: Mined, count: int = 4) -> dict[str, str]:
    """Mined words with their anchors, strongest first, about ``count`` in all, some of each concept."""
    each = max(1, count // len(concepts))
    words: dict[str, str] = {}
    for c in concepts:
        for w in mined.near_of(c.phrase)[:each]:
            words.setdefault(w.word, c.anchor)  # a word that two concepts share goes where the first one does
    return words


def general_probes(
    concepts: Sequence[Concept], residue: Sequence[str] = (), named: Mapping[str, str] | None = None
) -> list[Probe]:  # fmt: skip
    """Probes for any checkpoint: the user's residue phrases, then mined words, stand for what evokes the concept.

    ``named``: word -> anchor. Phrases of ``residue`` are taken to belong to the first concept.
    """
    probes = []
    for c in concepts:
        for p in c.phrases:
            probes.append(Probe("concept" if p == c.phrase else "synonym", p, c.prompts[0], anchor=c.anchor))
    template = concepts[0].prompts[0]
    evoking = dict.fromkeys(residue, concepts[0].anchor) | dict(named or {})
    probes += [Probe("associated", p, template, anchor=anchor) for p, anchor in evoking.items()]
    for c in concepts:
        probes += [Probe("preserved", k.phrase, c.prompts[0]) for k in c.preserve]
    return probes + [Probe("unrelated", u, "a photo of {}") for u in UNRELATED]


def demo_probes(concepts: Sequence[Concept], unrelated: int = 4) -> list[Probe]:
    """Probes of the embedded model, whose synonyms and associated phrases are known to the report but never to the eraser."""
    from ..demo.concepts import CIFAR10, demo_concepts
    from ..demo.gallery import template_of

    known = {c.name: c for c in demo_concepts()}
    probes, used = [], {p for c in concepts for p in c.phrases}
    for c in concepts:
        demo = known.get(c.phrase)
        if demo is None:
            probes += [Probe("concept", c.phrase, c.prompts[0], anchor=c.anchor)]
            continue
        probes.append(Probe("concept", demo.name, template_of(demo, demo.name), demo.name, c.anchor))
        probes += [Probe("synonym", p, template_of(demo, p), demo.name, c.anchor) for p in demo.synonyms]
        probes += [Probe("associated", p, template_of(demo, p), demo.name, c.anchor) for p in demo.associated]
    for c in concepts:
        for k in c.preserve:
            demo = known.get(k.phrase)
            template = template_of(demo, demo.name) if demo else c.prompts[0]
            probes.append(Probe("preserved", k.phrase, template, demo.name if demo else None))
            used.add(k.phrase)
    anchors = [c.anchor for c in concepts]
    others = [n for n in (*CIFAR10, *known) if n not in used and not any(same(n, a) for a in anchors)]
    probes += [Probe("unrelated", n, template_of(known[n], n), n) for n in dict.fromkeys(others[:unrelated])]
    return probes
