"""Prompts of a concept and where its tokens stand in them, for training that looks at attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ErasureError
from .refinement import end_position
from .spans import TextStates, find_spans

Encode = Callable[[Sequence[str]], TextStates]
PhraseIds = Callable[[str], list[int]]


@dataclass(frozen=True)
class ConceptPrompts:
    """Prompts of a concept.

    Attributes:
        text: K prompts
        phrase: (K, L) bool, the concept's own tokens
        tail: (K, L) bool, end token and padding
    """

    text: TextStates
    phrase: Tensor
    tail: Tensor


def concept_prompts(prompts: Sequence[str], phrase: str, encode: Encode, phrase_ids: PhraseIds) -> ConceptPrompts:
    """Prompts with their token positions; a phrase that a prompt holds twice is looked for twice, as in the public code.

    Args:
        encode, phrase_ids: as core.spans.make_pair takes them

    Raises:
        ErasureError: the phrase's tokens are not in a prompt's.
    """
    text = encode(prompts)
    own, tail = torch.zeros(2, len(prompts), text.states.shape[1], dtype=torch.bool)
    wanted = phrase_ids(phrase)
    for i, (prompt, ids) in enumerate(zip(prompts, text.ids, strict=True)):
        spans = find_spans(ids, wanted)
        if not spans:
            raise ErasureError(
                f'the tokens of "{phrase}" do not occur in the prompt "{prompt}": write the phrase as its own words.'
            )
        for start, stop in spans:
            own[i, start:stop] = True
        tail[i, end_position(ids) :] = True
    return ConceptPrompts(text, own, tail)
