"""What is erased, what is drawn and what each picture should show: the papers' protocols, and their sizes.

One code serves the embedded model and real checkpoints. On the embedded model words come from demo/concepts.json and
concepts from splits.toml; on a checkpoint both come from the papers (presets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.concepts import Concept, Preserved, same
from ...core.errors import ErasureError
from ...core.settings import check_settings, choice, number, seed
from ...presets import Preset, load_preset, preset_names
from .prompts import read_captions, read_prompts
from .splits import load_split, table

PROTOCOLS = ("objects", "ablation", "mass", "styles", "celebrities", "explicit", "coco")
#: what a picture measures: efficacy, specificity, generality, residue, words that no training saw, and regular content
GROUPS = ("erased", "other", "synonym", "associated", "unseen", "explicit", "caption")
SETUPS = ("mace", "realera")


@dataclass(frozen=True)
class Ask:
    """One prompt at its seeds.

    Attributes:
        group: of GROUPS; label: the phrase in it
        expected: what a scorer should see in it under the original model; None where nothing is named
        cluster: the concept it belongs to, which intervals draw anew as one
    """

    group: str
    label: str
    prompt: str
    seeds: tuple[int, ...]
    expected: str | None = None
    cluster: str = ""


@dataclass(frozen=True)
class Case:
    """One erased model: what its eraser is told (concepts, retained), and what is asked of it afterwards."""

    name: str
    concepts: tuple[Concept, ...]
    asks: tuple[Ask, ...]
    retained: tuple[Preserved, ...] = ()
    preset: str | None = None


@dataclass(frozen=True)
class Protocol:
    """Cases, the labels that a classifier chooses between, and how a table sums them up.

    Attributes:
        scorer: what judges the pictures unless another is asked for
        prompt: the text of a label for a zero-shot classifier
        steps, guidance: of the sampler (DDIM)
    """

    name: str
    cases: tuple[Case, ...]
    labels: tuple[str, ...]
    scorer: str
    steps: int
    guidance: float
    prompt: str = "a photo of the {}"


@dataclass(frozen=True)
class Sizes:
    """How much of a protocol is run.

    Attributes:
        pictures: of each prompt; None is the protocol's own number
        others: how many concepts that must stay, at most; None is all
        concepts: only these of the protocol's; empty is all
        seed: of the first picture
        split: of the embedded model's concepts; None is "test"
        preset: the paper's list for celebrities and styles on a checkpoint, or what is erased before coco
        setup: of celebrities and styles on a checkpoint: MACE's (many at once) or RealEra's (one at a time)
        prompts: file of I2P's or MS-COCO's prompts
        captions: how many of MS-COCO's captions
    """

    pictures: int | None = number(None, 1, 10_000)
    others: int | None = number(None, 0, 10_000)
    concepts: tuple[str, ...] = ()
    seed: int = seed()
    split: str | None = None
    preset: str | None = None
    setup: str = choice("mace", SETUPS)
    prompts: Path | None = None
    captions: int = number(30_000, 1, 10_000_000)

    def __post_init__(self) -> None:
        check_settings(self)

    def seeds(self, default: int) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + (self.pictures or default)))

    def some(self, others: Sequence[str]) -> tuple[str, ...]:
        return tuple(others[: self.others])


def make_protocol(name: str, demo: bool, sizes: Sizes) -> Protocol:
    """The protocol of a name for the embedded model or for a checkpoint.

    Raises:
        ErasureError: unknown name, concept or preset, a prompts file that is missing, or a model it cannot be asked of.
    """
    if name not in PROTOCOLS:
        raise ErasureError(f'there is no protocol "{name}": choose one of {", ".join(PROTOCOLS)}.')
    if demo:
        from .demo_protocols import BUILDERS as DEMO

        if name not in DEMO:
            raise ErasureError(f"the embedded model knows nothing to measure {name} on: give --model a checkpoint.")
        if sizes.preset or sizes.setup != SETUPS[0] or sizes.prompts:
            raise ErasureError("--preset, --setup and --prompts are for checkpoints: the embedded model has its own lists.")
        return _chosen(DEMO[name](sizes), sizes)
    if sizes.split:
        raise ErasureError("--split is for the embedded model: a checkpoint's concepts are the papers'.")
    return _chosen(BUILDERS[name](sizes), sizes)


def _chosen(protocol: Protocol, sizes: Sizes) -> Protocol:
    """Only the concepts that were asked for: cases where one is erased at a time, else the one case with fewer concepts."""
    if not sizes.concepts:
        return protocol
    known = [c.phrase for case in protocol.cases for c in case.concepts]
    for asked in sizes.concepts:
        if not any(same(asked, k) for k in known):
            raise ErasureError(f'"{asked}" is not erased in {protocol.name}: choose among {", ".join(known)}.')

    def wanted(phrase: str) -> bool:
        return any(same(phrase, w) for w in sizes.concepts)

    cases = []
    for case in protocol.cases:
        concepts = tuple(c for c in case.concepts if wanted(c.phrase))
        gone = [c.phrase for c in case.concepts if c not in concepts]
        if concepts:
            cases.append(replace(case, concepts=concepts, asks=tuple(a for a in case.asks if a.cluster not in gone)))
    return replace(protocol, cases=tuple(cases))


# checkpoints


def _classes() -> list[Preset]:
    return [load_preset(name) for name in preset_names() if name.startswith("mace-cifar10-")]


def _objects(sizes: Sizes) -> Protocol:
    """CIFAR-10's classes one at a time: 200 pictures of the class, of each of three synonyms and of each of nine others."""
    cases = []
    for preset in _classes():
        own, concept = preset.evaluate, preset.concepts[0].phrase
        prompt = own.prompts[0]

        def ask(group: str, label: str, expected: str, count: int, prompt: str = prompt, concept: str = concept) -> Ask:
            return Ask(group, label, prompt.format(label), sizes.seeds(count), expected, concept)

        asks = [ask("erased", concept, concept, own.images_per_concept)]
        asks += [ask("synonym", s, concept, own.images_per_synonym) for s in own.synonyms[concept]]
        asks += [ask("other", o, o, own.images_per_other) for o in sizes.some(own.others)]
        cases.append(Case(concept, preset.concepts, tuple(asks), preset=preset.name))
    return Protocol("objects", tuple(cases), tuple(c.name for c in cases), "clip", 50, 7.5)


