"""Concepts: every sentence they refuse with, and contradictions between several."""

from __future__ import annotations

import re

import pytest

from realera_nodes.core.concepts import TEMPLATES, Concept, Preserved, check_together, same
from realera_nodes.core.errors import ErasureError


def test_phrases_and_prompts() -> None:
    concept = Concept("airplane", "sky", aliases=("jet", "An-225 Mriya"))
    assert concept.phrases == ("airplane", "jet", "An-225 Mriya")
    assert concept.prompts == ("a photo of the {}", "a photo of {}", "{}")
    assert Concept("airplane", "sky", templates=("my {}!",)).prompts == ("my {}!",)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_kind_has_templates_that_a_concept_accepts(kind: str) -> None:
    prompts = Concept("x", "y", kind=kind).prompts
    assert Concept("x", "y", templates=prompts).prompts == TEMPLATES[kind]
    assert [p.format("{odd} phrase").count("{odd} phrase") for p in prompts] == [1] * len(prompts)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"phrase": " \n"}, "the concept to erase is empty: write a word or phrase."),
        ({"anchor": "  "}, 'the anchor of "dog" is empty: write what it should become, such as "sky".'),
        ({"kind": "place"}, 'unknown kind "place": choose one of object, person, style, explicit.'),
        ({"aliases": ("puppy", " ")}, 'an alias of "dog" is empty: write a phrase, or leave it out.'),
        ({"anchor": " DOG "}, '"dog" is both erased and the anchor: choose another anchor.'),
        ({"aliases": ("Cat",)}, '"Cat" is both erased and the anchor: choose another anchor.'),
        ({"preserve": (Preserved("Dog"),)}, '"Dog" is both erased and preserved: keep it on one list.'),
        (
            {"aliases": ("hot  dog",), "preserve": (Preserved("wolf"), Preserved("hot dog"))},
            '"hot dog" is both erased and preserved: keep it on one list.',
        ),
        ({"templates": ("{}", "a photo")}, 'the template "a photo" must hold {} once, where the phrase goes.'),
        ({"templates": ("{} and {}",)}, 'the template "{} and {}" must hold {} once, where the phrase goes.'),
        ({"templates": ("a {color} {}",)}, 'the template "a {color} {}" must hold {} once, where the phrase goes.'),
        ({"templates": ("{{}}",)}, 'the template "{{}}" must hold {} once, where the phrase goes.'),
        ({"templates": ("{} {",)}, 'the template "{} {" must hold {} once, where the phrase goes.'),
    ],
)
def test_a_concept_is_refused_in_one_sentence(arguments: dict, sentence: str) -> None:
    with pytest.raises(ErasureError, match=f"^{re.escape(sentence)}$"):
        Concept(**{"phrase": "dog", "anchor": "cat"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((" ",), "a preserved phrase is empty: write the concept to keep, or leave it out."),
        (("wolf", 0.0), 'the weight of preserved "wolf" is 0.0: it must be above 0 and finite.'),
        (("wolf", -1.0), 'the weight of preserved "wolf" is -1.0: it must be above 0 and finite.'),
        (("wolf", float("nan")), 'the weight of preserved "wolf" is nan: it must be above 0 and finite.'),
        (("wolf", float("inf")), 'the weight of preserved "wolf" is inf: it must be above 0 and finite.'),
    ],
)
def test_a_preserved_phrase_is_refused_in_one_sentence(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ErasureError, match=f"^{re.escape(sentence)}$"):
        Preserved(*arguments)


def test_phrases_are_the_same_whatever_their_case_and_spaces() -> None:
    assert same("Tom  Cruise ", "tom cruise")
    assert same("STRASSE", "straße")
    assert not same("tom cruise", "tomcruise")


def test_concepts_that_agree_pass() -> None:
    check_together(
        [
            Concept("dog", "animal", preserve=(Preserved("wolf"),)),
            Concept("cat", "animal", preserve=(Preserved("wolf"), Preserved("animal"))),
        ]
    )


@pytest.mark.parametrize(
    ("concepts", "sentence"),
    [
        ([], "no concept to erase was given: name at least one."),
        ([Concept("dog", "sky"), Concept("Dog", "sea")], '"Dog" is on the list twice: keep one.'),
        ([Concept("dog", "sky"), Concept("cat", "sea", aliases=("DOG",))], '"DOG" is on the list twice: keep one.'),
        ([Concept("dog", "sky", aliases=("dog",))], '"dog" is on the list twice: keep one.'),
        (
            [Concept("dog", "Cat"), Concept("cat", "sea")],
            '"Cat" is erased, but also the anchor of "dog": keep it on one list.',
        ),
        (
            [Concept("dog", "sky"), Concept("cat", "sea", preserve=(Preserved("dog"),))],
            '"dog" is erased, but also preserved for "cat": keep it on one list.',
        ),
        (
            [Concept("dog", "sky", aliases=("puppy",)), Concept("cat", "sea", preserve=(Preserved(" Puppy"),))],
            '"Puppy" is erased, but also preserved for "cat": keep it on one list.',
        ),
    ],
)
def test_concepts_that_contradict_are_refused(concepts: list[Concept], sentence: str) -> None:
    with pytest.raises(ErasureError, match=f"^{re.escape(sentence)}$"):
        check_together(concepts)
