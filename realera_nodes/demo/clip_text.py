"""The embedded model's text encoder: a table of token vectors, dressed as a full CLIP-L.

A token's vector is a MiniLM sentence vector of its text, distilled so that the words BPE splits come
out right too (tools/demo_training/text_encoder.py). Layer 0 of the encoder is a causal average of
the tokens so far, weighted by each token's importance; layers 1-11 do nothing. So, as with
CLIP's own encoder, every token after a word carries that word, EOS and padding most of all.

Expansion uses only exact arithmetic (small integers, IEEE division and square root), so that the
written bytes are the same on every machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 49408, 768, 12, 12, 77
BOS, EOS = 49406, 49407
#: norm of a token vector; CLIP-L's own text states have about 27.7 to 28
NORM = WIDTH**0.5
#: EOS and padding keep little of their own, so that they carry the prompt
EOS_SHARE = 0.35
#: attention logit = KAPPA * u, with u the last channel's share of a token's norm, in [-0.2, 0.2]
KAPPA, U_MAX = 120.0, 0.2
BOS_LOGIT, EOS_LOGIT = -12.0, -24.0
#: log importance of a token is stored as int8 in steps of this
LOGIT_STEP = 1 / 16


def hadamard(n: int) -> Tensor:
    """The Hadamard matrix of order 768 = 12 * 64 (or of a power of two) with entries +-1, int32."""
    if n % 12 == 0:
        core = torch.ones(12, 12, dtype=torch.int32)
        core[1:, 1:] = _paley_core()
        return torch.kron(core, hadamard(n // 12))
    h = torch.ones(1, 1, dtype=torch.int32)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int32)
    while h.shape[0] < n:
        h = torch.kron(h, two)
    return h


def _paley_core() -> Tensor:
    """The lower right 11x11 block of a normalised Hadamard matrix of order 12."""
    residues = {x * x % 11 for x in range(1, 11)}
    return torch.tensor(
        [[1 if i != j and (j - i) % 11 in residues else -1 for j in range(11)] for i in range(11)], dtype=torch.int32
    )


def basis(rank: int) -> Tensor:
    """``rank`` orthogonal rows of +-1 with zero mean (rank, 768), float32."""
    return hadamard(WIDTH)[1 : rank + 1].float()


def expand_table(codes: Tensor, logits: Tensor) -> Tensor:
    """Token embedding table (49408, 768) float32 from int8 ``codes`` (49408, rank) and int8 ``logits`` (49408,).

    Rows of ``codes`` give directions only; each vector gets norm ``NORM`` (EOS: ``EOS_SHARE`` of it),
    and its last channel is set so that layer 0 attends to it with logit ``logits * LOGIT_STEP``.
    """
    codes = codes.float()
    vectors = codes @ basis(codes.shape[1])  # integers below 2**24: exact in any order of summation
    vectors[:, -1] = 0
    squares = vectors.double().square().sum(1)  # integers again
    scale = (NORM / squares.sqrt()).float()
    scale[EOS] *= EOS_SHARE
    vectors *= scale[:, None]
    u = logits.double() * LOGIT_STEP / KAPPA
    u[BOS], u[EOS] = BOS_LOGIT / KAPPA, EOS_LOGIT / KAPPA
    norm = torch.full_like(u, NORM)
    norm[EOS] *= EOS_SHARE
    vectors[:, -1] = (u * norm / (1 - u * u).sqrt()).float()
    return vectors


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), eps=1e-5)


def encode_vectors(x: Tensor) -> Tensor:
    """What the full encoder computes, in three lines: token vectors (B, L, 768) to text states (B, L, 768)."""
    h = layer_norm(x)
    weight = (h[..., -1:] * (KAPPA / NORM)).exp()
    content = torch.cat([h[..., :-1], torch.zeros_like(h[..., -1:])], -1)
    return layer_norm(x + (weight * content).cumsum(1) / weight.cumsum(1))


def clip_state(table: Tensor, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The full CLIP-L text model around ``table``: Hugging Face keys without the ``text_model.`` prefix."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    state = {
        "embeddings.token_embedding.weight": table.to(dtype),
        "embeddings.position_embedding.weight": zeros(CONTEXT, WIDTH),
        "final_layer_norm.weight": torch.ones(WIDTH, dtype=dtype),
        "final_layer_norm.bias": zeros(WIDTH),
    }
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            state[layer + name + ".weight"] = torch.ones(WIDTH, dtype=dtype)
            state[layer + name + ".bias"] = zeros(WIDTH)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state[layer + f"self_attn.{name}.weight"] = zeros(WIDTH, WIDTH)
            state[layer + f"self_attn.{name}.bias"] = zeros(WIDTH)
        state[layer + "mlp.fc1.weight"], state[layer + "mlp.fc1.bias"] = zeros(4 * WIDTH, WIDTH), zeros(4 * WIDTH)
        state[layer + "mlp.fc2.weight"], state[layer + "mlp.fc2.bias"] = zeros(WIDTH, 4 * WIDTH), zeros(WIDTH)
    first = "encoder.layers.0.self_attn."
    # one query for all: logit = q k / sqrt(64) = KAPPA / NORM * (last channel of the normed token)
    for head in range(0, WIDTH, WIDTH // HEADS):
        state[first + "q_proj.bias"][head] = 8.0
        state[first + "k_proj.weight"][head, WIDTH - 1] = KAPPA / NORM
    state[first + "v_proj.weight"] = torch.eye(WIDTH, dtype=dtype)
    out = torch.eye(WIDTH, dtype=dtype)
    out[-1, -1] = 0  # the importance channel is not content
    state[first + "out_proj.weight"] = out
    return state
