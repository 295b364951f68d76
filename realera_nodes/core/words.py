"""Named neighbors: which words fall into a concept's neighborhood, in text space and by what the model draws for them.

The paper's neighbors are random samples. They say how far an erasure reaches, not what else will go; and what a model has
learned to draw for a concept often lies far from it in text space ("An-225" from "airplane"). So words are also judged by
the model's response: how alike its noise predictions are. This part is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .neighbors import NeighborConfig
from .spans import TextStates

#: of asking words that a regression expects to answer like the concept
ROUNDS = 3


@dataclass(frozen=True)
class NamedWord:
    """A word or phrase near a concept.

    Attributes:
        cosine: of its text state to the concept's (at the end-of-text token)
        distance: relative to the norm of the concept's state
        inside: within d1 and above s2 (Eq. 3, lower bound of Eq. 4)
        response: correlation of the model's answers, 1 for the concept itself; None where it was not measured
    """

    word: str
    cosine: float
    distance: float
    inside: bool
    response: float | None = None


def named_words(concept: Tensor, states: Tensor, words: Sequence[str], config: NeighborConfig) -> list[NamedWord]:
    """All words, nearest first. ``concept`` (d,), ``states`` (V, d), one state a word."""
    cosine = torch.nn.functional.cosine_similarity(states, concept[None], dim=1)
    distance = (states - concept).norm(dim=1) / concept.norm()
    inside = (distance <= config.d1) & (cosine >= config.s2)
    order = distance.argsort()
    return [NamedWord(words[i], float(cosine[i]), float(distance[i]), bool(inside[i])) for i in order.tolist()]


def expected_responses(states: Tensor, asked: Sequence[int], responses: Tensor, ridge: float = 1.0) -> Tensor:
    """What a ridge regression on the words asked so far expects of every word: (V,) in the states' type.

    Args:
        states: (V, d), one state a word; centred and scaled to norm 1 here, so that ``ridge`` means the same for any encoder
        asked: n words by their row; responses: (n,) what was answered
    """
    x = torch.nn.functional.normalize(states - states.mean(0), dim=1)
    known, y = x[list(asked)].double(), responses.to(x.device).double()
    weights = torch.linalg.solve(known @ known.T + ridge * torch.eye(len(known)).to(known), y - y.mean())
    return x @ (known.T @ weights).to(x) + y.mean().to(x)


def ask_words(
    states: Tensor, nearest: Sequence[int], config: NeighborConfig, ask: Callable[[list[int]], Tensor]
) -> dict[int, float]:  # fmt: skip
    """Responses of ``config.candidates`` words, each by its row of ``states``.

    First the nearest in text space; then some from anywhere, as they say what words far away answer, and are what should stay;
    then, in rounds, those that a regression on all answers so far expects to answer most like the concept. Text space alone
    does not lead to them: "newton" is far from "apple".

    Args:
        states: (V, d); nearest: rows that may be asked, nearest first; ask: rows -> responses (n,)
    """
    total = min(config.candidates, len(nearest))
    near, learnt = round(config.nearest * total), round(config.learnt * total)
    shuffled = torch.randperm(len(states), generator=torch.Generator().manual_seed(config.seed)).tolist()
    allowed, chosen = set(nearest), set(nearest[:near])
    spread = [i for i in shuffled if i in allowed and i not in chosen][: total - near - learnt]
    answered: dict[int, float] = {}

    def add(rows: list[int]) -> None:
        if rows:
            answered.update(zip(rows, ask(rows).tolist(), strict=True))

    add([*nearest[:near], *spread])
    for k in range(ROUNDS):
        count = learnt * (k + 1) // ROUNDS - learnt * k // ROUNDS
        best = nearest  # while nothing is known
        if count and answered:
            expected = expected_responses(states, list(answered), torch.tensor(list(answered.values())))
            best = expected.argsort(descending=True).tolist()
        add(list(islice((i for i in best if i in allowed and i not in answered), count)))
    return answered


def response_similarity(
    answer: Callable[[TextStates], Tensor], concept: TextStates, empty: TextStates, texts: TextStates, batch: int = 16
) -> Tensor:
    """How much alike the model answers to prompts and to a concept's: (V,) in [-1, 1].

    The answer to a prompt is its noise prediction at fixed (z_t, t), and what counts is the part that the prompt adds to the
    empty prompt's: cos(eps(w) - eps(""), eps(c) - eps("")), the mean over the (z_t, t).

    Args:
        answer: N texts -> predictions (N, K, n) at K fixed noisy latents
        concept, empty: one text each; texts: V texts
    """
    base = answer(empty)
    wanted = answer(concept) - base
    scores = []
    for start in range(0, len(texts), batch):
        given = answer(texts[start : start + batch]) - base
        scores.append(torch.nn.functional.cosine_similarity(given, wanted, dim=-1).mean(1))
    return torch.cat(scores) if scores else wanted.new_zeros(0)
