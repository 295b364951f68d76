"""Text through ComfyUI's CLIP: SD1.x, SD2.x and SDXL encoders, with clip skip and upstream LoRAs, without prompt weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from torch import Tensor

from ..core.errors import ErasureError
from ..core.phrases import spelled
from ..core.spans import TextStates
from ..core.vocabulary import whole_words
from .comfy_weights import key_patches, weight_keys
from .text_cache import TextCache

ENCODE_BATCH = 32
LENGTH = 77


class ComfyText:
    """A CLIP behind the project's protocol.

    Args:
        clip: ComfyUI's CLIP
        width: of the model's cross-attention

    Raises:
        ErasureError: no CLIP, or one of another family of models.
    """

    def __init__(self, clip: Any, width: int):
        if clip is None:
            raise ErasureError("no text encoder is connected: connect CLIP, or load a checkpoint that holds one.")
        self.clip = clip
        self.keys = [k for k in ("l", "g", "h") if hasattr(clip.cond_stage_model, f"clip_{k}")]
        found = sum(self._encoder(k).transformer.text_model.final_layer_norm.normalized_shape[0] for k in self.keys)
        if found != width or set(clip.tokenize("")) != set(self.keys):
            raise ErasureError(
                f"the text encoder does not match the model (states of width {found}, cross-attention of width {width}): "
                "connect the CLIP of the same checkpoint."
            )
        self.tokenizer = getattr(clip.tokenizer, f"clip_{self.keys[0]}")
        self._texts = TextCache()

    def _encoder(self, key: str) -> Any:
        return getattr(self.clip.cond_stage_model, f"clip_{key}")

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of prompts, (N, 77, d), as CLIPTextEncode gives them.

        Raises:
            ErasureError: longer than 77 tokens, a textual inversion, states that are not finite.
        """
        new = self._texts.missing(prompts)
        # the host returns the pooled state of the first prompt of a batch only
        size = 1 if "g" in self.keys else ENCODE_BATCH
        for start in range(0, len(new), size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            batch = new[start : start + size]
            chunks = [self._chunk(p) for p in batch]
            tokens = {k: [c[k] for c in chunks] for k in self.keys}
            cond, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
            states = cond.float().cpu().reshape(len(batch), LENGTH, -1)
            if not torch.isfinite(states).all():
                raise ErasureError(
                    "the text encoder returned NaN or infinite states: its weights are damaged; load another file."
                )
            for i, prompt in enumerate(batch):
                ids = [int(token) for token, _ in chunks[i][self.keys[0]]]
                one = pooled.float().cpu() if "g" in self.keys else None
                self._texts.put(prompt, TextStates(states[i : i + 1], [ids], one))
        return self._texts.gather(prompts)

    def _chunk(self, prompt: str) -> dict[str, list[tuple[int, float]]]:
        """(token, weight 1) of a prompt's only chunk, by encoder."""
        if "embedding:" in prompt:
            raise ErasureError(
                f'"{prompt[:60]}" holds a textual inversion (embedding:), which has no words to edit: write words.'
            )
        tokens = self.clip.tokenize(spelled(prompt), disable_weights=True)
        if len(tokens[self.keys[0]]) > 1 or len(tokens[self.keys[0]][0]) > LENGTH:
            count = len(self._word_ids(prompt))
            raise ErasureError(f'"{prompt[:60]}..." has {count} tokens and the text encoder reads {LENGTH - 2}: shorten it.')
        return {k: tokens[k][0] for k in self.keys}

    def _word_ids(self, text: str) -> list[int]:
        """Token ids without start and end, of a text as ``encode`` reads it: without the backslashes of escaped brackets."""
        return self.tokenizer.tokenizer(spelled(text)).input_ids[1:-1]

    def phrase_ids(self, phrase: str) -> list[int]:
        """Token ids of a phrase inside a prompt, without start and end tokens."""
        if "embedding:" in phrase:
            raise ErasureError(
                f'"{phrase[:60]}" holds a textual inversion (embedding:), which has no words to edit: write words.'
            )
        return self._word_ids(phrase)

    def rows(self, prompts: Sequence[str], start: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """States (n, d) and weights (n,) of prompts' tokens, a batch at a time; the start token among them with ``start``.

        The encoders are causal, so prompts are cut after two padding tokens; the last one counts for all that follow.
        """
        ordered = sorted(dict.fromkeys(prompts), key=len)
        first = 0 if start else 1
        for done in range(0, len(ordered), 4 * ENCODE_BATCH):
            words = [self._word_ids(p)[: LENGTH - 2] for p in ordered[done : done + 4 * ENCODE_BATCH]]
            length = min(LENGTH, max(map(len, words)) + 4)
            weights = torch.ones(len(words), length)
            weights[:, -1] += LENGTH - length
            yield self._states(words, length)[:, first:].flatten(0, 1), weights[:, first:].flatten()

    def end_states(self, prompts: Sequence[str], batch: int = 256) -> Tensor:
        """The state of each prompt's end-of-text token: (N, d)."""
        out = []
        for start in range(0, len(prompts), batch):
            words = [self._word_ids(p)[: LENGTH - 2] for p in prompts[start : start + batch]]
            states = self._states(words, max(map(len, words)) + 2)
            out.append(states[range(len(words)), [len(w) + 1 for w in words]])
        return torch.cat(out)

    def _states(self, words: list[list[int]], length: int) -> Tensor:
        """States (N, length, d) of token ids, cut to ``length``: the host itself always computes 77 positions."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        model = self.clip.cond_stage_model
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        self.clip.load_model()
        parts = []
        for key in self.keys:
            encoder = self._encoder(key)
            special = encoder.special_tokens
            ids = [[special["start"], *w, special["end"]] for w in words]
            padded = [row + [special["pad"]] * (length - len(row)) for row in ids]
            parts.append(encoder_states(encoder, torch.tensor(padded)))
        return torch.cat(parts, -1)

    def vocabulary(self) -> list[str]:
        """Whole words of the tokenizer, commonest first."""
        return whole_words(self.tokenizer.tokenizer.get_vocab())

    def encoder_hash(self) -> str:
        """Names the encoder as it is used: its weights with upstream LoRAs, and clip skip."""
        digest = hashlib.sha256(f"{self.keys} {self.clip.layer_idx}".encode())
        for name in sorted(weight_keys(self.clip.patcher)):
            (weight, convert), *patches = key_patches(self.clip.patcher, name)
            if patches:
                full = convert(weight.to(torch.float32, copy=True), inplace=True)
                weight = comfy.lora.calculate_weight(patches, full, name)
            flat = weight.detach().flatten()
            digest.update(name.encode())
            digest.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:24]


@torch.no_grad()
def encoder_states(encoder: Any, ids: Tensor) -> Tensor:
    """States (N, L, d) of token ids (N, L), at the layer that ``encoder`` (an SDClipModel) is set to; on the CPU."""
    text = encoder.transformer.text_model
    tokens, positions = text.embeddings.token_embedding, text.embeddings.position_embedding.weight
    x = tokens(ids.to(tokens.weight.device), out_dtype=torch.float32)
    x = x + comfy.model_management.cast_to(positions, torch.float32, x.device)[: ids.shape[1]]
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.finfo(x.dtype).max, dtype=x.dtype, device=x.device).triu_(1)
    x, hidden = text.encoder(x, mask=mask, intermediate_output=encoder.layer_idx)
    if encoder.layer == "last":
        return text.final_layer_norm(x).float().cpu()
    return (text.final_layer_norm(hidden) if encoder.layer_norm_hidden_state else hidden).float().cpu()
