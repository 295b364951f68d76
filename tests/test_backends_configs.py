"""Configurations read off shapes are those of the models the shapes came from, real ones included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file

from realera_nodes.backends.configs import clip_config, open_clip_config, unet_config, vae_config
from realera_nodes.backends.single_file import UNET, Part, make_scheduler, make_vae, native_side
from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.stream import SafetensorsFile
from tests.tiny import UNETS, unet_name, vae_name

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*attended: bool) -> dict[str, Any]:
    kinds = [CROSS if a else PLAIN for a in attended]
    return {"down_block_types": [k[0] for k in kinds], "up_block_types": [k[1] for k in reversed(kinds)]}


XL = {"cross_attention_dim": 2048, "use_linear_projection": True, "block_out_channels": (320, 640, 1280),
      "attention_head_dim": (5, 10, 20), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
      "projection_class_embeddings_input_dim": 2816, **blocks(False, True, True)}  # fmt: skip
#: as published on the Hub
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1.5": ("sd1", {"cross_attention_dim": 768, "attention_head_dim": 8, **blocks(True, True, True, False)}),
    "SD2.1": ("sd2", {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
                      **blocks(True, True, True, False)}),
    "SDXL": ("sdxl", {"transformer_layers_per_block": (1, 2, 10), **XL}),
    "SSD-1B": ("sdxl", {"transformer_layers_per_block": [1, [2, 2], [4, 4]], "mid_block_type": "UNetMidBlock2D",
                        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1], **XL}),
    **{f"tiny {kind}": (kind, UNETS[kind]) for kind in UNETS},
}  # fmt: skip


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", REAL)
def test_unet(name: str) -> None:
    kind, config = REAL[name]
    with init_empty_weights():
        original = UNet2DConditionModel(**config)
    shapes = shapes_of(original)
    attended = [t.startswith("Cross") for t in original.config.up_block_types]
    ldm = {unet_name(n, original.config.layers_per_block, attended): shape for n, shape in shapes.items()}
    assert len(ldm) == len(shapes)
    found = unet_config(ldm, kind)  # type: ignore[arg-type]
    with init_empty_weights():
        assert shapes_of(UNet2DConditionModel(**found)) == shapes
    heads = original.config.attention_head_dim
    assert found["attention_head_dim"] == (heads if isinstance(heads, int) else list(heads)), "heads leave no trace in shapes"


def test_unets_that_diffusers_cannot_load_are_refused() -> None:
    with init_empty_weights():
        shapes = shapes_of(UNet2DConditionModel(**UNETS["sd2"]))
    ldm = {unet_name(n, 2, [True, True]): shape for n, shape in shapes.items()}
    with pytest.raises(ErasureError, match="unCLIP"):
        unet_config(ldm | {"label_emb.0.0.weight": (1280, 2048)}, "sd2")
    with pytest.raises(ErasureError, match=r"lacks label_emb\.0\.0\.weight"):
        unet_config(ldm, "sdxl")
    with pytest.raises(ErasureError, match="attention in a part of a level"):
        unet_config({n: s for n, s in ldm.items() if not n.startswith("input_blocks.2.1.")}, "sd2")
    with pytest.raises(ErasureError, match="differ in their number of blocks"):
        unet_config({n: s for n, s in ldm.items() if not n.startswith("input_blocks.5.")}, "sd2")


@pytest.mark.parametrize("channels", [(128, 256, 512, 512), (32, 64)])
@pytest.mark.parametrize("quant", [True, False])
def test_vae(channels: tuple[int, ...], quant: bool) -> None:
    with init_empty_weights():
        vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, use_quant_conv=quant, use_post_quant_conv=quant,
                            down_block_types=["DownEncoderBlock2D"] * len(channels),
                            up_block_types=["UpDecoderBlock2D"] * len(channels))  # fmt: skip
    shapes = shapes_of(vae)
    ldm = {vae_name(n, len(channels)): shape for n, shape in shapes.items()}
    found = vae_config(ldm, "sdxl")
    with init_empty_weights():
        assert shapes_of(AutoencoderKL(**found)) == shapes
    assert found["scaling_factor"] == 0.13025
    assert vae_config(ldm, "sd2")["scaling_factor"] == 0.18215


def test_text_encoders() -> None:
    clip = {"embeddings.token_embedding.weight": (49408, 768), "embeddings.position_embedding.weight": (77, 768),
            "encoder.layers.0.mlp.fc1.weight": (3072, 768)} | {f"encoder.layers.{i}.x": () for i in range(12)}  # fmt: skip
    found = clip_config(clip)
    assert (found["num_hidden_layers"], found["num_attention_heads"], found["hidden_act"]) == (12, 12, "quick_gelu")
    big = {"token_embedding.weight": (49408, 1280), "positional_embedding": (77, 1280), "text_projection": (1280, 1280),
           "transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280)}  # fmt: skip
    big |= {f"transformer.resblocks.{i}.x": () for i in range(32)}
    found = open_clip_config(big)
    assert (found["num_hidden_layers"], found["num_attention_heads"], found["hidden_act"]) == (32, 20, "gelu")
    assert (found["intermediate_size"], found["projection_dim"], found["eos_token_id"]) == (5120, 1280, 49407)


def small_file(path: Path, state: dict[str, torch.Tensor], **metadata: str) -> SafetensorsFile:
    save_file(state, path, metadata=metadata)
    return SafetensorsFile.open(path)


def test_taesd_decodes_as_in_comfyui(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(scaling_factor=1.0).eval()
    state = {}
    for name, value in tiny.state_dict().items():
        side, _, index, rest = name.split(".", 3)
        state[f"vae.taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value
    scale = {"vae.vae_scale": torch.tensor(0.18215), "vae.vae_shift": torch.tensor(0.0)}
    part = Part.of(small_file(tmp_path / "a.safetensors", state | scale), ["first_stage_model.", "vae."], torch.float32)
    loaded = make_vae(part, "sd1")
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(loaded.decode(z).sample, tiny.decode(z).sample)
    assert loaded.config.scaling_factor == 1.0
    part = Part.of(small_file(tmp_path / "b.safetensors", state), ["vae."], torch.float32)
    assert make_vae(part, "sdxl").config.scaling_factor == pytest.approx(0.13025), "ComfyUI's scale is 1 without a tensor"
    scale["vae.vae_shift"] = torch.tensor(0.1)
    part = Part.of(small_file(tmp_path / "c.safetensors", state | scale), ["vae."], torch.float32)
    with pytest.raises(ErasureError, match="vae_shift"):
        make_vae(part, "sd1")


def scheduler_of(path: Path, kind: str, extra: dict[str, torch.Tensor], prediction: str | None = None) -> Any:
    file = small_file(path, {UNET + "x": torch.zeros(1), **extra})
    part = Part.of(file, [UNET], torch.float32)
    return make_scheduler(file, kind, part, prediction).config  # type: ignore[arg-type]


def test_prediction_types_are_found_as_comfyui_finds_them(tmp_path: Path) -> None:
    path, one = tmp_path / "a.safetensors", torch.ones(1)
    key = UNET + "output_blocks.{}.1.transformer_blocks.0.norm1.bias"
    wide, narrow = torch.tensor([0.1, -0.1]), torch.tensor([0.08, -0.08])  # deviations, without Bessel's correction
    assert scheduler_of(path, "sd2", {key.format(11): wide}).prediction_type == "v_prediction"
    assert scheduler_of(path, "sd2", {key.format(11): narrow, key.format(9): wide}).prediction_type == "epsilon"
    assert scheduler_of(path, "sd2", {key.format(11): wide}, "epsilon").prediction_type == "epsilon"
    assert scheduler_of(path, "sd1", {key.format(11): wide}).prediction_type == "epsilon"
    assert scheduler_of(path, "sd1", {}, "v_prediction").prediction_type == "v_prediction"
    assert scheduler_of(path, "sdxl", {"v_pred": one}).prediction_type == "v_prediction"
    assert not scheduler_of(path, "sdxl", {"v_pred": one}).rescale_betas_zero_snr
    assert scheduler_of(path, "sdxl", {"v_pred": one, "ztsnr": one.clone()}).rescale_betas_zero_snr
    with pytest.raises(ErasureError, match="EDM"):
        scheduler_of(path, "sdxl", {"edm_mean": one})


def test_native_side(tmp_path: Path) -> None:
    plain = small_file(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert [native_side(plain, k, "epsilon") for k in ("sd1", "sd2", "sdxl")] == [512, 512, 1024]  # type: ignore[arg-type]
    assert native_side(plain, "sd2", "v_prediction") == 768
    stated = small_file(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, **{"modelspec.resolution": "64x64"})
    assert native_side(stated, "sd1", "epsilon") == 64
