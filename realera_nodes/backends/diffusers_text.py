"""Text through a diffusers pipeline's encoders and tokenizers: one for SD1.x and SD2.x, two for SDXL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ErasureError
from ..core.phrases import spelled
from ..core.spans import TextStates
from ..core.vocabulary import whole_words
from .idle_layers import without_idle_layers
from .text_cache import TextCache

ENCODE_BATCH = 32


class DiffusersText:
    """The text side of the project's protocol; states of prompts are kept, as the same ones are asked for again and again."""

    def __init__(self, pipe: Any, kind: str, device: torch.device):
        self.pipe, self.kind, self.device = pipe, kind, device
        second = [(pipe.tokenizer_2, pipe.text_encoder_2)] if kind == "sdxl" else []
        self._texters = [(pipe.tokenizer, pipe.text_encoder), *second]
        self._texts = TextCache()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of prompts, (N, 77, d). ErasureError: a prompt is longer than 77 tokens, or states are not finite."""
        new = self._texts.missing(prompts)
        for start in range(0, len(new), ENCODE_BATCH):
            batch = new[start : start + ENCODE_BATCH]
            ids = [self.token_ids(p) for p in batch]
            with self._lean():
                encoded = self.pipe.encode_prompt(
                    batch, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            states = encoded[0].float().cpu()
            pooled = encoded[2].float().cpu() if self.kind == "sdxl" else None
            if not torch.isfinite(states).all():
                raise ErasureError("the text encoder returned NaN or infinity: its weights are damaged; load another file.")
            for i, prompt in enumerate(batch):
                self._texts.put(prompt, TextStates(states[i : i + 1], [ids[i]], None if pooled is None else pooled[i : i + 1]))
        return self._texts.gather(prompts)

    @torch.no_grad()
    def rows(self, prompts: Sequence[str], start: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """States (n, d) and weights (n,) of prompts' tokens, a batch at a time; the start token among them with ``start``.

        The encoder is causal, so prompts are cut after two padding tokens; the last one counts for all that follow.
        """
        longest = self.pipe.tokenizer.model_max_length
        ordered = sorted(dict.fromkeys(prompts), key=len)
        first = 0 if start else 1
        for done in range(0, len(ordered), 4 * ENCODE_BATCH):
            batch = ordered[done : done + 4 * ENCODE_BATCH]
            counts = [len(ids) for tokenizer, _ in self._texters for ids in tokenizer(batch, truncation=True).input_ids]
            length = min(longest, max(counts) + 2)
            states = torch.cat(self._read([self._padded(tokenizer, batch, length) for tokenizer, _ in self._texters]), -1)
            weights = torch.ones(len(batch), length)
            weights[:, -1] += longest - length
            yield states[:, first:].flatten(0, 1), weights[:, first:].flatten()

    @torch.no_grad()
    def end_states(self, prompts: Sequence[str], batch: int = 256) -> Tensor:
        """The state of each prompt's end-of-text token: (N, d)."""
        longest, out = self.pipe.tokenizer.model_max_length, []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            counts = [len(ids) for tokenizer, _ in self._texters for ids in tokenizer(part, truncation=True).input_ids]
            ids = [self._padded(tokenizer, part, min(longest, max(counts))) for tokenizer, _ in self._texters]
            ends = [(i == t.eos_token_id).int().argmax(1) for i, (t, _) in zip(ids, self._texters, strict=True)]
            out.append(torch.cat([s[range(len(end)), end] for s, end in zip(self._read(ids), ends, strict=True)], -1))
        return torch.cat(out)

    @staticmethod
    def _padded(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
        """Token ids (N, length) with the tokenizer's own padding: SDXL's two pad differently."""
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    def _read(self, ids: list[Tensor]) -> list[Tensor]:
        """Each encoder's states (N, L, .) of its ids, as the pipeline hands them to the UNet (SDXL: last layer but one)."""
        if self.kind != "sdxl":
            with self._lean():
                return [self.pipe.text_encoder(ids[0].to(self.device))[0].float().cpu()]
        return [encoder(i.to(self.device), output_hidden_states=True).hidden_states[-2].float().cpu()
                for i, (_, encoder) in zip(ids, self._texters, strict=True)]  # fmt: skip

    def _lean(self) -> AbstractContextManager[None]:
        # SDXL's states are taken one layer before the last, so there every layer counts
        return nullcontext() if self.kind == "sdxl" else without_idle_layers(self.pipe.text_encoder)

    def token_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt with start, end and padding. ErasureError: it is longer than the encoder reads."""
        tokenizer, longest = self.pipe.tokenizer, self.pipe.tokenizer.model_max_length
        ids = tokenizer(prompt, padding="max_length", max_length=longest).input_ids
        if len(ids) > longest:
            raise ErasureError(
                f'"{prompt[:60]}..." has {len(ids) - 2} tokens and the text encoder reads {longest - 2}: shorten it.'
            )
        return ids

    def phrase_ids(self, phrase: str) -> list[int]:
        return self.pipe.tokenizer(spelled(phrase), add_special_tokens=False).input_ids

    def vocabulary(self) -> list[str]:
        """Whole words of the tokenizer, commonest first."""
        return whole_words(self.pipe.tokenizer.get_vocab())

    def encoder_hash(self) -> str:
        digest = hashlib.sha256()
        for tokenizer, encoder in self._texters:
            digest.update(f"{len(tokenizer)} {tokenizer.pad_token_id}".encode())
            for name, p in encoder.state_dict().items():
                digest.update(name.encode())
                flat = p.detach().flatten()
                digest.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:24]
