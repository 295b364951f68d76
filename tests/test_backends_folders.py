"""Diffusers folders as people have them: linked parts, variants part by part, pickles, and configurations that went wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from realera_nodes.backends.loading import load_backend
from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.checkpoint import open_checkpoint, planned_bytes, write_edited
from realera_nodes.formats.stream import SafetensorsFile
from tests.test_formats_odd_files import in_time
from tests.tiny import SIDE, tiny_backend, tiny_files

PARTS = {"sd1": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"), "sdxl": ("text_encoder_2", "tokenizer_2")}
MODELS = ("unet", "vae", "text_encoder")


def stem(part: str) -> str:
    return "model" if part.startswith("text") else "diffusion_pytorch_model"


def light_copy(kind: str, target: Path) -> Path:
    """The tiny model with links for its files."""
    shutil.copytree(tiny_files(kind)[0], target, copy_function=os.symlink)
    return target


def own(path: Path) -> Path:
    """Makes a linked file one of the folder's own."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def files_in(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def negated(base: Any, out: Path) -> None:
    write_edited(base, out, dict.fromkeys(base.architecture.projections, torch.neg), {"erased": "yes"})


def require_same(source: Path, out: Path) -> None:
    """Every part, as files; the same tensors, of which only the projections differ."""
    whole = files_in(tiny_files("sd1" if "sd1" in source.name or not (source / "text_encoder_2").exists() else "sdxl")[0])
    assert files_in(out).keys() == whole.keys()
    assert not any(p.is_symlink() for p in out.rglob("*"))
    for name in whole:
        if name.endswith(".safetensors"):
            a, b = SafetensorsFile.open(source / name), SafetensorsFile.open(out / name)
            assert a.shapes == b.shapes
            different = [n for n in a.entries if not torch.equal(a.read(n).view(torch.uint8), b.read(n).view(torch.uint8))]
            assert all("attn2.to_" in n for n in different)
            assert bool(different) == name.startswith("unet/")
    assert open_checkpoint(out).architecture == open_checkpoint(source).architecture


@pytest.mark.parametrize(("kind", "part", "how"), [
    *((kind, part, "link") for kind, parts in PARTS.items() for part in parts),
    *(("sd1", "unet", how) for how in ("link to a link", "relative link", "part of links")),
])  # fmt: skip
def test_linked_parts_are_written_as_files(tmp_path: Path, kind: str, part: str, how: str) -> None:
    source, original = tmp_path / kind, tiny_files(kind)[0] / part
    shutil.copytree(tiny_files(kind)[0], source, ignore=shutil.ignore_patterns(part), copy_function=os.symlink)
    if how == "link":
        (source / part).symlink_to(original)
    elif how == "link to a link":
        (tmp_path / "first").symlink_to(original)
        (tmp_path / "second").symlink_to("first")
        (source / part).symlink_to(tmp_path / "second")
    elif how == "relative link":
        shutil.copytree(original, tmp_path / "shared" / "x")
        (source / part).symlink_to("../shared/x")
    else:
        shutil.copytree(original, source / part, copy_function=os.symlink)
    base = open_checkpoint(source)
    assert planned_bytes(base, tmp_path / "out") == sum(files_in(tiny_files(kind)[0]).values())
    negated(base, tmp_path / "out")
    require_same(source, tmp_path / "out")


def test_the_folder_itself_a_link(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_files("sd1")[0])
    negated(open_checkpoint(tmp_path / "model"), tmp_path / "out")
    require_same(tmp_path / "model", tmp_path / "out")
    assert load_backend(tmp_path / "model", size=SIDE).names == tiny_backend("sd1").names


