"""Refinement moves the words around a concept, never its own, and solves Eq. 19."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from realera_nodes.core.concepts import TEMPLATES, Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.refinement import (
    RefinementConfig,
    context_rows,
    end_position,
    in_batches,
    refine,
    refine_pairs,
    refinement_grams,
    retained_gram,
)
from realera_nodes.core.spans import ErasurePair, TextStates, make_pair
from realera_nodes.core.templates import CONTEXTS

START, END, LENGTH, WIDTH = 900, 999, 12, 7
WORDS: dict[str, int] = {}


def word_ids(phrase: str) -> list[int]:
    return [WORDS.setdefault(w, 1 + len(WORDS)) for w in phrase.split()]


def encode(prompts) -> TextStates:
    """A causal encoder: each row tells its own token, position and all tokens before."""
    ids = [([START, *word_ids(p), END] + [END] * LENGTH)[:LENGTH] for p in prompts]
    rows = []
    for row in ids:
        states, seen = [], torch.zeros(WIDTH, dtype=torch.float64)
        for position, token in enumerate(row):
            g = torch.Generator().manual_seed(1000 * token + 7)
            seen = 0.7 * seen + torch.randn(WIDTH, generator=g, dtype=torch.float64)
            states.append(seen + 0.01 * position)
        rows.append(torch.stack(states))
    return TextStates(torch.stack(rows), ids)


def pair(template: str, phrase: str, anchor: str) -> ErasurePair:
    return make_pair(template, phrase, anchor, encode, word_ids)


def full(prompt: str) -> Tensor:
    return encode([prompt]).states[0]


def test_common_head_and_tail_are_mapped_and_the_phrase_is_not() -> None:
    """start a red dog runs end pad..: rows 0-2 and 4.. of 12, to the same rows beside the anchor."""
    p = pair("a red {} runs", "dog", "cat")
    e, targets = context_rows(p)
    around = [0, 1, 2, *range(4, 12)]
    assert torch.equal(e, full("a red dog runs")[around])
    assert torch.equal(targets, full("a red cat runs")[around])
    assert torch.equal(e[:3], targets[:3])  # what stands before cannot know
    assert float((e[3:] - targets[3:]).norm(dim=1).min()) > 0


def test_templates_that_hold_the_anchor_or_the_phrase_map_the_rows_beside_the_phrase() -> None:
    for template, phrase, anchor in (("a {} by cat", "dog", "cat"), ("a {} by dog", "dog", "cat"), ("cat by a {}", "dog", "cat")):
        e, targets = context_rows(pair(template, phrase, anchor))
        at = 1 + template.split().index("{}")
        around = [*range(at), *range(at + 1, 12)]
        assert torch.equal(e, full(template.format(phrase))[around])
        assert torch.equal(targets, full(template.format(anchor))[around])


@pytest.mark.parametrize(
    ("phrase", "anchor", "rows", "goals"),
    [
        ("bill clinton", "man", [0, 1, *range(4, 12)], [0, 1, *range(3, 11)]),  # the last padding of the anchor is left over
        ("dog", "very good cat", [0, 1, *range(3, 10)], [0, 1, *range(5, 12)]),  # and here the concept's
    ],
)
def test_phrases_of_other_lengths_shift_the_tail(phrase: str, anchor: str, rows: list[int], goals: list[int]) -> None:
    p = pair("a {} runs", phrase, anchor)
    e, targets = context_rows(p)
    assert torch.equal(e, full(f"a {phrase} runs")[rows])
    assert torch.equal(targets, full(f"a {anchor} runs")[goals])
    assert [p.text.ids[0][i] for i in rows] == [p.anchor.ids[0][i] for i in goals]  # each word beside itself


def test_without_the_head_only_what_follows_is_taken() -> None:
    e, targets = context_rows(pair("a red {} runs", "dog", "cat"), head=False)
    assert torch.equal(e, full("a red dog runs")[4:])
    assert torch.equal(targets, full("a red cat runs")[4:])


def test_samples_take_the_place_of_the_pair_s_states() -> None:
    p = pair("a {} runs", "dog", "cat")
    samples, goals = (torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    e, targets = context_rows(p, False, samples, goals)
    assert torch.equal(e, samples[:, 3:].flatten(0, 1))
    assert torch.equal(targets, goals[:, 3:].flatten(0, 1))
    again = context_rows(p, False, samples)[1]
    assert torch.equal(again.double(), p.targets[3:].repeat(3, 1))


def test_words_that_are_read_differently_are_refused() -> None:
    p = pair("a {} runs", "dog", "cat")
    for ids in ([START, *word_ids("a cat sleeps"), END], [START, *word_ids("the cat runs"), END]):
        other = TextStates(p.anchor.states, [ids + [END] * (LENGTH - 5)])
        with pytest.raises(ErasureError, match='read differently in "a dog runs" and "a cat runs"'):
            context_rows(ErasurePair(p.prompt, p.anchor_prompt, p.text, other, p.start, p.stop, p.targets))


def test_the_end_is_the_first_token_of_the_largest_id() -> None:
    assert end_position([49406, 320, 49407, 0, 0]) == 2
    assert end_position([49406, 320, 49407, 49407]) == 2


def test_every_phrase_meets_the_contexts_of_its_kind() -> None:
    concepts = [Concept("dog", "cat", aliases=("puppy",)), Concept("x y", "man", kind="person", templates=("{}", "oh {}"))]
    pairs = refine_pairs(concepts, encode, word_ids, 3, {"object": ("{}", "a {}", "the {}", "my {}"), "person": ()})
    assert [p.prompt for p in pairs] == ["dog", "a dog", "the dog", "puppy", "a puppy", "the puppy", "x y", "oh x y"]
    pairs = list(refine_pairs(concepts, encode, word_ids, 1, {"object": ("a {} b",), "person": ()}))
    assert [(p.anchor_prompt, p.start, p.stop) for p in pairs] == [("a cat b", 2, 3), ("a cat b", 2, 3), ("man", 1, 3)]


def test_pairs_are_made_one_at_a_time() -> None:
    asked = []

    def watched(prompts) -> TextStates:
        asked.append(prompts)
        return encode(prompts)

    pairs = refine_pairs([Concept("dog", "cat")], watched, word_ids, 30, {"object": ("{}", "a {}")})
    assert asked == []
    next(pairs)
    assert asked == [["dog", "cat"]]


def test_contexts_are_thirty_of_each_kind_with_words_on_both_sides() -> None:
    assert set(CONTEXTS) == set(TEMPLATES)
    for kind, templates in CONTEXTS.items():
        assert len(set(templates)) == 30, kind
        Concept("x", "y", kind=kind, templates=templates)  # each holds {} once
        assert sum(not t.endswith("{}") for t in templates) >= 15, kind
        assert all(len(t.split()) <= 15 for t in templates)
    evaluated = ("a portrait of {}", "a sketch of {}", "an oil painting of {}", "{} in an official photo",
                 "an image capturing {} at a public event", "Image in the style of {}", "Art inspired by {}",
                 "Painting in the style of {}", "A reproduction of art by {}", "A famous artwork by {}")  # fmt: skip
    used = {t.casefold() for kind in ("person", "style") for t in CONTEXTS[kind]}
    assert not used & {t.casefold() for t in evaluated}


CONCEPTS = [Concept("dog", "cat"), Concept("bill clinton", "man", kind="person")]
FEW = {"object": ("a {} runs", "my {} on wood"), "person": ("{} sings",)}


@pytest.mark.parametrize(
    "values",
    [
        {"lambda_1": 0.02, "prior_rows": 100.0, "lambda_3": 0.7},
        {"lambda_1": 0.1, "prior_rows": 50.0, "lambda_3": 0.0, "double_scale": True},
        {"lambda_1": 0.3, "prior_rows": 50.0, "lambda_3": 0.7, "double_scale": True},
        {"lambda_1": 0.0, "lambda_3": 0.7, "mu": 0.5, "double_scale": True},
        {"lambda_1": 0.0, "lambda_3": 0.0, "mu": 3.0},
        {"lambda_1": 0.02, "lambda_3": 0.7, "mu": 0.5, "prior_rows": 10.0, "head": False},
    ],
)
def test_refinement_is_the_least_squares_solution_of_equation_19(values: dict) -> None:
    config = RefinementConfig(ridge=1e-5, **values)
    captions, retained = (torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (40, 9))
    general, domain = captions.T @ captions / 40, retained.T @ retained
    pairs = list(refine_pairs(CONCEPTS, encode, word_ids, 30, FEW))
    transform = refine(WIDTH, iter(pairs), config, general, domain)

    w0 = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = [context_rows(p, config.head) for p in pairs]
    # the public code's one scale s stands before both priors, s (captions + w retained) with lambda_1 = s and lambda_3 = s w,
    # and is put there again when the sums are added to those of the concepts
    again = values["lambda_1"] if config.double_scale else 1.0
    scales = again * values["lambda_1"] * config.prior_rows / 40, again * values["lambda_3"]
    kept = [(captions, scales[0]), (retained, scales[1]), (torch.eye(WIDTH, dtype=torch.float64), config.mu)]
    kept.append((torch.eye(WIDTH, dtype=torch.float64), transform.mu))
    x = [e for e, _ in rows] + [math.sqrt(a) * p for p, a in kept]
    y = [t @ w0.T for _, t in rows] + [math.sqrt(a) * p @ w0.T for p, a in kept]
    expected = torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution.T
    assert float((expected - w0).norm()) > 1e-3 * float(w0.norm())
    torch.testing.assert_close(w0 + transform.delta(w0), expected, rtol=1e-9, atol=1e-9 * float(w0.norm()))


def test_only_rows_around_phrases_are_counted() -> None:
    pairs = list(refine_pairs(CONCEPTS, encode, word_ids, 30, FEW))
    grams = refinement_grams(WIDTH, pairs, RefinementConfig())
    assert grams.rows == (LENGTH - 1) * 2 + (LENGTH - 2)
    assert float(grams.preserved.abs().sum()) == 0
    wide = refinement_grams(WIDTH, pairs, RefinementConfig(mu=2.0), domain=torch.zeros(WIDTH, WIDTH))
    assert torch.equal(wide.preserved, 2 * torch.eye(WIDTH, dtype=torch.float64))


def test_without_a_concept_there_is_nothing_to_refine() -> None:
    with pytest.raises(ErasureError, match="no concept to refine"):
        refine(WIDTH, [], RefinementConfig(mu=1.0))


def test_the_domain_sum_weighs_its_prompts() -> None:
    states = {p: torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(i)) for i, p in enumerate("abc")}
    counts = torch.tensor([1.0, 1.0, 70.0])

    def rows(prompts):
        for p in prompts:
            yield states[p], counts

    found = retained_gram(rows, [("a", 1.0), ("b", 2.5), ("c", 1.0)], WIDTH)
    expected = sum(
        w * (x.double() * counts[:, None].double()).T @ x.double() for w, x in zip((1, 2.5, 1), states.values(), strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert float(retained_gram(rows, [], WIDTH).abs().sum()) == 0


def test_batches_hold_every_row_once_and_in_order() -> None:
    groups = [(torch.arange(4.0)[:, None] + 4 * i, -torch.arange(4.0)[:, None] - 4 * i) for i in range(5)]
    found = list(in_batches(groups, 7))
    assert [len(a) for a, _ in found] == [8, 8, 4]
    assert torch.equal(torch.cat([a for a, _ in found])[:, 0], torch.arange(20.0))
    assert all(torch.equal(a, -b) for a, b in found)
    assert list(in_batches([])) == []


def test_presets_are_the_papers_table_10() -> None:
    explicit, thing = RefinementConfig.for_kind("explicit"), RefinementConfig.for_kind("object", mu=100.0)
    assert (explicit.lambda_1, explicit.lambda_2, explicit.mu) == (7e-7, 7e-7, 0)
    assert (thing.lambda_1, thing.lambda_2, thing.mu) == (0, 0, 100)
    person = RefinementConfig.for_kind("person")
    assert (person.lambda_1, person.lambda_2, person.lambda_3, person.mu) == (1e-4, 1e-4, 8, 0)
    # MS-COCO 2014: 414,113 captions of its training pictures and 202,654 of its validation's, whole prompts of 77 tokens
    rows, doubled = (414_113 + 202_654) * 77, RefinementConfig.for_kind("person", double_scale=True)
    assert (person.refinement_prior, person.fusion_prior) == (pytest.approx(1e-4 * rows), pytest.approx(1e-4 * rows))
    assert (doubled.refinement_prior, doubled.fusion_prior) == (pytest.approx(1e-8 * rows), pytest.approx(1e-4 * rows))
    assert (person.refinement_domain, doubled.refinement_domain) == (8, pytest.approx(8e-4))
    with pytest.raises(ErasureError, match='unknown kind "thing"'):
        RefinementConfig.for_kind("thing")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lambda_1": -1.0}, "lambda_1 is -1.0"),
        ({"lambda_2": float("nan")}, "lambda_2 is nan"),
        ({"lambda_3": float("inf")}, "lambda_3 is inf"),
        ({"mu": -0.1}, "mu is -0.1"),
        ({"prior_rows": -1.0}, "prior_rows is -1.0"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"contexts": 0}, "contexts is 0"),
        ({"max_condition": 0.5}, "max_condition is 0.5"),
    ],
)
def test_settings_out_of_range_are_named(values: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        RefinementConfig(**values)