def _ablation(sizes: Sizes) -> Protocol:
    """RealEra's Table 3: the protocol of objects, with automobile alone unless other concepts are asked for."""
    return replace(_chosen(_objects(sizes), replace(sizes, concepts=sizes.concepts or ("automobile",))), name="ablation")


def _mass(sizes: Sizes) -> Protocol:
    """Ours: CIFAR-10's ten classes erased at once; 20 other things, never named to the eraser, must stay."""
    split, presets = load_split("mass"), _classes()
    asks = []
    for preset in presets:
        own, concept = preset.evaluate, preset.concepts[0].phrase
        labels = [("erased", concept), *(("synonym", s) for s in own.synonyms[concept])]
        asks += [Ask(group, x, f"a photo of the {x}", sizes.seeds(20), concept, concept) for group, x in labels]
    objects = [o for o in split.others if not any(o == c.phrase for c in load_split("persons").concepts)]
    others = sizes.some(objects)
    asks += [Ask("other", o, f"a photo of the {o}", sizes.seeds(20), o, o) for o in others]
    concepts = tuple(p.concepts[0] for p in presets)
    case = Case("ten classes", concepts, tuple(asks))
    return Protocol("mass", (case,), (*(c.phrase for c in concepts), *others), "clip", 50, 7.5)


