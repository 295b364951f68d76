"""Prompts of a concept and where its tokens stand in them, for training that looks at attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .refinement import end_position
from .spans import Encode, PhraseIds, TextStates, find_spans, template_span


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


def concept_prompts(templates: Sequence[str], phrase: str, encode: Encode, phrase_ids: PhraseIds) -> ConceptPrompts:
    """The phrase in templates, with its token positions; twice where a prompt holds it twice, as in the public code.

    Args:
        templates: each holds {} once; encode, phrase_ids: as core.spans.make_pair takes them

    Raises:
        ErasureError: the phrase is not read as its own words.
    """
    text = encode([template.format(phrase) for template in templates])
    own, tail = torch.zeros(2, len(templates), text.states.shape[1], dtype=torch.bool)
    wanted = phrase_ids(phrase)
    for i, (template, ids) in enumerate(zip(templates, text.ids, strict=True)):
        for start, stop in (template_span(ids, template, phrase, phrase_ids), *find_spans(ids, wanted)):
            own[i, start:stop] = True
        tail[i, end_position(ids) :] = True
    return ConceptPrompts(text, own, tail)
