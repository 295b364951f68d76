"""LoRA files: the names that hosts read, exact factors, and foreign files named for what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.lora import lora_tensors, read_lora, write_lora

K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
V = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
NAMES = [K, V, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(rank: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 12, generator=g), torch.randn(8, rank, generator=g)


def test_names_and_alpha_are_those_that_hosts_read(tmp_path: Path) -> None:
    down, up = pair()
    write_lora(tmp_path / "a", {K: (down, up)}, {"ss_network_dim": "2"}, torch.float32)
    tensors = load_file(tmp_path / "a")
    assert set(tensors) == {f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha"}
    assert torch.equal(tensors[f"{KOHYA}.lora_down.weight"], down)
    assert torch.equal(tensors[f"{KOHYA}.lora_up.weight"], up)
    assert tensors[f"{KOHYA}.alpha"].shape == ()
    assert tensors[f"{KOHYA}.alpha"] == 2  # alpha / rank = 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    factors = {K: pair(2), V: pair(300, 1)}  # bfloat16 could not hold 301 as alpha
    write_lora(tmp_path / "a", factors, {}, dtype)
    read = read_lora(tmp_path / "a", NAMES)
    assert list(read) == [K, V]
    for name, (down, up) in factors.items():
        assert torch.equal(read[name][0], down.to(dtype).float())
        assert torch.equal(read[name][1], up.to(dtype).float())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-24, 20), st.integers(-24, 20)), min_size=1, max_size=4))
def test_float16_keeps_the_products_of_unbalanced_factors(scales: list[tuple[int, int]]) -> None:
    down, up = pair(len(scales))
    # vectors of any size whose product is of ordinary size
    for i, (a, b) in enumerate(scales):
        shift = max(-6, min(6, a + b)) - (a + b)
        down[i] *= 2.0 ** (a + shift)
        up[:, i] *= 2.0**b
    tensors = lora_tensors({K: (down, up)}, torch.float16)
    exact = torch.einsum("or,ri->roi", up.double(), down.double())
    stored = torch.einsum(
        "or,ri->roi", tensors[f"{KOHYA}.lora_up.weight"].double(), tensors[f"{KOHYA}.lora_down.weight"].double()
    )
    largest = exact.abs().amax((1, 2))
    assert ((stored - exact).abs().amax((1, 2)) <= largest * 2.0**-9).all()


def test_zero_factors_stay_zero() -> None:
    down, _ = pair()
    tensors = lora_tensors({K: (down * 1e-3, torch.zeros(8, 2))}, torch.float16)
    assert (tensors[f"{KOHYA}.lora_up.weight"] == 0).all()
    assert torch.equal(tensors[f"{KOHYA}.lora_down.weight"], (down * 1e-3).half())


NAMINGS = {
    "kohya": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
    "peft": (f"unet.{K}.lora_A.weight", f"unet.{K}.lora_B.weight"),
    "peft with an adapter's name": (f"base_model.model.{K}.lora_A.default.weight", f"base_model.model.{K}.lora_B.default.weight"),
    "diffusers": (f"unet.{K}.lora.down.weight", f"unet.{K}.lora.up.weight"),
    "diffusers without prefix": (f"{K}.lora.down.weight", f"{K}.lora.up.weight"),
    "attention processors": (f"unet.{K.replace('.to_k', '.processor.to_k_lora')}.down.weight",
                             f"unet.{K.replace('.to_k', '.processor.to_k_lora')}.up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(tmp_path: Path, naming: str) -> None:
    down, up = pair()
    save_file(dict(zip(NAMINGS[naming], (down, up), strict=True)), tmp_path / "a")
    read = read_lora(tmp_path / "a", iter(NAMES))
    assert list(read) == [K]
    assert torch.equal(read[K][0], down)
    assert torch.equal(read[K][1], up)


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_alpha_is_folded_into_up(tmp_path: Path, naming: str) -> None:
    down, up = pair(4)
    keys = NAMINGS[naming]
    alpha = keys[0].split(".lora_")[0] + ".alpha"
    save_file({keys[0]: down, keys[1]: up, alpha: torch.tensor(1.0)}, tmp_path / "a")
    assert torch.equal(read_lora(tmp_path / "a", NAMES)[K][1], up / 4)


@pytest.mark.parametrize(("config", "scale"), [
    ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0), ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0), ({}, 1.0),
    ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 4}}, 1.0), ({"unet.alpha_pattern": {"to_v": 1}}, 1.0),
])  # fmt: skip
def test_alpha_from_peft_metadata(tmp_path: Path, config: dict, scale: float) -> None:
    down, up = pair(4)
    save_file(dict(zip(NAMINGS["peft"], (down, up), strict=True)), tmp_path / "a", {"lora_adapter_metadata": json.dumps(config)})
    assert torch.equal(read_lora(tmp_path / "a", NAMES)[K][1], up * scale)


DOWN, UP = pair()
BAD = {
    "is not a LoRA": {f"{K}.weight": DOWN},
    "is not a LoRA .a checkpoint": {"model.diffusion_model.out.2.bias": DOWN},
    r"lora_te_x\.lora_down\.weight in a belongs to no cross-attention": {"lora_te_x.lora_down.weight": DOWN},
    r"input_blocks_4_1\S+ in a belongs to no": {"lora_unet_input_blocks_4_1_attn2_to_k.lora_up.weight": UP},
    r"to_k\.dora_scale in a is not part of a plain LoRA": {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.dora_scale": DOWN},
    f"lacks the up factor of {K}": {f"{KOHYA}.lora_down.weight": DOWN},
    f"lacks the down factor of {K}": {f"{KOHYA}.lora_up.weight": UP},
    r"do not fit each other \(down \(2, 12\), up \(8, 3\)\)": {
        f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": torch.ones(8, 3)},
    r"do not fit each other": {f"{KOHYA}.lora_down.weight": DOWN[..., None, None], f"{KOHYA}.lora_up.weight": UP},
    "contains NaN or infinity": {f"{KOHYA}.lora_down.weight": DOWN * float("nan"), f"{KOHYA}.lora_up.weight": UP},
    "more than one LoRA for": {f"unet.{K}.lora_A.one.weight": DOWN, f"unet.{K}.lora_A.two.weight": DOWN},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_unusable_loras(tmp_path: Path, message: str) -> None:
    save_file({n: t.contiguous().clone() for n, t in BAD[message].items()}, tmp_path / "a")
    with pytest.raises(ErasureError, match=message):
        read_lora(tmp_path / "a", NAMES)


@pytest.mark.parametrize("text", ["[1", "3"])
def test_damaged_peft_metadata(tmp_path: Path, text: str) -> None:
    save_file(dict(zip(NAMINGS["peft"], pair(), strict=True)), tmp_path / "a", {"lora_adapter_metadata": text})
    with pytest.raises(ErasureError, match="lora_adapter_metadata that is not JSON"):
        read_lora(tmp_path / "a", NAMES)


@pytest.mark.parametrize(("factors", "dtype", "message"), [
    ({}, torch.float16, "nothing to write"),
    ({K: (DOWN, UP.T)}, torch.float16, "do not fit each other"),
    ({K: (torch.ones(0, 12), torch.ones(8, 0))}, torch.float16, "do not fit each other"),
    ({K: (DOWN * float("inf"), UP)}, torch.float32, "contain NaN or infinity"),
    ({K: (DOWN * 1e6, UP * 1e6)}, torch.float16, r"too large for torch\.float16: write the LoRA as float32"),
    ({K: (DOWN, UP)}, torch.int8, r"cannot be stored as torch\.int8"),
])  # fmt: skip
def test_factors_that_cannot_be_written(tmp_path: Path, factors: dict, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ErasureError, match=message):
        write_lora(tmp_path / "a", factors, {}, dtype)
    assert not (tmp_path / "a").exists()


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", {K: pair()}, {})
    with pytest.raises(ErasureError, match="already exists"):
        write_lora(tmp_path / "a", {K: pair(3)}, {})
    write_lora(tmp_path / "a", {K: pair(3)}, {}, overwrite=True)
    assert read_lora(tmp_path / "a", NAMES)[K][0].shape == (3, 12)
