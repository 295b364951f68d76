"""A folder and a single file of the same weights give the same backend; what cannot be loaded says why."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realera_nodes.backends.loading import load_backend, quiet
from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.checkpoint import open_checkpoint
from tests.tiny import KINDS, PREDICTIONS, SIDE, tiny_backend, tiny_files

PROMPTS = ["a photo of the cat", "", "oil painting of Mira Calder, wow!"]
#: the same operations on the same numbers; only kernels' choices may differ
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
TEXT = "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_single_file_agree(kind: str) -> None:
    folder, file = tiny_backend(kind), load_backend(tiny_files(kind)[1], device="cpu", size=SIDE)
    assert file.kind == folder.kind == kind
    assert file.unet.dtype == folder.unet.dtype == torch.float32
    assert file.scheduler.config.prediction_type == folder.scheduler.config.prediction_type == PREDICTIONS[kind]
    ours, theirs = file.encode(PROMPTS), folder.encode(PROMPTS)
    assert ours.states.shape == (3, 77, file.context_width)
    torch.testing.assert_close(ours.states, theirs.states, **TOLERANCE)
    assert ours.ids == theirs.ids
    assert (ours.pooled is None) == (theirs.pooled is None) == (kind != "sdxl")
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs.pooled, **TOLERANCE)
    a, b = file.projections(), folder.projections()
    assert list(a) == list(b)
    assert sorted(a) == sorted(open_checkpoint(tiny_files(kind)[1]).architecture.projections)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert file.encoder_hash() == folder.encoder_hash()
    drawn = [model.pictures(PROMPTS[:2], [1, 2], steps=2) for model in (file, folder)]
    assert drawn[0].shape == (2, 3, SIDE, SIDE)
    assert drawn[0].std() > 0.01
    torch.testing.assert_close(drawn[0], drawn[1], **TOLERANCE)


def test_a_folder_with_only_an_fp16_variant_loads(tmp_path: Path) -> None:
    source = tiny_files("sd1")[0]
    for path in source.rglob("*"):
        if path.is_file():
            name = path.name.replace(".safetensors", ".fp16.safetensors") if "unet" in path.parts else path.name
            target = tmp_path / path.relative_to(source).parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, target)
    loaded, plain = load_backend(tmp_path, device="cpu", size=SIDE).projections(), tiny_backend("sd1").projections()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_prediction_and_size_can_be_given() -> None:
    backend = load_backend(tiny_files("sd1")[0], device="cpu", prediction="v_prediction")
    assert backend.scheduler.config.prediction_type == "v_prediction"
    assert backend.side == SIDE, "the folder's own size"


def test_loading_says_nothing_and_leaves_the_libraries_as_they_were() -> None:
    load = f"load_backend(Path({str(tiny_files('sd1')[0])!r}))"
    code = f"from pathlib import Path; from realera_nodes.backends.loading import load_backend; {load}"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout + run.stderr == ""


def test_quiet_ends() -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(m.get_verbosity(), m._tqdm_active) for m in (of_diffusers, of_transformers)]
    with contextlib.suppress(RuntimeError), quiet():
        assert not of_transformers._tqdm_active
        raise RuntimeError
    assert [(m.get_verbosity(), m._tqdm_active) for m in (of_diffusers, of_transformers)] == before


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """sd1's tensors, with a stub for the text encoder, which is read last."""
    state = load_file(tiny_files("sd1")[1])
    return {n: v for n, v in state.items() if not n.startswith(TEXT)} | {TEXT + "stub": torch.zeros(1)}


def refused(path: Path, state: dict[str, torch.Tensor], words: str) -> None:
    save_file(state, path)
    with pytest.raises(ErasureError, match=words) as caught:
        load_backend(path, device="cpu")
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def without(*prefixes: str) -> dict[str, torch.Tensor]:
        return {n: v for n, v in weights.items() if not n.startswith(prefixes)}

    path = tmp_path / "model.safetensors"
    refused(path, without(TEXT), r"has no text encoder \(cond_stage_model\.transformer\.\*\): choose")
    refused(path, without("first_stage_model."), r"has no VAE \(first_stage_model\.\*\): choose")
    refused(path, without(TEXT, "first_stage_model."), "has no text encoder .* and no VAE")
    refused(path, without("model.diffusion_model."), "without a UNet")
    refused(path, weights, r"text encoder lacks embeddings\.token_embedding\.weight")
    refused(
        path, without("first_stage_model.decoder.mid.block_1.conv1.weight"), r"VAE lacks 1 tensors, e\.g\. decoder\.mid_block"
    )
    refused(
        path, without("model.diffusion_model.time_embed.2.bias"), r"UNet lacks 1 tensors, e\.g\. time_embedding\.linear_2\.bias"
    )


def test_damaged_tensors_are_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, name = tmp_path / "model.safetensors", "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    bad = weights[name].clone()
    bad[0, 0, 0, 0] = torch.nan
    refused(path, weights | {name: bad}, rf"^{name} in model\.safetensors contains NaN or infinity")
    refused(path, weights | {name: bad.nan_to_num().to(torch.int8)}, f"{name} .* quantised whole numbers")
    name = "model.diffusion_model.time_embed.0.weight"
    refused(
        path, weights | {name: torch.zeros(128, 64).half()}, r"time_embedding\.linear_1\.weight of its UNet has shape \(128, 64\)"
    )


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_files("sd1")[0], folder, copy_function=os.symlink)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()

    def fails(words: str, **changes: object) -> None:
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(ErasureError, match=words) as caught:
            load_backend(folder, device="cpu")
        assert "\n" not in str(caught.value)

    fails("model is a StableDiffusionInpaintPipeline, but only SD1.x", _class_name="StableDiffusionInpaintPipeline")
    fails("model has no vae", vae=[None, None])
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(unet)
    unet.unlink()
    save_file(state | {"conv_in.bias": torch.full((32,), torch.nan)}, unet)
    fails(r"unet's conv_in\.bias in model contains NaN")
    unet.unlink()
    save_file({n: v for n, v in state.items() if n != "conv_in.bias"}, unet)
    fails(r"unet in model lacks 1 tensors, e\.g\. conv_in\.bias")
    unet.unlink()
    save_file(state, unet)
    (folder / "text_encoder" / "model.safetensors").unlink()
    fails(r"model cannot be loaded \(.*\): download the folder again")
    shutil.rmtree(folder / "tokenizer")
    fails("model has no tokenizer: choose a folder with all of its parts")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ErasureError, match=r"model_index\.json"):
        load_backend(folder)


def test_settings_that_cannot_be() -> None:
    folder = tiny_files("sd1")[0]
    with pytest.raises(ErasureError, match='device "warp" cannot be used here'):
        load_backend(folder, device="warp")
    with pytest.raises(ErasureError, match="prediction type 'x0' is unknown: choose epsilon or v_prediction"):
        load_backend(folder, prediction="x0")
    with pytest.raises(ErasureError, match="pictures of 17 pixels are not possible: choose a size that is a multiple of 2"):
        load_backend(folder, device="cpu", size=17)
    with pytest.raises(ErasureError):
        load_backend(folder / "nowhere")


def test_old_vaes_names_are_known() -> None:
    from realera_nodes.backends.loading import _modern

    assert _modern("decoder.mid_block.attentions.0.proj_attn.weight") == "decoder.mid_block.attentions.0.to_out.0.weight"
    assert _modern("decoder.mid_block.attentions.0.query.bias") == "decoder.mid_block.attentions.0.to_q.bias"
    assert _modern("text_model.final_layer_norm.bias") == "final_layer_norm.bias"
