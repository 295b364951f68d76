"""Packed weights are called quantised, whoever packed them; what is merely small is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.checkpoint import open_checkpoint
from tests.tiny import tiny_files

UNET = "model.diffusion_model."
U8, I8, F8 = torch.uint8, torch.int8, torch.float8_e4m3fn


def packed(*shape: int, dtype: torch.dtype = U8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


#: what each maker puts in place of a weight W of shape (o, i), by the ends of its name after the layer's
KINDS = {
    "bitsandbytes nf4": {"weight": packed(96, 1), "weight.absmax": torch.ones(3), "weight.quant_map": torch.ones(16),
                         "weight.quant_state.bitsandbytes__nf4": packed(80)},
    "bitsandbytes fp4, nested": {"weight": packed(96, 1), "weight.absmax": packed(3), "weight.nested_absmax": torch.ones(1),
                                 "weight.nested_quant_map": torch.ones(256), "weight.quant_state.bitsandbytes__fp4": packed(80)},
    "bitsandbytes int8": {"weight": packed(32, 6, dtype=I8), "SCB": torch.ones(32), "weight_format": packed()},
    "scaled float8, ComfyUI's first": {"weight": packed(32, 6, dtype=F8), "scale_weight": torch.ones(())},
    "scaled float8 with input scales": {"weight": packed(32, 6, dtype=F8), "weight_scale": torch.ones(()),
                                        "input_scale": torch.ones(())},
    "float8 in blocks": {"weight": packed(32, 6, dtype=F8), "weight_scale_inv": torch.ones(1, 1)},
    "comfy_quant int8": {"weight": packed(32, 6, dtype=I8), "weight_scale": torch.ones(32), "comfy_quant": packed(20)},
    "comfy_quant nvfp4": {"weight": packed(32, 3), "weight_scale": packed(32, 1, dtype=F8), "weight_scale_2": torch.ones(()),
                          "comfy_quant": packed(20)},
    "HQQ": {"W_q": packed(16, 6), "meta": packed(9), "scale": torch.ones(6), "zero": torch.ones(6)},
    "GPTQ": {"qweight": packed(1, 32, dtype=torch.int32), "qzeros": packed(1, 4, dtype=torch.int32), "scales": torch.ones(1, 32),
             "g_idx": packed(6, dtype=torch.int32)},
    "AWQ": {"qweight": packed(6, 4, dtype=torch.int32), "qzeros": packed(1, 4, dtype=torch.int32), "scales": torch.ones(1, 32)},
    "SVDQuant": {"qweight": packed(32, 3, dtype=I8), "wscales": torch.ones(1, 32), "proj_down": torch.ones(6, 2)},
    "quanto": {"weight._data": packed(32, 6, dtype=I8), "weight._scale": torch.ones(32, 1), "input_scale": torch.ones(())},
    "compressed-tensors": {"weight_packed": packed(32, 1, dtype=torch.int32), "weight_scale": torch.ones(32, 1),
                           "weight_shape": packed(2, dtype=torch.int64)},
    "bare int8": {"weight": packed(32, 6, dtype=I8)},
    "bare int32": {"weight": packed(32, 6, dtype=torch.int32)},
}  # fmt: skip


@pytest.fixture(scope="module")
def single() -> dict[str, torch.Tensor]:
    return load_file(tiny_files("sd1")[1])


def replaced(state: dict[str, torch.Tensor], parts: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """A checkpoint with the linear layers of its UNet, or one of another part, packed."""
    if where == "unet":
        layers = [n for n in state if n.startswith(UNET) and ".attn" in n and n.endswith(".weight")]
    else:
        layers = [next(n for n in state if n.startswith(where) and n.endswith(".weight") and state[n].ndim == 2)]
    new = {n: v for n, v in state.items() if n not in layers}
    return new | {n.removesuffix("weight") + end: v.clone() for n in layers for end, v in parts.items()}


@pytest.mark.parametrize("where", ["unet", "cond_stage_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_checkpoints(single: dict[str, torch.Tensor], tmp_path: Path, kind: str, where: str) -> None:
    save_file(replaced(single, KINDS[kind], where), tmp_path / "model.safetensors")
    with pytest.raises(ErasureError, match=r"model\.safetensors holds quantised.*: use a float16 version of the model") as caught:
        open_checkpoint(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_unets_of_folders(tmp_path: Path, kind: str) -> None:
    state = load_file(tiny_files("sd1")[0] / "unet" / "diffusion_pytorch_model.safetensors")
    layers = [n for n in state if "attn2.to_k.weight" in n]
    parts = KINDS[kind]
    new = {n: v for n, v in state.items() if n not in layers}
    new |= {n.removesuffix("weight") + end: v.clone() for n in layers for end, v in parts.items()}
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    save_file(new, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ErasureError, match=r"holds quantised.*: use a float16 version of the model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("metadata", [{"_quantization_metadata": json.dumps({"layers": {}})}, {"quantization_config": "{}"}])
def test_quantised_by_their_metadata(single: dict[str, torch.Tensor], tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(single, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ErasureError, match="holds quantised weights: use a float16 version"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32])
def test_plain_small_floats_and_counters_are_fine(single: dict[str, torch.Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    state = {n: v.to(dtype) if n.startswith(UNET) else v for n, v in single.items()}
    state |= {"model_ema.num_updates": torch.tensor(3), "v_pred": torch.tensor([]), "logit_scale": torch.tensor(4.6)}
    save_file(state, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").architecture.kind == "sd1"