def test_links_in_a_circle_and_out_of_the_folder_end(tmp_path: Path) -> None:
    source = light_copy("sd1", tmp_path / "around" / "sd1")
    (source / "vae" / "again").symlink_to(source)
    (source / "unet" / "self").symlink_to(".")
    (source / "up").symlink_to("..")
    (source / "top").symlink_to("/")
    in_time(lambda: negated(open_checkpoint(source), tmp_path / "out"), 120)
    require_same(source, tmp_path / "out")


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "scheduler"])
@pytest.mark.parametrize("how", ["gone", "circle", "file", "missing"])
def test_parts_that_lead_nowhere_are_named_before_any_work(tmp_path: Path, part: str, how: str) -> None:
    source = tmp_path / "sd1"
    shutil.copytree(tiny_files("sd1")[0], source, ignore=shutil.ignore_patterns(part), copy_function=os.symlink)
    if how == "file":
        (source / part).write_text("")
    elif how != "missing":
        (source / part).symlink_to(part if how == "circle" else tmp_path / "nowhere")
    for act in (lambda: planned_bytes(open_checkpoint(source), tmp_path / "out"), lambda: load_backend(source, size=SIDE)):
        with pytest.raises(ErasureError, match=part) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [
    "vae/config.json", "scheduler/scheduler_config.json", "model_index.json", "tokenizer/tokenizer_config.json",
    "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
])  # fmt: skip
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, place: str) -> None:
    source = light_copy("sd1", tmp_path / "sd1")
    (source / place).unlink()
    os.mkfifo(source / place)
    for act in (lambda: planned_bytes(open_checkpoint(source), tmp_path / "out"), lambda: load_backend(source, size=SIDE)):
        with pytest.raises(ErasureError, match="is a pipe"):
            in_time(act, 60)


def test_a_target_inside_a_linked_part_or_around_it(tmp_path: Path) -> None:
    source = tmp_path / "sd1"
    shutil.copytree(tiny_files("sd1")[0], source, ignore=shutil.ignore_patterns("vae"), copy_function=os.symlink)
    shutil.copytree(tiny_files("sd1")[0] / "vae", tmp_path / "old" / "vae")
    (tmp_path / "old" / "model_index.json").write_text("{}")
    (source / "vae").symlink_to(tmp_path / "old" / "vae")
    base = open_checkpoint(source)
    for target in (source / "vae" / "out", tmp_path / "old" / "vae" / "out", tmp_path / "old", source / "x"):
        with pytest.raises(ErasureError, match="lies inside the source folder or around it"):
            planned_bytes(base, target)
        with pytest.raises(ErasureError, match="lies inside the source folder or around it"):
            write_edited(base, target, {}, {}, overwrite=True)
    assert (tmp_path / "old" / "vae" / "config.json").exists()


