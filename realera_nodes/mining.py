"""Mining a loaded model: named neighbors in its vocabulary, and the Gram of the general prior, cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .core.alignment import Trajectories
from .core.concepts import Concept
from .core.errors import ErasureError
from .core.neighbors import NeighborConfig
from .core.phrases import folded
from .core.prior import captions, mean_gram
from .core.spans import ErasurePair, TextStates, make_pair
from .core.words import NamedWord, ask_words, named_words, response_similarity
from .resume import Answers

#: words that the model is asked about together
AT_ONCE = 64
#: called with (stage, done, total); may raise to cancel
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Mined:
    """Words around concepts.

    Attributes:
        named: all words that were judged, by concept, nearest first
        near: pairs (word -> anchor) with their weight in the closed form
        far: prompts of words that draw something else: to be kept
    """

    named: dict[str, list[NamedWord]] = field(default_factory=dict)
    near: list[tuple[ErasurePair, float]] = field(default_factory=list)
    far: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def near_of(self, phrase: str) -> list[NamedWord]:
        """Words that were found to evoke a concept, strongest first."""
        words = set(self.words)
        found = [w for w in self.named.get(phrase, []) if w.word in words]
        return sorted(found, key=lambda w: -(w.response or 0))

    def __add__(self, other: Mined) -> Mined:
        """Of two concepts' words: a word that one erases is not kept for the other's sake, and goes to the first one's anchor."""
        words = set(self.words)
        near = self.near + [n for n, w in zip(other.near, other.words, strict=True) if w not in words]
        erased = {pair.prompt for pair, _ in near}
        far = [p for p in dict.fromkeys(self.far + other.far) if p not in erased]
        return Mined(self.named | other.named, near, far, self.words + [w for w in other.words if w not in words])


def vocabulary(backend: Any, limit: int) -> tuple[list[str], Tensor]:
    """The commonest ``limit`` whole words of the tokenizer and their end-of-text states (V, d), cached by encoder and words."""
    words = backend.vocabulary()[:limit]
    key = f"words-{backend.encoder_hash()}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:16]}"
    states = cached_tensor(key, lambda: backend.end_states(words))
    return words, states


def mine_words(
    backend: Any, concept: Concept, concepts: Sequence[Concept], run: Trajectories,
    config: NeighborConfig, progress: Progress, extra: Sequence[str] = (), kept: Answers | None = None,
) -> Mined:  # fmt: skip
    """Named neighbors of a concept: words of the vocabulary (``ask_words`` says which), judged by the model's response."""
    progress("vocabulary", 0, 1)
    words, states = vocabulary(backend, config.vocabulary)
    size = len(words)
    new = [w for w in dict.fromkeys(extra) if w not in words]
    if new:
        words, states = [*words, *new], torch.cat([states, backend.end_states(new)])
    centre = backend.end_states([concept.phrase])[0]
    taken = {folded(p) for c in concepts for p in (*c.phrases, c.anchor, *(k.phrase for k in c.preserve))}
    named = [w for w in named_words(centre, states, words, config) if folded(w.word) not in taken]
    row = {word: i for i, word in enumerate(words)}
    own = [row[w.word] for w in named if w.word in extra]
    nearest = [row[w.word] for w in named if w.word not in extra]
    progress("vocabulary", 1, 1)
    template = concept.prompts[0]
    answer = answers(backend, run)
    centred = template.format(concept.phrase)
    fixed, kept = backend.encode(["", centred]), kept or Answers()
    total, done = min(config.candidates, len(nearest)) + len(own), 0

    def judge(prompts: list[str]) -> dict[str, Tensor]:
        return {"response": response_similarity(answer, fixed[1], fixed[0], backend.encode(prompts))}

    def ask(rows: list[int]) -> Tensor:
        nonlocal done
        scores = []
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            prompts = [template.format(words[i]) for i in part]
            scores.append(kept.once([centred, concept.anchor, *prompts], partial(judge, prompts))["response"])
            done += len(part)
            progress("named neighbors", done, total)
        return torch.cat(scores)

    responses = ask_words(states[:size], nearest, config, ask)
    if own:  # last and apart: what a user asks about does not change what is mined
        responses.update(zip(own, ask(own).tolist(), strict=True))
    judged = [replace(w, response=responses[row[w.word]]) for w in named if row[w.word] in responses]
    near_words = sorted((w for w in judged if (w.response or 0) >= config.response), key=lambda w: -(w.response or 0))[
        : config.words
    ]
    far_words = [w for w in judged if (w.response or 0) < config.response_beyond][: config.words_beyond]
    near = []
    for w in near_words:
        near.append((make_pair(template, w.word, concept.anchor, backend.encode, backend.phrase_ids), config.word_weight))
    return Mined({concept.phrase: judged}, near, [template.format(w.word) for w in far_words], [w.word for w in near_words])


def answers(backend: Any, run: Trajectories, draws: int = 2) -> Callable[[TextStates], Tensor]:
    """Predictions (B, K, n) at K fixed noisy latents of an anchor's trajectories, early ones, where prompts decide shapes."""
    steps = len(run.timesteps)
    picks = [(k % len(run.latents), round((0.1 + 0.25 * k / max(draws - 1, 1)) * (steps - 1))) for k in range(draws)]
    z = torch.stack([run.latents[k, s] for k, s in picks])
    t = torch.stack([run.timesteps[s] for _, s in picks])

    @torch.no_grad()
    def answer(text: TextStates) -> Tensor:
        b = len(text)
        pooled = None if text.pooled is None else text.pooled.repeat_interleave(draws, 0)
        repeated = TextStates(text.states.repeat_interleave(draws, 0), [], pooled)
        out = backend.predict_noise(z.repeat(b, 1, 1, 1), t.repeat(b), repeated)
        return out.cpu().reshape(b, draws, -1)

    return answer


def prior_gram(
    backend: Any, without: Sequence[str], progress: Progress, own: Sequence[str] | None = None, start: bool = False
) -> Tensor:
    """Mean Gram of captions, the shipped or one's ``own``, that hold none of the phrases ``without``; cached by encoder and text.

    Args:
        start: count the start tokens too, as MACE's prior does

    Raises:
        ErasureError: every caption holds one of them.
    """
    lines = captions(without, own)
    if not lines:
        raise ErasureError("every caption of the prior holds an erased phrase: give captions that say nothing of it.")
    progress("general prior", 0, 1)
    key = f"prior-{backend.encoder_hash()}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}" + "-start" * start
    gram = cached_tensor(key, lambda: mean_gram(partial(backend.rows, start=start), lines, backend.context_width))
    progress("general prior", 1, 1)
    return gram


def cached_tensor(key: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor from the user's cache folder, made and kept there (whole or not at all) at the first call.

    A file that was cut short or damaged is made anew; where nothing can be kept, it is made at every call.
    """
    from .cache import cached, keep, read_or
    from .formats.stream import SafetensorsFile, write_tensors

    path = cached("text", f"{key}.safetensors")
    found = read_or(path, lambda p: SafetensorsFile.open(p).read("x"), "a text state")
    if found is not None:
        return found
    value = make()
    keep(path, lambda p: write_tensors(p, {"x": value}, {}, overwrite=True), "a text state")
    return value
