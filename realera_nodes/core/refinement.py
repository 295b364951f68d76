"""MACE's closed-form refinement: words around a concept forget it (Eq. 1, 2, 19).

A causal text encoder writes a phrase into every word that follows, end and padding included, so that those words alone
still evoke it. They are mapped to what they are beside the anchor; the phrase's own tokens are left to the concept's LoRA.
Words before the phrase cannot know of it: their rows are their own targets and keep the edit from them.

The objective is that of core.closed_form with other rows, so the same sums and the same solve serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .closed_form import Grams, Transform, solve
from .concepts import Concept
from .errors import ErasureError
from .settings import check_settings, number
from .spans import ErasurePair, TextStates, make_pair
from .templates import CONTEXTS, contexts_of

T = TypeVar("T")
#: rows of the prior that the paper's lambda_1 weighs: the public code sums over all captions of MS-COCO 2014, 77 tokens of each
CAPTION_ROWS = 616_767 * 77.0


@dataclass(frozen=True)
class RefinementConfig:
    """Weights of MACE's two closed forms: refinement (Eq. 1, 19) and fusion (Eq. 7).

    The paper states lambda_1 and lambda_2 for a sum over MS-COCO captions and does not say how many; its public script takes
    all. Here the general prior is a mean over captions, counted ``prior_rows`` times, so that the same lambda means the same
    with any list of captions.

    Attributes:
        lambda_1: weight of the general prior in the refinement (Table 10: 1e-4, explicit content 7e-7)
        lambda_2: the same in the fusion (Table 10: as lambda_1)
        lambda_3: weight of the sum over the user's retained concepts, in both (Table 10: 0.8 for one person, 5 for five, 8 for
            ten, 20 for a hundred; 8 for a hundred styles)
        mu: weight of ||W' - W||^2, for objects, which captions are full of, in place of the general prior (Table 10 lists it
            in the column of lambda_1: 0.1 to 1000). Captions without the erased words are the other way out
        prior_rows: rows that the general prior stands for
        double_scale: the public code multiplies both priors by its scale, lambda_1, twice in the refinement, so that the
            published numbers were made with lambda_1^2 = 1e-8 and lambda_1 lambda_3 there; on, it is done so here
        contexts: prompts a phrase, at most; 30 is all
        head: take the rows before the phrase, the start token among them, as their own targets
        ridge: numerical, relative to the mean of C's diagonal; anchored to what the closed form starts from
        max_condition: refuse to invert C beyond it
    """

    lambda_1: float = number(1e-4, 0, 1000, 1e-7)
    lambda_2: float = number(1e-4, 0, 1000, 1e-7)
    lambda_3: float = number(1.0, 0, 1000, 0.1)
    mu: float = number(0.0, 0, 1_000_000, 0.1)
    prior_rows: float = number(CAPTION_ROWS, 0, 1e12, 1)
    double_scale: bool = False
    contexts: int = number(30, 1, 30)
    head: bool = True
    ridge: float = number(1e-6, 0, 1, 1e-6)
    max_condition: float = number(1e13, 1, 1e30)

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def for_kind(cls, kind: str, **changes: Any) -> RefinementConfig:
        """The paper's weights for a kind of concept (Table 10); of its values for objects the middle one."""
        if kind not in _KINDS:
            raise ErasureError(f'unknown kind "{kind}": choose one of {", ".join(_KINDS)}.')
        return cls(**(_KINDS[kind] | changes))

    @property
    def refinement_prior(self) -> float:
        """What a mean over captions is multiplied with in the refinement."""
        return self.lambda_1 * self._again * self.prior_rows

    @property
    def refinement_domain(self) -> float:
        """What the sum over the retained concepts is multiplied with in the refinement."""
        return self.lambda_3 * self._again

    @property
    def _again(self) -> float:
        return self.lambda_1 if self.double_scale else 1.0

    @property
    def fusion_prior(self) -> float:
        """What a mean over captions is multiplied with in the fusion."""
        return self.lambda_2 * self.prior_rows


_KINDS: dict[str, dict[str, Any]] = {
    "object": {"lambda_1": 0.0, "lambda_2": 0.0, "mu": 10.0},
    "person": {"lambda_3": 8.0},
    "style": {"lambda_3": 8.0},
    "explicit": {"lambda_1": 7e-7, "lambda_2": 7e-7},
}


def end_position(ids: Sequence[int]) -> int:
    """Where the prompt ends: its first end token. CLIP's has the largest id of all, and CLIP itself finds it so."""
    return ids.index(max(ids))


def refine_pairs(
    concepts: Iterable[Concept], encode: Callable[[Sequence[str]], TextStates], phrase_ids: Callable[[str], list[int]],
    contexts: int = 30, templates: Mapping[str, Sequence[str]] = CONTEXTS,
) -> Iterator[ErasurePair]:  # fmt: skip
    """Every phrase of every concept in the prompts of its kind, beside its anchor: one pair at a time, none is kept.

    Args:
        encode, phrase_ids: as core.spans.make_pair takes them
        contexts: prompts a phrase, at most; a concept's own ``templates`` come in place of the kind's
    """
    for concept in concepts:
        for phrase in concept.phrases:
            for template in contexts_of(concept, contexts, templates):
                yield make_pair(template, phrase, concept.anchor, encode, phrase_ids)