def test_a_copy_that_went_wrong_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk, a driver or a bug that loses something: nothing stays, and nobody is told that it worked."""
    from realera_nodes.formats import checkpoint as module
    from realera_nodes.formats import stream

    folder, single = tiny_files("sd1")
    real_copy, real_bytes = module.copy_file, stream.copy_bytes

    def cut(source: Path, target: Path, tick: Any = None) -> None:
        real_copy(source, target)
        if target.parent.name == "vae" and target.suffix == ".safetensors":
            os.truncate(target, target.stat().st_size - 1)

    def lost(source: Any, target: Any, begin: int, count: int, tick: Any) -> None:
        real_bytes(source, target, begin, max(0, count - 8), tick)

    for name, change in (("folder", lambda: monkeypatch.setattr(module, "copy_file", cut)),
                         ("forgotten", lambda: monkeypatch.setattr(module, "copy_file", lambda *a: None)),
                         ("single", lambda: monkeypatch.setattr(stream, "copy_bytes", lost))):  # fmt: skip
        with monkeypatch.context():
            change()
            with pytest.raises(ErasureError, match="is not as it was written"):
                negated(open_checkpoint(single if name == "single" else folder), tmp_path / f"{name}.safetensors")
        monkeypatch.undo()
        assert os.listdir(tmp_path) == []


def test_a_changed_tensor_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera_nodes.formats import stream

    real = stream.tensor_bytes
    calls: list[int] = []

    def flipped(value: torch.Tensor) -> Any:
        calls.append(1)
        return real(value)

    monkeypatch.setattr(stream, "tensor_bytes", flipped)
    monkeypatch.setattr(stream.zlib, "crc32", lambda data, value=0: len(calls))
    base = open_checkpoint(tiny_files("sd1")[1])
    with pytest.raises(ErasureError, match="has other bytes"):
        negated(base, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def renamed(variant: str) -> Callable[[Path, str], None]:
    def act(model: Path, part: str) -> None:
        (model / part / f"{stem(part)}.safetensors").rename(model / part / f"{stem(part)}.{variant}.safetensors")

    return act


def sharded(variant: str, infix: bool = False) -> Callable[[Path, str], None]:
    """Two shards and their index, in the two spellings of variants."""

    def act(model: Path, part: str) -> None:
        place, plain = model / part, model / part / f"{stem(part)}.safetensors"
        state = load_file(plain)
        plain.unlink()
        dot, names, places = f".{variant}" if variant else "", sorted(state), {}
        for i, own_names in enumerate((names[::2], names[1::2]), 1):
            mark = f"-{i:05}-of-00002"
            shard = f"{stem(part)}{dot}{mark}.safetensors" if infix else f"{stem(part)}{mark}{dot}.safetensors"
            save_file({n: state[n] for n in own_names}, place / shard)
            places |= dict.fromkeys(own_names, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (place / f"{stem(part)}.safetensors.index{dot}.json").write_text(json.dumps(index))

    return act


VARIANTS = {"fp16": renamed("fp16"), "ema": renamed("ema"), "non_ema": renamed("non_ema"), "shards": sharded(""),
            "fp16 shards": sharded("fp16"), "fp16 shards, as transformers spells them": sharded("fp16", True)}  # fmt: skip


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_come_in_variants_of_their_own(tmp_path: Path, part: str, variant: str) -> None:
    model = light_copy("sd1", tmp_path / "sd1")
    VARIANTS[variant](model, part)
    loaded, plain = load_backend(model, device="cpu", size=SIDE), tiny_backend("sd1")
    a, b = (m.pipe.components[part].state_dict() for m in (loaded, plain))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert planned_bytes(open_checkpoint(model), tmp_path / "out") > 0


def test_every_part_in_another_variant_is_written_and_loads_again(tmp_path: Path) -> None:
    model = light_copy("sdxl", tmp_path / "sdxl")
    for part, variant in (("unet", "non_ema"), ("vae", "fp16"), ("text_encoder", "shards"), ("text_encoder_2", "fp16 shards")):
        VARIANTS[variant](model, part)
    negated(open_checkpoint(model), tmp_path / "out")
    again = load_backend(tmp_path / "out", device="cpu", size=SIDE)
    assert all(torch.equal(w, -tiny_backend("sdxl").projections()[n]) for n, w in again.projections().items())


def test_shards_without_their_index(tmp_path: Path) -> None:
    model = light_copy("sd1", tmp_path / "sd1")
    sharded("fp16")(model, "vae")
    index = model / "vae" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    broken = {"[]": "is not an index", '{"weight_map": null}': "is not an index", '{"weight_map": {"a": 3}}': "is not an index",
              "[" * 100_000: "not JSON"}  # fmt: skip
    for text, words in broken.items():
        index.write_text(text)
        with pytest.raises(ErasureError, match=words):
            load_backend(model, size=SIDE)
    index.unlink()
    with pytest.raises(ErasureError, match=r"lacks diffusion_pytorch_model\.safetensors\.index\.fp16\.json, .*: download that"):
        load_backend(model, size=SIDE)
    (model / "vae" / "diffusion_pytorch_model-00002-of-00002.fp16.safetensors").unlink()
    with pytest.raises(ErasureError, match=r"lacks the shard diffusion_pytorch_model-00002-of-00002\.fp16\.safetensors"):
        load_backend(model, size=SIDE)


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "model.ckpt"])
def test_parts_that_are_only_pickles_say_so(tmp_path: Path, part: str, name: str) -> None:
    model = light_copy("sd1", tmp_path / "sd1")
    (model / part / f"{stem(part)}.safetensors").rename(model / part / name)
    with pytest.raises(ErasureError, match=rf"{part} holds pickles .*never opens pickles"):
        load_backend(model, size=SIDE)
    (model / part / name).unlink()
    with pytest.raises(ErasureError, match=r"holds no .*\.safetensors.*: download the folder again"):
        load_backend(model, size=SIDE)


#: file, key, value, words of the sentence
ODD: list[tuple[str, str, Any, str]] = [
    ("unet/config.json", "sample_size", "64", "sample_size is '64'"),
    ("unet/config.json", "sample_size", [], "sample_size is"),
    ("unet/config.json", "sample_size", -3, "sample_size is -3"),
    ("unet/config.json", "block_out_channels", None, "cannot be loaded"),
    ("unet/config.json", "cross_attention_dim", "768", "cannot be loaded"),
    ("unet/config.json", "attention_head_dim", [], "cannot be loaded"),
    ("unet/config.json", "freq_shift", "none", "cannot be loaded"),
    ("unet/config.json", "norm_num_groups", "many", "cannot be loaded"),
    ("unet/config.json", "down_block_types", "CrossAttnDownBlock2D", "cannot be loaded"),
    ("unet/config.json", "act_fn", None, "cannot be loaded"),
    ("unet/config.json", "quantization_config", {"load_in_4bit": True}, "quantised"),
    ("vae/config.json", "scaling_factor", None, "cannot be loaded"),
    ("vae/config.json", "scaling_factor", "0.18215", "cannot be loaded"),
    ("vae/config.json", "latent_channels", "four", "cannot be loaded"),
    ("text_encoder/config.json", "hidden_act", None, "cannot be loaded"),
    ("text_encoder/config.json", "num_attention_heads", "12", "cannot be loaded"),
    ("scheduler/scheduler_config.json", "beta_start", None, "cannot be loaded"),
    ("scheduler/scheduler_config.json", "beta_end", "0.012", "cannot be loaded"),
    ("scheduler/scheduler_config.json", "beta_schedule", [], "cannot be loaded"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "1000", "cannot be loaded"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10, "1000 falling steps"),
    ("scheduler/scheduler_config.json", "beta_end", 5.0, "1000 falling steps|cannot be loaded"),
    ("scheduler/scheduler_config.json", "timestep_spacing", None, "cannot be loaded"),
    ("scheduler/scheduler_config.json", "prediction_type", None, 'predicts "None"'),
    ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"], "predicts"),
    ("scheduler/scheduler_config.json", "trained_betas", "all", "cannot be loaded"),
    ("model_index.json", "_class_name", None, "names no pipeline"),
    ("model_index.json", "_class_name", ["StableDiffusionPipeline"], "names no pipeline"),
    ("model_index.json", "vae", "AutoencoderKL", "has no vae"),
    ("model_index.json", "vae", ["diffusers"], "not a library and a class"),
    ("model_index.json", "vae", ["diffusers", 3], "not a library and a class"),
    ("model_index.json", "vae", ["diffusers", "NoSuchThing"], "which is not known here"),
    ("model_index.json", "vae", ["os", "system"], "which is not known here"),
    ("model_index.json", "unet", ["diffusers", "AutoencoderKL"], "cannot be loaded|lacks|no UNet"),
]


@pytest.mark.parametrize(("file", "key", "value", "words"), ODD, ids=[f"{f}:{k}={str(v)[:12]}" for f, k, v, _ in ODD])
def test_odd_values_in_configurations(tmp_path: Path, file: str, key: str, value: Any, words: str) -> None:
    model = light_copy("sd1", tmp_path / "sd1")
    path = own(model / file)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    given = None if "sample_size" in key else SIDE
    with pytest.raises(ErasureError, match=words) as caught:
        in_time(lambda: load_backend(model, device="cpu", size=given), 120)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{", "[" * 100_000, "\ufeff{"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_configurations_that_are_none(tmp_path: Path, file: str, text: str) -> None:
    model = light_copy("sd1", tmp_path / "sd1")
    (model / file).unlink()
    (model / file).write_text(text)
    with pytest.raises(ErasureError) as caught:
        in_time(lambda: load_backend(model, device="cpu", size=SIDE), 120)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 10**30, "77", -1, 20])
def test_the_tokenizer_writes_what_the_encoder_reads(tmp_path: Path, value: Any) -> None:
    """A configuration without a length means 10^30 tokens to the library, which no memory holds."""
    model = light_copy("sd1", tmp_path / "sd1")
    path = own(model / "tokenizer" / "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    states = load_backend(model, device="cpu", size=SIDE).encode(["a cat"]).states
    assert torch.equal(states, tiny_backend("sd1").encode(["a cat"]).states)


def test_a_unet_that_does_not_say_its_size_has_its_familys(tmp_path: Path) -> None:
    model = light_copy("sd1", tmp_path / "sd1")
    path = own(model / "unet" / "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    assert load_backend(model, device="cpu").side == 64 * 2  # the tiny VAE halves once
