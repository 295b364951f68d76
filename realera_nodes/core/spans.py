"""Which token positions of a prompt belong to a phrase, and which of another prompt they correspond to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import ErasureError

#: prompts -> their states
Encode: TypeAlias = "Callable[[Sequence[str]], TextStates]"
#: text -> its token ids, without start and end
PhraseIds: TypeAlias = Callable[[str], Sequence[int]]


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


def template_span(ids: Sequence[int], template: str, phrase: str, phrase_ids: Callable[[str], Sequence[int]]) -> tuple[int, int]:
    """Where a phrase's tokens stand in a template's prompt: at its ``{}``, however often the template's own words repeat them.

    Args:
        ids: of ``template.format(phrase)``, with the start token; an empty phrase has an empty span

    Raises:
        ErasureError: the phrase is not read as its own words there.
    """
    wanted = list(phrase_ids(phrase)) if phrase.strip() else []
    mark = "\0"  # in no text: a template may hold braces that are doubled, as its own
    start = 1 + len(phrase_ids(template.format(mark).partition(mark)[0]))
    if list(ids[start : start + len(wanted)]) == wanted:
        return start, start + len(wanted)
    # a tokenizer may read the words before by what follows them; where nothing repeats the phrase, its place is plain
    spans = find_spans(ids, wanted)
    if len(spans) == 1:
        return spans[0]
    raise ErasureError(
        f'the tokens of "{phrase}" do not stand at the place of {{}} in the prompt "{template.format(phrase)}": '
        "use a template where the phrase stands between spaces, and write the phrase as its own words."
    )


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

    @property
    def head(self) -> Tensor:
        """(start, d), the start token and the words before the concept: a causal encoder gives every prompt with them these."""
        return self.text.states[0, : self.start]


def make_pair(template: str, phrase: str, anchor: str, encode: Encode, phrase_ids: PhraseIds) -> ErasurePair:
    """A phrase and its anchor in a template, token beside token.

    Args:
        template: holds {} once

    Raises:
        ErasureError: phrase or anchor is not read as its own words there.
    """
    prompts = [template.format(phrase), template.format(anchor)]
    text = encode(prompts)
    span, to = (template_span(text.ids[i], template, words, phrase_ids) for i, words in enumerate((phrase, anchor)))
    order = align(span, to, text.states.shape[1])
    targets = text.states[1][order]
    targets[: span[0]] = text.states[0, : span[0]]
    return ErasurePair(prompts[0], prompts[1], text[0], text[1], span[0], span[1], targets)