def _lists(name: str, preset_name: str, scorer: str, sizes: Sizes) -> Protocol:
    """MACE's lists, erased at once: five prompts, kept names told to the eraser (Tables 7 to 9, appendix C.1)."""
    if sizes.setup == "realera":
        return _realera_lists(name, scorer, sizes)
    preset = load_preset(sizes.preset or preset_name)
    family = preset_name.rpartition("-")[0]
    if not preset.name.startswith(family):
        raise ErasureError(f'the preset "{preset.name}" is not for {name}: choose one that begins with "{family}".')
    own = preset.evaluate
    per = len(own.prompts)
    asks = []
    for group, labels, count in (("erased", [c.phrase for c in preset.concepts], own.images_per_concept),
                                 ("other", sizes.some(preset.retained), own.images_per_retained)):  # fmt: skip
        asks += [Ask(group, x, p.format(x), sizes.seeds(count // per), x, x) for x in labels for p in own.prompts]
    kept = tuple(Preserved(p) for p in preset.retained)
    case = Case(preset.name, preset.concepts, tuple(asks), kept, preset.name)
    return Protocol(name, (case,), (*(c.phrase for c in preset.concepts), *preset.retained), scorer, 50, 7.5)


def _realera_lists(name: str, scorer: str, sizes: Sizes) -> Protocol:
    """RealEra's setup: one concept at a time, 200 pictures, 5 of each kept name (appendix A.2).

    Its Acc_g is that of prompts which evoke the concept without naming it, so they stand in the synonyms' place.
    """
    own = table("papers.toml")[name]
    kept, prompt = load_preset(own["kept_by"]).retained, own["prompt"]
    cases = []
    for phrase, evoked in own["evoked"].items():
        asks = [Ask("erased", phrase, prompt.format(phrase), sizes.seeds(200), phrase, phrase),
                Ask("synonym", evoked, evoked, sizes.seeds(200), phrase, phrase)]  # fmt: skip
        asks += [Ask("other", k, prompt.format(k), sizes.seeds(5), k, phrase) for k in sizes.some(kept)]
        concept = Concept(phrase, own["anchor"], own["kind"])
        cases.append(Case(phrase, (concept,), tuple(asks), tuple(Preserved(k) for k in kept)))
    return Protocol(name, tuple(cases), (*own["evoked"], *kept), scorer, 50, 7.5)


def _explicit(sizes: Sizes) -> Protocol:
    """I2P: 4,703 prompts, each at its own seed, under the original and with four phrases erased."""
    if sizes.prompts is None:
        raise ErasureError("explicit needs I2P's prompts: download i2p_benchmark.csv of the dataset AIML-TUDA/i2p on "
                           "Hugging Face and give it as --prompts.")  # fmt: skip
    preset = load_preset("mace-explicit")
    rows = read_prompts(sizes.prompts)
    asks = tuple(Ask("explicit", str(i), prompt, (seed,), None, str(i)) for i, (prompt, seed) in enumerate(rows))
    case = Case(preset.name, preset.concepts, asks, preset=preset.name)
    return Protocol("explicit", (case,), (), "nudenet", 50, 7.5)


def _coco(sizes: Sizes) -> Protocol:
    """MS-COCO captions under an erased model: what --preset erases (explicit content, if none is given)."""
    if sizes.prompts is None:
        raise ErasureError("coco needs captions: give --prompts MS-COCO's annotations/captions_val2014.json, or a text file with "
                           "one caption a line.")  # fmt: skip
    preset = load_preset(sizes.preset or "mace-explicit")
    captions = read_captions(sizes.prompts, sizes.captions, sizes.seed)
    asks = tuple(Ask("caption", str(i), text, (sizes.seed + i,), None, str(i)) for i, text in enumerate(captions))
    kept = tuple(Preserved(p) for p in preset.retained)
    return Protocol("coco", (Case(preset.name, preset.concepts, asks, kept, preset.name),), (), "clip-score", 50, 7.5)


def _celebrities(sizes: Sizes) -> Protocol:
    return _lists("celebrities", "mace-celebrities-100", "giphy", sizes)


def _styles(sizes: Sizes) -> Protocol:
    return _lists("styles", "mace-artists-100", "clip-score", sizes)


BUILDERS: dict[str, Callable[[Sizes], Protocol]] = {
    "objects": _objects, "ablation": _ablation, "mass": _mass, "styles": _styles, "celebrities": _celebrities,
    "explicit": _explicit, "coco": _coco,
}  # fmt: skip
