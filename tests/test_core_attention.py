"""The probe sees what the network attends to, and leaves it as it was."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.attention import AttentionProbe, concept_map, cross_attentions, layer_size, resized
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.spans import TextStates
from tests.tiny import SIDE, UNETS


@functools.cache
def unet_backend(kind: str) -> Any:
    """A tiny UNet's backend without text encoder and VAE: tests leave it as it was."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from realera_nodes.backends.diffusers import DiffusersBackend

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=SIDE // 2, **UNETS[kind]).eval()
    parts = {"unet": unet, "scheduler": DDIMScheduler(), "vae_scale_factor": 2, "tokenizer": None, "text_encoder": None}
    return DiffusersBackend(SimpleNamespace(**parts))


class Recorder:
    """diffusers' plain attention, which also keeps its own probabilities."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **more) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        probabilities = attn.get_attention_scores(q, k, attention_mask)
        self.seen[id(attn)] = probabilities.detach()
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, v))))


def inputs(backend, batch: int = 2) -> tuple[Tensor, Tensor, TextStates]:
    g = torch.Generator().manual_seed(3)
    side = backend.side // backend.pipe.vae_scale_factor
    text = TextStates(torch.randn(batch, 77, backend.context_width, generator=g), [])
    return torch.randn(batch, 4, side, side, generator=g), torch.tensor([300, 700][:batch]), text


def recorded(backend, z: Tensor, t: Tensor, text: TextStates) -> dict[str, Tensor]:
    """By layer (B, heads, pixels, tokens), as diffusers computes them."""
    kept, recorder = backend.unet.attn_processors, Recorder()
    try:
        backend.unet.set_attn_processor(recorder)
        with torch.no_grad():
            backend.predict_noise(z, t, text)
    finally:
        backend.unet.set_attn_processor(kept)
    modules = cross_attentions(backend.unet)
    return {name: recorder.seen[id(m)].unflatten(0, (len(z), m.heads)) for name, m in modules.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_probabilities_are_those_of_diffusers_own_processor(kind: str) -> None:
    backend = unet_backend(kind)
    z, t, text = inputs(backend)
    expected = recorded(backend, z, t, text)
    modules = cross_attentions(backend.unet)
    assert {f"{n}.to_k" for n in modules} == {n for n in backend.names if n.endswith("to_k")}
    with AttentionProbe(modules) as probe, torch.no_grad():
        backend.predict_noise(z, t, text)
        maps = probe.probabilities()
    assert list(maps) == list(expected)
    for name, p in maps.items():
        assert p.shape[0] == 2
        assert p.shape[3] == 77
        torch.testing.assert_close(p, expected[name].float(), rtol=0, atol=1e-6)
        assert float(p.std()) > 1e-4  # not uniform: the comparison means something


def test_columns_are_the_same_shares() -> None:
    backend = unet_backend("sd1")
    z, t, text = inputs(backend)
    with AttentionProbe(cross_attentions(backend.unet)) as probe, torch.no_grad():
        backend.predict_noise(z, t, text)
        whole, part = probe.probabilities(), probe.probabilities([5, 2, 76])
    for name, p in part.items():
        torch.testing.assert_close(p, whole[name][..., [5, 2, 76]], rtol=1e-5, atol=1e-8)


def test_adapters_in_training_are_seen_and_trained() -> None:
    backend = unet_backend("sd1")
    z, t, text = inputs(backend, 1)
    with backend.training({}, AlignmentConfig(rank=2)) as student:
        modules = cross_attentions(backend.unet)
        before = recorded(backend, z, t, text)
        with torch.no_grad():
            for p in student.parameters():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        expected = recorded(backend, z, t, text)
        with student.student(), AttentionProbe(modules) as probe:
            student.predict_noise(z, t, text)
            maps = probe.probabilities()
            sum(p[..., :3].square().sum() for p in maps.values()).backward()
        for name, p in maps.items():
            torch.testing.assert_close(p.detach(), expected[name].float(), rtol=0, atol=1e-6)
            assert float((p.detach() - before[name]).abs().max()) > 1e-4
        keys = [layer for name, layer in student.layers.items() if name.endswith("to_k")]
        assert all(float(layer.lora_A["erasure"].weight.grad.abs().max()) > 0 for layer in keys)


def test_no_hook_and_no_change_remains() -> None:
    backend = unet_backend("sd1")
    z, t, text = inputs(backend)
    modules = cross_attentions(backend.unet)
    with torch.no_grad():
        plain = backend.predict_noise(z, t, text)
        with pytest.raises(ZeroDivisionError), AttentionProbe(modules) as probe:  # noqa: PT012
            assert torch.equal(backend.predict_noise(z, t, text), plain)
            1 / 0  # noqa: B018
        with pytest.raises(RuntimeError, match="has not run inside the probe"):
            probe.probabilities()
    assert not any(part._forward_hooks for m in modules.values() for part in (m.to_q, m.to_k))


class OneHead(nn.Module):
    """ComfyUI's module has no ``scale``."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k = nn.Linear(4, 4, bias=False), nn.Linear(3, 4, bias=False)


def test_without_a_scale_it_is_that_of_the_heads_width() -> None:
    layer, g = OneHead(), torch.Generator().manual_seed(0)
    x, e = torch.randn(1, 6, 4, generator=g), torch.randn(1, 5, 3, generator=g)
    with AttentionProbe({"a": layer}) as probe, torch.no_grad():
        q, k = layer.to_q(x), layer.to_k(e)
        p = probe.probabilities()["a"]
    for head, part in enumerate((slice(0, 2), slice(2, 4))):
        torch.testing.assert_close(p[0, head], (q[0, :, part] @ k[0, :, part].T / 2**0.5).softmax(-1))


def test_a_network_without_text_attention_is_refused() -> None:
    with pytest.raises(ErasureError, match="no text attention"):
        cross_attentions(nn.Sequential(nn.Linear(2, 2)))


def test_layers_have_their_level_s_size() -> None:
    assert [layer_size(p, (64, 64)) for p in (4096, 1024, 256, 64)] == [(64, 64), (32, 32), (16, 16), (8, 8)]
    assert [layer_size(p, (96, 64)) for p in (6144, 1536, 96)] == [(96, 64), (48, 32), (12, 8)]
    assert layer_size(5 * 3, (9, 5)) == (5, 3)  # a convolution of stride 2 rounds up
    with pytest.raises(ValueError, match="no level of 64x64 latents has 100 pixels"):
        layer_size(100, (64, 64))


def test_a_mask_covers_its_share() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :3] = 1
    assert resized(mask, (2, 2)).tolist() == [[[1, 0.5], [0, 0]]]
    assert torch.equal(resized(mask, (4, 4)), mask)
    assert torch.equal(resized(mask, (8, 8)), mask.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_a_concept_s_map_is_the_mean_over_layers_and_heads() -> None:
    fine, coarse = torch.zeros(1, 2, 16, 2), torch.full((1, 2, 4, 2), 0.25)
    fine[0, 0, 5, 1] = 0.8  # one head, row 1, column 1, second token
    seen = concept_map({"f": fine, "c": coarse}, torch.tensor([[0.0, 1.0]]), (4, 4))
    expected = torch.full((1, 4, 4), 0.125)
    expected[0, 1, 1] += 0.2
    torch.testing.assert_close(seen, expected)
