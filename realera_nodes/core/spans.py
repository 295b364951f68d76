"""Which token positions of a prompt belong to a phrase, and which of another prompt they correspond to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ErasureError


@dataclass(frozen=True)
class TextStates:
    """What a text encoder says of N prompts.

    Attributes:
        states: (N, L, d) float32, the rows that W_K and W_V see; L = 77
        ids: N lists of L token ids, start and end tokens and padding included
        pooled: (N, p) float32 of models that have it (SDXL), else None
    """

    states: Tensor
    ids: list[list[int]]
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, i: int | slice) -> TextStates:
        part = i if isinstance(i, slice) else slice(i, i + 1)
        return TextStates(self.states[part], self.ids[part], None if self.pooled is None else self.pooled[part])


def find_spans(ids: Sequence[int], phrase: Sequence[int]) -> list[tuple[int, int]]:
    """All (start, stop) where ``phrase`` occurs in ``ids`` without overlap, first to last."""
    spans, i, n = [], 0, len(phrase)
    while n and i + n <= len(ids):
        if list(ids[i : i + n]) == list(phrase):
            spans.append((i, i + n))
            i += n
        else:
            i += 1
    return spans


def phrase_span(ids: Sequence[int], phrase: Sequence[int], text: str, prompt: str) -> tuple[int, int]:
    """The last occurrence of a phrase's tokens in a prompt's.

    Raises:
        ErasureError: the phrase's tokens are not in the prompt's.
    """
    spans = find_spans(ids, phrase)
    if not spans:
        raise ErasureError(f'the tokens of "{text}" do not occur in the prompt "{prompt}": write the phrase as its own words.')
    return spans[-1]


def align(span: tuple[int, int], anchor: tuple[int, int], length: int) -> Tensor:
    """For each position of a concept's prompt, the position of the anchor's prompt that it should become: (length,) int64.

    Words before the phrase stay themselves. Subject tokens are aligned at their last one (where a causal encoder has
    gathered the phrase), surplus first tokens to the anchor's first, and the tails after both phrases token by token.
    """
    i = torch.arange(length)
    within = (i - span[1] + anchor[1]).clamp(min=anchor[0])
    tail = (i - span[1] + anchor[1]).clamp(max=length - 1)
    return torch.where(i < span[0], i.clamp(max=length - 1), torch.where(i < span[1], within, tail))


@dataclass(frozen=True)
class ErasurePair:
    """A prompt with the concept and its target.

    Attributes:
        text: states of the concept's prompt, N = 1
        anchor: states of the anchor's prompt, N = 1
        start: first token of the concept; it and all that follow are edited, what stands before is not
        targets: (L, d), the anchor's states re-ordered to the concept's positions
    """

    prompt: str
    anchor_prompt: str
    text: TextStates
    anchor: TextStates
    start: int
    stop: int
    targets: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """(E, E*): (n, d) each, the rows of Eq. 7 without the words before the concept."""
        return self.text.states[0, self.start :], self.targets[self.start :]


def make_pair(
    prompt: str, anchor_prompt: str, phrase: str, anchor_phrase: str, encode, phrase_ids
) -> ErasurePair:  # fmt: skip
    """Encodes both prompts and aligns them. ``encode(prompts) -> TextStates``, ``phrase_ids(text) -> list[int]``."""
    text = encode([prompt, anchor_prompt])
    span = phrase_span(text.ids[0], phrase_ids(phrase), phrase, prompt)
    anchor_span = phrase_span(text.ids[1], phrase_ids(anchor_phrase), anchor_phrase, anchor_prompt)
    order = align(span, anchor_span, text.states.shape[1])
    targets = text.states[1][order]
    targets[: span[0]] = text.states[0, : span[0]]
    return ErasurePair(prompt, anchor_prompt, text[0], text[1], span[0], span[1], targets)
