"""Trained slim networks, padded LDM weights and diffusers' networks compute the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realera_nodes.demo import expand, layout
from tools.demo_training import slim_unet, tiny_vae


@pytest.fixture(scope="module")
def slim() -> slim_unet.SlimUNet:
    torch.manual_seed(0)
    net = slim_unet.SlimUNet()
    for p in net.parameters():  # zero-initialised branches would hide mistakes
        p.data.add_(torch.randn_like(p) * 0.03)
    return net


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 800]), torch.randn(2, 9, 768, generator=g)


@torch.no_grad()
def test_padded_unet_is_the_slim_unet(slim, inputs) -> None:
    full = slim_unet.SlimUNet(slim_unet.FULL)
    full.load_state_dict(slim_unet.padded_state(slim.state_dict()))
    assert (slim(*inputs) - full(*inputs)).abs().max() < 1e-5


@torch.no_grad()
def test_diffusers_unet_is_the_slim_unet(slim, inputs) -> None:
    from diffusers import UNet2DConditionModel

    state = slim_unet.padded_state(slim.state_dict())
    names = layout.unet_to_diffusers(list(state), (1, 1))
    assert len(set(names.values())) == len(state)
    net = UNet2DConditionModel.from_config(expand.UNET_CONFIG)
    net.load_state_dict({names[k]: v for k, v in state.items()})
    assert (slim(*inputs) - net(*inputs).sample).abs().max() < 1e-5


@torch.no_grad()
def test_diffusers_vae_is_the_slim_vae() -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = tiny_vae.TinyVAE()
    x = torch.rand(2, 3, 64, 64)
    vae.scale_to(x)
    state = {k: layout.pad(k, vae.state_dict()[k], s) for k, s in tiny_vae.padded_shapes().items()}
    net = AutoencoderTiny.from_config(expand.VAE_CONFIG)
    net.load_state_dict({layout.vae_to_diffusers(k): v for k, v in state.items()})
    z = vae.taesd_encoder(x)
    assert (net.encode(x * 2 - 1).latents - z).abs().max() < 1e-4
    assert (net.decode(z).sample - (vae.taesd_decoder(z) * 2 - 1)).abs().max() < 1e-4


def test_names_are_diffusers_names_for_full_sd1() -> None:
    names = ["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "input_blocks.3.0.op.weight",
             "middle_block.1.proj_in.weight", "output_blocks.5.2.conv.bias", "output_blocks.11.0.emb_layers.1.bias",
             "output_blocks.2.1.conv.weight", "out.2.bias"]  # fmt: skip
    assert list(layout.unet_to_diffusers(names, (2, 2, 2, 2)).values()) == [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.downsamplers.0.conv.weight",
        "mid_block.attentions.0.proj_in.weight",
        "up_blocks.1.upsamplers.0.conv.bias",
        "up_blocks.3.resnets.2.time_emb_proj.bias",
        "up_blocks.0.upsamplers.0.conv.weight",
        "conv_out.bias",
    ]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), cols=st.integers(1, 9), log_scale=st.floats(-12, 6))
def test_quantisation_error_is_at_most_half_a_step(seed: int, rows: int, cols: int, log_scale: float) -> None:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 2.0**log_scale
    codes, scale = layout.quantize(w)
    assert (layout.dequantize(codes, scale) - w).abs().le(scale[:, None] * 0.5001).all()


def test_quantising_zeros_gives_zeros() -> None:
    assert (layout.dequantize(*layout.quantize(torch.zeros(3, 4))) == 0).all()
