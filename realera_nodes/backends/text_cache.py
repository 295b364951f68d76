"""Text states of the prompts that were asked for last: training asks for the same few again and again."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.alignment import join
from ..core.spans import TextStates


class TextCache:
    """States by prompt. The newest ``limit`` prompts are kept: 512 of SD1.x are 120 MB."""

    def __init__(self, limit: int = 512):
        self.limit = limit
        self._texts: dict[str, TextStates] = {}

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Prompts to be encoded, each once."""
        return [p for p in dict.fromkeys(prompts) if p not in self._texts]

    def put(self, prompt: str, text: TextStates) -> None:
        self._texts[prompt] = text

    def gather(self, prompts: Sequence[str]) -> TextStates:
        """States of prompts that are all here, as one batch; afterwards the oldest of too many go."""
        found = join([self._texts[p] for p in prompts])
        for prompt in list(self._texts)[: max(0, len(self._texts) - self.limit)]:
            del self._texts[prompt]
        return found
