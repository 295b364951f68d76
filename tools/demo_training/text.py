"""Text states for training: the encoder's first tokens, with all padding folded into one."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from realera_nodes.demo.clip_text import CONTEXT, EOS, encode_vectors, expand_table


class TextStates:
    """Prompts to (states (B, L, 768), attention bias (B, 1, 1, L)).

    A prompt of n tokens has 77 - n padding states, all but equal to its EOS state. They are left
    out, and the logarithm of their number is added to EOS's attention logit: the same softmax
    for a sixth of the work. ``tests`` hold it to the full encoder.
    """

    def __init__(self, work: Path):
        from transformers import CLIPTokenizer

        saved = torch.load(work / "text.pt", weights_only=True)
        self.table = expand_table(saved["codes"], saved["logits"]).half().float()
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.ids = lru_cache(maxsize=None)(lambda p: tokenizer(p, truncation=True, max_length=CONTEXT)["input_ids"])

    def __call__(self, prompts: list[str], noise: float = 0.0) -> tuple[Tensor, Tensor]:
        rows = [self.ids(p) for p in prompts]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), EOS)
        bias = torch.full((len(rows), length), -30000.0)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            bias[i, : len(row)] = 0
            bias[i, len(row) - 1] = math.log(CONTEXT - len(row) + 1)
        x = self.table[ids]
        if noise:
            x = self.disturb(x, ids < EOS - 1, noise)
        return encode_vectors(x), bias[:, None, None, :]

    @staticmethod
    def disturb(x: Tensor, words: Tensor, noise: float) -> Tensor:
        """Token vectors turned by Gaussian noise of up to ``noise`` times their norm, norms and importances kept.

        Without it the UNet learns a point per word, and words near a concept mean nothing to it.
        """
        z = torch.randn_like(x) * (torch.rand(len(x), 1, 1) * noise)
        y = x + z * words[..., None]
        y[..., -1] = 0
        content = x[..., :-1].norm(dim=-1, keepdim=True)
        y = y * (content / y.norm(dim=-1, keepdim=True))
        y[..., -1] = x[..., -1]
        return y
