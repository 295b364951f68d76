"""What erased files say about themselves, and what is shown of any file."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.lora import write_lora
from realera_nodes.formats.metadata import ErasureMetadata, inspect_file

K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
V = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
MADE = ErasureMetadata("realera", ("Van Gogh", "猫"), ("art", ""), ("dog",), {"rank": 4, "lambda": 0.1}, "ab" * 32, "sd15",
                       "2024-01-02T03:04:05+00:00", "1.2.3")  # fmt: skip
WORDS = st.lists(st.text(max_size=8), max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(concepts=WORDS, anchors=WORDS, config=st.dictionaries(st.text(max_size=5), st.integers() | st.booleans() | st.none()))
def test_metadata_survive_the_round_trip(concepts, anchors, config) -> None:
    made = ErasureMetadata("mace", concepts, anchors, (), config)
    text = made.to_safetensors("sd1", 4)
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in text.items())
    assert ErasureMetadata.from_safetensors(text) == made


def test_fields() -> None:
    text = MADE.to_safetensors("sdxl")
    assert json.loads(text["realera.concepts"]) == ["Van Gogh", "猫"]
    assert json.loads(text["realera.config"]) == {"rank": 4, "lambda": 0.1}
    assert text["modelspec.sai_model_spec"] == "1.0.0"
    assert text["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert text["modelspec.title"] == "sd15 without Van Gogh, 猫"
    assert text["modelspec.description"] == "Concepts erased with realera: Van Gogh -> art, 猫. Preserved: dog."
    assert text["modelspec.date"] == "2024-01-02T03:04:05+00:00"
    assert text["modelspec.implementation"]
    assert not any(key.startswith("ss_") for key in text)


@pytest.mark.parametrize(("kind", "name"), [("sd1", "stable-diffusion-v1"), ("sd2", "stable-diffusion-v2-512"),
                                            ("sdxl", "stable-diffusion-xl-v1-base")])  # fmt: skip
def test_a_lora_says_so(kind, name: str) -> None:
    assert MADE.to_safetensors(kind)["modelspec.architecture"] == name
    text = MADE.to_safetensors(kind, ranks=4)
    assert text["modelspec.architecture"] == f"{name}/lora"
    assert (text["ss_network_module"], text["ss_network_dim"], text["ss_network_alpha"]) == ("networks.lora", "4", "4")
    assert MADE.to_safetensors(kind, {"a": 3, "b": 3})["ss_network_dim"] == "3"
    assert MADE.to_safetensors(kind, {"a": 3, "b": 4})["ss_network_dim"] == "Dynamic"


def test_the_models_own_architecture_is_kept() -> None:
    own = {"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.title": "old"}
    text = MADE.to_safetensors("sd2", inherited=own)
    assert text["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert text["modelspec.title"] == "sd15 without Van Gogh, 猫"
    assert MADE.to_safetensors("sd2", 4, own)["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


def test_time_and_version_are_filled_in() -> None:
    made = ErasureMetadata("uce", ["x"], ["y"])  # type: ignore[arg-type]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(made.created)
    assert timedelta(seconds=-1) < age < timedelta(seconds=60)
    assert made.version
    assert made.concepts == ("x",)
    with pytest.raises(FrozenInstanceError):
        made.method = "other"  # type: ignore[misc]


def test_foreign_and_damaged_metadata() -> None:
    assert ErasureMetadata.from_safetensors({"format": "pt"}) is None
    for damage in ({"realera.config": "{"}, {"realera.concepts": "3"}):
        with pytest.raises(ErasureError, match=r"realera\.\* metadata are damaged"):
            ErasureMetadata.from_safetensors(MADE.to_safetensors() | damage)
    missing = MADE.to_safetensors()
    del missing["realera.config"]
    with pytest.raises(ErasureError, match="damaged"):
        ErasureMetadata.from_safetensors(missing)


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_settings_that_json_cannot_hold(value: object) -> None:
    with pytest.raises(ErasureError, match="settings cannot be stored"):
        ErasureMetadata("x", (), (), config={"a": value}).to_safetensors()


def unet() -> dict[str, torch.Tensor]:
    return {f"{K}.weight": torch.ones(4, 768), f"{V}.weight": torch.ones(4, 768), "x": torch.ones(2, dtype=torch.float16)}


def test_inspecting_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(unet(), path, MADE.to_safetensors("sd1") | {"note": "x"})
    report = inspect_file(path)
    assert json.loads(json.dumps(report))["erasure"]["concepts"] == ["Van Gogh", "猫"]
    assert report["erasure"] == asdict(MADE)
    assert report["metadata"]["note"] == "x"
    assert not any(key.startswith("realera.") for key in report["metadata"])
    del report["metadata"], report["erasure"]
    assert report == {"path": str(path), "kind": "checkpoint", "architecture": "sd1", "layout": "diffusers", "context_width": 768,
                      "projections": 2, "tensors": 3, "dtypes": {"F32": 2, "F16": 1}, "bytes": path.stat().st_size}  # fmt: skip


def test_inspecting_a_folder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    save_file(unet(), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    report = inspect_file(tmp_path)
    assert (report["kind"], report["architecture"], report["tensors"], report["erasure"]) == ("diffusers folder", "sd1", 3, None)
    assert report["bytes"] == 2 + (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size


def test_inspecting_a_lora(tmp_path: Path) -> None:
    factors = {K: (torch.ones(3, 2048), torch.ones(5, 3)), V: (torch.ones(2, 2048), torch.ones(5, 2))}
    write_lora(tmp_path / "a", factors, MADE.to_safetensors("sdxl", {K: 3, V: 2}))
    report = inspect_file(tmp_path / "a")
    assert (report["kind"], report["architecture"], report["ranks"], report["projections"]) == ("LoRA", "sdxl", [2, 3], 2)
    assert report["dtypes"] == {"F32": 2, "F16": 4}
    assert report["erasure"]["method"] == "realera"


def test_inspecting_something_else(tmp_path: Path) -> None:
    save_file({"decoder.conv_in.weight": torch.ones(1)}, tmp_path / "vae")
    report = inspect_file(tmp_path / "vae")
    assert (report["kind"], report["architecture"]) == ("other", None)
    assert "only a VAE" in report["reason"]
    with pytest.raises(ErasureError, match="does not exist"):
        inspect_file(tmp_path / "gone")