def context_rows(
    pair: ErasurePair, head: bool = True, states: Tensor | None = None, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows around the phrase and the same words beside the anchor: (n, d) each, never a row of the phrase.

    They are the words before it (with ``head``), and those after it up to the end of the shorter of both prompts' tails:
    end token and padding among them, each beside its own kind.

    Args:
        states, targets: (M, L, d) samples in place of the pair's own, such as neighbors and their perturbed anchors

    Raises:
        ErasureError: the words around the phrase are not the same tokens in both prompts.
    """
    ids, anchor_ids = pair.text.ids[0], pair.anchor.ids[0]
    shift = end_position(anchor_ids) - end_position(ids)  # the anchor's surplus of tokens
    stop = len(ids) - max(0, shift)
    if ids[: pair.start] != anchor_ids[: pair.start] or ids[pair.stop : stop] != anchor_ids[pair.stop + shift : stop + shift]:
        raise ErasureError(
            f'the words around the phrase are read differently in "{pair.prompt}" and "{pair.anchor_prompt}": '
            "use a template where the phrase stands between spaces."
        )
    e, to = (pair.text.states if states is None else states), (pair.targets if targets is None else targets)
    to = to.expand_as(e)
    parts = [slice(0, pair.start), slice(pair.stop, stop)] if head else [slice(pair.stop, stop)]
    rows, goals = (torch.cat([x[:, part] for part in parts], 1).flatten(0, 1) for x in (e, to))
    return rows, goals


def refinement_grams(
    width: int,
    pairs: Iterable[ErasurePair],
    config: RefinementConfig,
    general: Tensor | None = None,
    domain: Tensor | None = None,
) -> Grams:
    """The sums of Eq. 19, all weights applied: solve with lambda_1 = 1.

    Args:
        general: mean of p p^T over captions (d, d), core.prior.mean_gram's
        domain: sum of p p^T over the retained concepts (d, d), ``retained_gram``'s
    """
    grams = Grams(width)
    for e, targets in in_batches(context_rows(pair, config.head) for pair in pairs):
        grams.erase(e, targets)
    keep_priors(grams, config, general, domain)
    return grams


def keep_priors(grams: Grams, config: RefinementConfig, general: Tensor | None, domain: Tensor | None) -> None:
    """Adds what the refinement keeps: general prior, retained concepts, and mu I, which is mu ||W' - W||^2."""
    add_priors(grams, general, config.refinement_prior, domain, config.refinement_domain)
    if config.mu:
        grams.add_prior(config.mu * torch.eye(grams.width, dtype=torch.float64), 0)


def add_priors(grams: Grams, general: Tensor | None, general_weight: float, domain: Tensor | None, domain_weight: float) -> None:
    """Adds what both closed forms keep, general prior and retained concepts, (d, d) each, with a closed form's own weights."""
    if general is not None and general_weight:
        grams.add_prior(general_weight * general, general_weight)
    if domain is not None and domain_weight:
        grams.add_prior(domain_weight * domain, 0)


def grouped(items: Iterable[T], size: Callable[[T], int], rows: int) -> Iterator[list[T]]:
    """Items joined until they have ``rows`` rows: fewer make slow products, and all at once would take their memory."""
    group: list[T] = []
    count = 0
    for item in items:
        group.append(item)
        count += size(item)
        if count >= rows:
            yield group
            group, count = [], 0
    if group:
        yield group


def in_batches(groups: Iterable[tuple[Tensor, ...]], rows: int = 2048) -> Iterator[tuple[Tensor, ...]]:
    """Groups of tensors (n, d) joined until each has ``rows`` rows or more: a prompt's 77 alone make slow products."""
    for waiting in grouped(groups, lambda group: len(group[0]), rows):
        yield tuple(torch.cat(parts) for parts in zip(*waiting, strict=True))


def retained_gram(
    rows: Callable[[Sequence[str]], Iterable[tuple[Tensor, Tensor]]], prompts: Sequence[tuple[str, float]], width: int
) -> Tensor:
    """Sum of w p p^T over the token states of prompts with weights w: (d, d) float64.

    ``rows(prompts)`` yields (states (n, d), counts (n,)), as for core.prior.mean_gram.
    """
    total = torch.zeros(width, width, dtype=torch.float64)
    for weight in sorted({w for _, w in prompts}):
        for states, counts in rows([p for p, w in prompts if w == weight]):
            x = states.double()
            total.addmm_(x.T, x * counts.double()[:, None], alpha=weight)
    return total


def refine(
    width: int,
    pairs: Iterable[ErasurePair],
    config: RefinementConfig,
    general: Tensor | None = None,
    domain: Tensor | None = None,
) -> Transform:
    """Eq. 2 and 19: W' = W0 T for every projection of context width ``width``.

    Raises:
        ErasureError: no pair was given, or C cannot be inverted well.
    """
    grams = refinement_grams(width, pairs, config, general, domain)
    if not grams.rows:
        raise ErasureError("no concept to refine was given: name at least one.")
    return solve(grams, 1.0, config.ridge, config.max_condition)
