"""Checkpoint files and diffusers folders: opened, edited, and never half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.checkpoint import open_checkpoint, write_edited
from realera_nodes.formats.stream import SafetensorsFile, sha256_of

K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
V = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
State = dict[str, torch.Tensor]


def unet(seed: int = 0, dtype: torch.dtype = torch.float16) -> State:
    g = torch.Generator().manual_seed(seed)
    names = {f"{K}.weight": (8, 768), f"{V}.weight": (8, 768), "conv_in.weight": (8, 4, 3, 3), "conv_out.bias": (4,)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in names.items()}


def folder(path: Path) -> Path:
    """A diffusers folder with all that such folders come with."""
    (path / "unet").mkdir(parents=True)
    (path / "vae").mkdir()
    (path / ".cache").mkdir()
    (path / "model_index.json").write_text("{}")
    (path / "unet" / "config.json").write_text('{"sample_size": 8}')
    save_file({"decoder.x": torch.ones(3)}, path / "vae" / "diffusion_pytorch_model.safetensors")
    (path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"vae pickle")
    (path / ".cache" / "x").write_bytes(b"hidden")
    return path


def files_in(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    names = {K: "middle_block.1", V: "middle_block.1"}
    state = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2), "first_stage_model.decoder.x": torch.ones(2)}
    state["model.diffusion_model.output_blocks.0.0.in_layers.0.weight"] = torch.ones(2)
    for name, place in names.items():
        tail = name.split("attentions.0.")[1]
        state[f"model.diffusion_model.{place}.{tail}.weight"] = unet()[f"{name}.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_single_file(single: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert (checkpoint.architecture.kind, checkpoint.architecture.layout, checkpoint.is_folder) == ("sd1", "ldm", False)
    assert list(checkpoint.architecture.projections) == [K, V]
    assert torch.equal(checkpoint.read_projection(K), unet()[f"{K}.weight"])
    assert checkpoint.sha256() == sha256_of(single)
    before = single.read_bytes()
    write_edited(checkpoint, tmp_path / "out.safetensors", {K: lambda w: 2 * w}, {"realera.method": '"x"'})
    old, new = load_file(single), load_file(tmp_path / "out.safetensors")
    key = checkpoint.architecture.projections[K]
    assert torch.equal(new.pop(key), 2 * old.pop(key))
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert open_checkpoint(tmp_path / "out.safetensors").metadata == {"format": "pt", "realera.method": '"x"'}
    assert single.read_bytes() == before


def test_a_folder(tmp_path: Path) -> None:
    source, target, seen = folder(tmp_path / "pipe"), tmp_path / "erased", []
    name = "unet/diffusion_pytorch_model.safetensors"
    save_file(unet(), source / name)
    before = {f: (source / f).read_bytes() for f in files_in(source)}
    checkpoint = open_checkpoint(source)
    assert (checkpoint.architecture.kind, checkpoint.architecture.layout, checkpoint.is_folder) == ("sd1", "diffusers", True)
    assert checkpoint.sha256() == sha256_of(source / name)
    write_edited(checkpoint, target, {V: lambda w: -w}, {"a": "b"}, progress=lambda *a: seen.append(a))
    assert files_in(target) == files_in(source) - {".cache/x"}
    assert all((target / f).read_bytes() == before[f] for f in files_in(target) - {name})
    assert torch.equal(load_file(target / name)[f"{V}.weight"], -unet()[f"{V}.weight"])
    assert SafetensorsFile.open(target / name).metadata == {"a": "b"}
    assert {f: (source / f).read_bytes() for f in files_in(source)} == before
    assert seen[-1][0] == seen[-1][1]
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    with pytest.raises(ErasureError, match="already exists"):
        write_edited(checkpoint, target, {}, {})
    write_edited(checkpoint, target, {}, {}, overwrite=True)
    assert (target / name).read_bytes()[-100:] == before[name][-100:]
    write_edited(checkpoint, source, {V: lambda w: -w}, {}, overwrite=True)  # in place
    assert torch.equal(load_file(source / name)[f"{V}.weight"], -unet()[f"{V}.weight"])
    assert sorted(os.listdir(tmp_path)) == ["erased", "pipe"]


def test_every_variant_of_the_unet_is_edited_and_no_unedited_model_comes_along(tmp_path: Path) -> None:
    source, target = folder(tmp_path / "pipe"), tmp_path / "erased"
    stem = "diffusion_pytorch_model"
    save_file(unet(0, torch.float32), source / "unet" / f"{stem}.safetensors")
    save_file(unet(), source / "unet" / f"{stem}.fp16.safetensors")
    save_file(unet(1, torch.float32), source / "unet" / f"{stem}.non_ema.safetensors")
    for name in ("unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt"):
        (source / name).write_bytes(b"unedited")
    checkpoint = open_checkpoint(source)
    assert checkpoint.read_projection(K).dtype == torch.float32
    assert checkpoint.sha256() == sha256_of(source / "unet" / f"{stem}.safetensors")
    write_edited(checkpoint, target, {K: torch.zeros_like}, {})
    assert files_in(target) == files_in(source) - {".cache/x", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors",
                                                   "v1-5-pruned.ckpt"}  # fmt: skip
    for variant in ("", ".fp16", ".non_ema"):
        assert (load_file(target / "unet" / f"{stem}{variant}.safetensors")[f"{K}.weight"] == 0).all()


@pytest.mark.parametrize(("pattern", "index"), [
    ("diffusion_pytorch_model-{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("diffusion_pytorch_model.fp16-{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ("diffusion_pytorch_model-{}-of-00002.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
])  # fmt: skip
def test_shards(tmp_path: Path, pattern: str, index: str) -> None:
    source, target, weight_map = folder(tmp_path / "pipe"), tmp_path / "erased", {}
    for i, names in enumerate(([f"{K}.weight", "conv_in.weight"], [f"{V}.weight", "conv_out.bias"]), 1):
        shard = pattern.format(f"{i:05}")
        save_file({n: unet()[n] for n in names}, source / "unet" / shard)
        weight_map |= dict.fromkeys(names, shard)
    (source / "unet" / index).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(source)
    assert len(checkpoint.files) == 2
    assert len(checkpoint.sha256()) == 64
    assert torch.equal(checkpoint.read_projection(V), unet()[f"{V}.weight"])
    write_edited(checkpoint, target, {K: lambda w: 2 * w, V: lambda w: 3 * w}, {})
    edited = open_checkpoint(target)
    assert torch.equal(edited.read_projection(K).float(), 2 * unet()[f"{K}.weight"].float())
    assert torch.equal(edited.read_projection(V), (3 * unet()[f"{V}.weight"].float()).half())
    (source / "unet" / pattern.format("00002")).unlink()
    with pytest.raises(ErasureError, match=f"lacks the shard {pattern.format('00002')}"):
        open_checkpoint(source)


def test_a_failed_edit_leaves_no_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "pipe")
    save_file(unet(), source / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ErasureError, match="NaN or infinite"):
        write_edited(open_checkpoint(source), tmp_path / "erased", {K: lambda w: w * float("nan")}, {})
    assert os.listdir(tmp_path) == ["pipe"]


def test_full_disk_is_seen_before_anything_is_copied(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    source = folder(tmp_path / "pipe")
    save_file(unet(), source / "unet" / "diffusion_pytorch_model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1, 1, 1000))
    for path in (single, source):
        with pytest.raises(ErasureError, match="GB are free"):
            write_edited(open_checkpoint(path), tmp_path / "erased", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "pipe"]


def test_places_that_would_mix_source_and_target(tmp_path: Path) -> None:
    source = folder(tmp_path / "a" / "pipe")
    save_file(unet(), source / "unet" / "diffusion_pytorch_model.safetensors")
    for target in (source / "erased", tmp_path / "a"):
        with pytest.raises(ErasureError, match="lies inside the source folder or around it"):
            write_edited(open_checkpoint(source), target, {}, {}, overwrite=True)


def break_folder(path: Path, how: str) -> None:
    name = path / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "unet":
        (path / "unet").rename(path / "transformer")
    elif how == "index":
        (path / "model_index.json").unlink()
    elif how == "pickle":
        (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    elif how == "variants":
        save_file(unet(), name)
        other = {n: torch.ones(8, 1024) if "attn2" in n else t for n, t in unet().items()}
        save_file(other, path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    elif how == "flux":
        save_file({"transformer_blocks.0.attn.to_k.weight": torch.ones(2)}, name)
    elif how == "bad index":
        save_file(unet(), name)
        (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    elif how == "scaled":
        save_file(unet() | {f"{K}.scale_weight": torch.ones(())}, name)


@pytest.mark.parametrize(("how", "message"), [
    ("unet", r"has no unet folder, so it is a model of another family: SD1\.x"),
    ("index", r"has no model_index\.json: give a checkpoint file or the top folder"),
    ("pickle", r"pickles \(\.bin\) only.*never opens pickles"),
    ("nothing", "holds no diffusion_pytorch_model"),
    ("variants", "variants of the UNet .* are different models"),
    ("flux", r"pipe: this is a transformer model .* SD1\.x, SD2\.x and SDXL are supported"),
    ("bad index", "is not an index of shards"),
    ("scaled", "scaled float8 weights: use a float16 version"),
])  # fmt: skip
def test_unusable_folders(tmp_path: Path, how: str, message: str) -> None:
    path = folder(tmp_path / "pipe")
    break_folder(path, how)
    with pytest.raises(ErasureError, match=message):
        open_checkpoint(path)


def test_the_running_average_of_a_training_checkpoint_is_edited_too(single: Path, tmp_path: Path) -> None:
    """Some programs load "model_ema" weights, which would bring the concept back."""
    state = load_file(single)
    averages = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": 3 * w for k, w in state.items() if "diffusion" in k}
    name = "model_ema.diffusion_modelmiddle_block1transformer_blocks0attn2to_kweight"
    assert name in averages
    save_file(state | averages | {"model_ema.decay": torch.tensor(0.5)}, single, {"format": "pt"})
    write_edited(open_checkpoint(single), tmp_path / "out.safetensors", {K: lambda w: 2 * w}, {})
    new = load_file(tmp_path / "out.safetensors")
    assert torch.equal(new[name], 2 * averages[name])
    rest = set(averages) - {name} | {"model_ema.decay"}
    assert all(torch.equal(new[k], load_file(single)[k]) for k in rest)


def test_an_edit_for_another_model(single: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single)
    other = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    with pytest.raises(ErasureError, match=f"has no projection {other}: the edit was made for another model"):
        checkpoint.read_projection(other)
    with pytest.raises(ErasureError, match="has no projection"):
        write_edited(checkpoint, tmp_path / "b", {other: lambda w: w}, {})
    assert not (tmp_path / "b").exists()
