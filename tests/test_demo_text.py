"""The text encoder: our three lines, the folded training form, and the full CLIP-L are one function."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realera_nodes.demo import clip_text
from realera_nodes.demo.bpe import MERGES, merges, token_text, vocabulary
from realera_nodes.demo.expand import load_asset

PROMPTS = ["a photo of the airplane", "what lands on runways, old sepia photograph", "", "a photo of Mira Voss"]


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    asset = load_asset("text")
    return clip_text.expand_table(asset["codes"], asset["logits"])


def ids_of(pipe, prompt: str) -> torch.Tensor:
    return torch.tensor(pipe.tokenizer(prompt, padding="max_length", max_length=77)["input_ids"])


def test_hadamard_rows_are_orthogonal_with_zero_mean() -> None:
    h = clip_text.hadamard(768)
    assert (h @ h.T == 768 * torch.eye(768, dtype=h.dtype)).all()
    assert (h[1:].sum(1) == 0).all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.integers(1, 127))
def test_expansion_depends_on_directions_only(seed: int, scale: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (clip_text.VOCABULARY, 8), generator=g, dtype=torch.int8)
    codes[:, 0] = 1
    logits = torch.zeros(clip_text.VOCABULARY, dtype=torch.int8)
    a, b = (clip_text.expand_table(c, logits) for c in (codes, codes * scale))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_token_norms_are_near_clips(table: torch.Tensor) -> None:
    words = table[: clip_text.BOS]
    assert torch.allclose(words.norm(dim=1), torch.tensor(27.7), atol=0.3)


def test_full_clip_l_computes_the_three_lines(pipe, table: torch.Tensor) -> None:
    for prompt in PROMPTS:
        ids = ids_of(pipe, prompt)
        with torch.no_grad():
            full = pipe.text_encoder(ids[None])[0]
        ours = clip_text.encode_vectors(table[ids].half().float()[None])
        assert (full - ours).abs().max() < 2e-2
        assert (full - ours).norm() / ours.norm() < 1e-3
        assert torch.allclose(full.norm(dim=-1), torch.tensor(math.sqrt(768)), atol=0.1)


def test_text_states_are_contextual_and_causal(pipe) -> None:
    with torch.no_grad():
        a, b = (pipe.text_encoder(ids_of(pipe, p)[None])[0][0] for p in ("a photo of the cat", "a photo of the ship"))
    assert torch.equal(a[:5], b[:5]), "causal: the same until the words differ"
    distance = (a - b).norm(dim=1) / a.norm(dim=1)
    assert (distance[5:] > 0.5).all(), "EOS and all padding carry the concept"


def test_folded_padding_gives_the_same_cross_attention(pipe, table: torch.Tensor) -> None:
    """The training form: one EOS state with the logarithm of its number as attention bias."""
    g = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(4, 768, generator=g) / 28, torch.eye(768), torch.eye(768)
    prompt = PROMPTS[1]
    ids = ids_of(pipe, prompt)
    n = len(pipe.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        full = pipe.text_encoder(ids[None])[0][0]
    short = clip_text.encode_vectors(table[ids[:n]].half().float()[None])[0]
    bias = torch.zeros(n)
    bias[-1] = math.log(77 - n + 1)
    long_out = torch.softmax(query @ key @ full.T, -1) @ full @ value
    short_out = torch.softmax(query @ key @ short.T + bias, -1) @ short @ value
    assert (long_out - short_out).norm() / long_out.norm() < 2e-3


def test_vocabulary_is_clips() -> None:
    tokens = vocabulary()
    assert len(tokens) == clip_text.VOCABULARY
    assert tokens[clip_text.BOS] == "<|startoftext|>"
    assert tokens[320] == "a</w>"
    assert tokens[2368] == "cat</w>"
    assert token_text("caf\u00c3\u00a9</w>") == "caf\u00e9"
    assert len(merges()) == 48894
    assert MERGES.stat().st_size < 200_000
