"""What the benchmark asks: the papers' counts, and on the embedded model no word that an eraser was told of."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from realera_nodes.bench.erasure.protocols import PROTOCOLS, Case, Protocol, Sizes, make_protocol
from realera_nodes.bench.erasure.splits import SPLITS, load_split
from realera_nodes.core.concepts import same
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.templates import CONTEXTS
from realera_nodes.demo.concepts import CIFAR10, demo_concepts, eraser_inputs
from realera_nodes.presets import load_preset

KNOWN = {c.name: c for c in demo_concepts()}


def demo(name: str, **sizes) -> Protocol:
    return make_protocol(name, True, Sizes(**sizes))


def counts(case: Case) -> Counter:
    found: Counter = Counter()
    for ask in case.asks:
        found[ask.group] += len(ask.seeds)
    return found


def words_measured(name: str) -> set[str]:
    """Words that measure a concept and must not reach its eraser."""
    return {" ".join(p.casefold().split()) for p in (*KNOWN[name].synonyms, *KNOWN[name].associated, *KNOWN[name].unseen)}


def told(case: Case) -> set[str]:
    """Every word that an eraser is given."""
    words = {w for c in case.concepts for w in (*c.phrases, c.anchor, *(k.phrase for k in c.preserve), *(c.templates or ()))}
    return {" ".join(w.casefold().split()) for w in (*words, *(k.phrase for k in case.retained))}


# hygiene


def test_splits_share_no_concept_and_tuning_asks_for_no_test_concept() -> None:
    tuning, test = (load_split(s) for s in SPLITS)
    names = [{c.phrase for c in s.concepts} for s in (tuning, test)]
    assert not names[0] & names[1]
    assert not set(tuning.others) & names[1]
    assert names[0] == {"airplane", "apple", "owl", "castle", "guitar", "Mira Voss"}
    assert names[1] >= set(CIFAR10) - {"airplane"}
    assert names[0] | names[1] | set(tuning.others) <= set(eraser_inputs())


@pytest.mark.parametrize("split", SPLITS)
def test_no_prompt_of_one_split_holds_a_measured_word_of_the_other(split: str) -> None:
    other = SPLITS[1 - SPLITS.index(split)]
    theirs = {w for c in load_split(other).concepts for w in words_measured(c.phrase)}
    labels = {a.label.casefold() for case in demo("objects", split=split).cases for a in case.asks if a.group != "other"}
    assert not labels & theirs


@pytest.mark.parametrize("protocol", ["objects", "ablation", "mass", "celebrities", "coco"])
@pytest.mark.parametrize("split", SPLITS)
def test_erasers_see_names_and_anchors_alone(protocol: str, split: str) -> None:
    every = {w for name in KNOWN for w in words_measured(name)}
    for case in demo(protocol, split=split).cases:
        assert not told(case) & every
        assert {c.phrase for c in case.concepts} <= set(eraser_inputs())
        for concept in case.concepts:
            assert (concept.aliases, concept.preserve, concept.templates, concept.images) == ((), (), None, None)
            assert not any(same(concept.anchor, name) for name in KNOWN), "an anchor that the benchmark measures"
        if protocol != "celebrities":
            assert case.retained == ()


@pytest.mark.parametrize("kind", ["object", "person"])
def test_the_methods_prompts_hold_no_measured_phrase_of_a_test_concept(kind: str) -> None:
    for concept in load_split("test").concepts:
        for phrase in words_measured(concept.phrase):
            for template in CONTEXTS[kind]:
                assert f" {phrase} " not in f" {template.casefold()} ", (concept.phrase, phrase, template)


def test_anchors_of_the_classes_are_the_papers() -> None:
    anchors = {c.phrase: c.anchor for c in (*load_split("test").concepts, *load_split("mass").concepts)}
    for name in CIFAR10:
        assert anchors[name] == load_preset(f"mace-cifar10-{name}").concepts[0].anchor


# the embedded model


def test_each_measured_phrase_expects_its_concept() -> None:
    for case in demo("objects").cases:
        concept = KNOWN[case.name]
        labels = {g: [a.label for a in case.asks if a.group == g] for g in ("erased", "synonym", "associated", "unseen", "other")}
        assert labels["erased"] == [concept.name]
        assert tuple(labels["synonym"]) == concept.synonyms
        assert tuple(labels["associated"]) == concept.associated
        assert tuple(labels["unseen"]) == concept.unseen
        assert sorted(labels["other"]) == sorted(c.phrase for c in load_split("test").concepts if c.phrase != concept.name)
        assert all(a.expected == (a.label if a.group == "other" else concept.name) for a in case.asks)
        assert all(a.cluster == concept.name for a in case.asks)
        assert all(a.label in a.prompt for a in case.asks)


def test_sizes_limit_what_is_drawn() -> None:
    protocol = demo("objects", split="tuning", pictures=3, others=2, concepts=("Airplane", "owl"), seed=7)
    assert [c.name for c in protocol.cases] == ["airplane", "owl"]
    for case in protocol.cases:
        assert all(a.seeds == (7, 8, 9) for a in case.asks)
        assert sum(a.group == "other" for a in case.asks) == 2


def test_mass_erases_all_at_once_and_draws_concepts_anew_with_their_words() -> None:
    (case,) = demo("mass").cases
    assert [c.phrase for c in case.concepts] == list(CIFAR10)
    assert {a.cluster for a in case.asks if a.group == "synonym"} == set(CIFAR10)
    assert {a.cluster for a in case.asks if a.group == "other"} == set(load_split("mass").others)
    (fewer,) = demo("mass", concepts=("cat", "dog")).cases
    assert [c.phrase for c in fewer.concepts] == ["cat", "dog"]
    assert {a.cluster for a in fewer.asks} == {"cat", "dog", *load_split("mass").others}


def test_styles_are_judged_by_their_own_labels() -> None:
    protocol = demo("styles")
    assert protocol.scorer == "embedded-style"
    assert len(protocol.cases) == 4
    for case in protocol.cases:
        assert all(a.expected in protocol.labels for a in case.asks)
        assert {a.group for a in case.asks if case.name in a.prompt} == {"erased"}


def test_regular_content_is_of_concepts_that_no_split_erases() -> None:
    erased = {c.phrase for s in (*SPLITS, "mass", "persons") for c in load_split(s).concepts}
    for case in demo("coco", split="tuning").cases:
        assert not {a.label for a in case.asks} & erased
        assert len(case.asks) == len(KNOWN) - len(erased)


# the papers


def test_cifar_has_the_papers_200_600_and_1800_pictures() -> None:
    protocol = make_protocol("objects", False, Sizes())
    assert [c.name for c in protocol.cases] == list(CIFAR10)
    assert protocol.labels == CIFAR10
    assert (protocol.steps, protocol.guidance, protocol.scorer) == (50, 7.5, "clip")
    for case in protocol.cases:
        assert counts(case) == {"erased": 200, "synonym": 600, "other": 1800}
    asks = protocol.cases[1].asks
    assert asks[1].prompt == "a photo of the car"
    assert (asks[1].expected, asks[-1].expected) == ("automobile", "truck")


def test_the_ablation_erases_automobile() -> None:
    assert [c.name for c in make_protocol("ablation", False, Sizes()).cases] == ["automobile"]
    assert [c.name for c in make_protocol("ablation", False, Sizes(concepts=("cat",))).cases] == ["cat"]


@pytest.mark.parametrize(("number", "erased"), [(1, 250), (5, 250), (10, 250), (100, 2500)])
def test_celebrities_have_maces_counts(number: int, erased: int) -> None:
    (case,) = make_protocol("celebrities", False, Sizes(preset=f"mace-celebrities-{number}")).cases
    assert counts(case) == {"erased": erased, "other": 2500}
    assert len(case.retained) == 100
    assert len({a.prompt for a in case.asks if a.cluster == case.concepts[0].phrase}) == 5


def test_styles_have_2500_pictures_of_each_group() -> None:
    (case,) = make_protocol("styles", False, Sizes()).cases
    assert counts(case) == {"erased": 2500, "other": 2500}


@pytest.mark.parametrize("name", ["celebrities", "styles"])
def test_realeras_setup_draws_200_and_5(name: str) -> None:
    cases = make_protocol(name, False, Sizes(setup="realera")).cases
    assert len(cases) == 5
    for case in cases:
        assert counts(case) == {"erased": 200, "synonym": 200, "other": 500}
        assert len(case.concepts) == 1


def test_i2p_is_drawn_at_its_own_seeds(tmp_path: Path) -> None:
    table = tmp_path / "i2p.csv"
    table.write_text('prompt,categories,sd_seed\nfirst,x,12\n"second, third",y,3814509142\n')
    (case,) = make_protocol("explicit", False, Sizes(prompts=table)).cases
    assert [(a.prompt, a.seeds) for a in case.asks] == [("first", (12,)), ("second, third", (3814509142,))]
    assert [c.phrase for c in case.concepts] == ["nudity", "naked", "erotic", "sexual"]


def test_captions_are_one_a_picture_and_the_same_each_time(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    rows = [{"image_id": i // 5, "caption": f"caption {i}"} for i in range(100)]
    file.write_text(json.dumps({"annotations": rows}))
    cases = [make_protocol("coco", False, Sizes(prompts=file, captions=12)).cases[0] for _ in range(2)]
    assert asdict(cases[0]) == asdict(cases[1])
    assert len({a.prompt for a in cases[0].asks}) == 12
    assert all(int(a.prompt.split()[1]) % 5 == 0 for a in cases[0].asks), "the first caption of each picture"


@pytest.mark.parametrize(
    ("name", "on_demo", "sizes", "says"),
    [
        ("objets", True, Sizes(), "objects, ablation"),
        ("objects", True, Sizes(split="trial"), "tuning, test"),
        ("objects", True, Sizes(concepts=("unicorn",)), '"unicorn" is not erased'),
        ("explicit", True, Sizes(), "give --model a checkpoint"),
        ("styles", True, Sizes(preset="mace-artists-100"), "are for checkpoints"),
        ("objects", False, Sizes(split="tuning"), "for the embedded model"),
        ("explicit", False, Sizes(), "i2p_benchmark.csv"),
        ("coco", False, Sizes(), "captions_val2014.json"),
        ("coco", False, Sizes(prompts=Path("nowhere.txt")), "does not exist"),
        ("celebrities", False, Sizes(preset="mace-artists-100"), 'begins with "mace-celebrities"'),
    ],
)
def test_what_cannot_be_asked_is_explained(name: str, on_demo: bool, sizes: Sizes, says: str) -> None:
    with pytest.raises(ErasureError, match=says):
        make_protocol(name, on_demo, sizes)


@pytest.mark.parametrize("change", [{"pictures": 0}, {"captions": 0}, {"others": -1}, {"setup": "sdxl"}])
def test_sizes_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ErasureError):
        Sizes(**change)


def test_every_protocol_is_for_a_checkpoint_or_says_what_it_needs() -> None:
    for name in PROTOCOLS:
        if name not in ("explicit", "coco"):
            assert make_protocol(name, False, Sizes(pictures=1)).cases
