"""What hosts read in our files: the WebUIs' sorting of LoRAs, ModelSpec, hashes; and what we read in other people's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from realera_nodes.core.concepts import Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.checkpoint import open_checkpoint
from realera_nodes.formats.lora import write_lora
from realera_nodes.formats.metadata import ErasureMetadata
from realera_nodes.formats.prediction import EPSILON, V, prediction_of_file
from realera_nodes.formats.stream import SafetensorsFile, rewrite
from realera_nodes.job import Job, prepare
from tests.tiny import KINDS, tiny_files

MADE = ErasureMetadata("realera", ("airplane",), ("sky",), base_name="model.safetensors")
NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FACTORS = {NAME: (torch.ones(2, 768), torch.ones(320, 2))}
BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def tab(metadata: dict[str, str]) -> str:
    """Where AUTOMATIC1111 1.8 and Forge put a LoRA."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if metadata else "unknown"


@pytest.mark.parametrize("prediction", [None, EPSILON, V])
@pytest.mark.parametrize("kind", KINDS)
def test_webuis_sort_loras_by_kind(kind: str, prediction: str | None) -> None:
    text = MADE.to_safetensors(kind, 4, prediction=prediction)  # type: ignore[arg-type]
    assert tab(text) == kind
    assert text["ss_sd_model_name"] == "model.safetensors"
    assert "ss_output_name" not in text, "hosts would show it in place of the file's name"
    assert ("ss_v_parameterization" in text) == (prediction is not None)
    assert text.get("modelspec.prediction_type") == {None: None, EPSILON: "epsilon", V: "v"}[prediction]
    checkpoint = MADE.to_safetensors(kind, prediction=prediction)  # type: ignore[arg-type]
    assert not any(key.startswith("ss_") for key in checkpoint), "a checkpoint is no LoRA"


@pytest.mark.parametrize(("kind", "prediction", "base", "architecture", "side"), [
    ("sd1", EPSILON, "sd_v1", "stable-diffusion-v1", 512),
    ("sd1", V, "sd_v1_v", "stable-diffusion-v1", 512),
    ("sd2", EPSILON, "sd_v2", "stable-diffusion-v2-512", 512),
    ("sd2", V, "sd_v2_v", "stable-diffusion-v2-768-v", 768),
    ("sdxl", EPSILON, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024),
    ("sdxl", V, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024),
])  # fmt: skip
def test_trainers_and_modelspecs_names(kind, prediction: str, base: str, architecture: str, side: int) -> None:
    lora = MADE.to_safetensors(kind, 4, prediction=prediction)
    assert lora["ss_base_model_version"] == base
    assert lora["modelspec.architecture"] == f"{architecture}/lora"
    assert lora["modelspec.resolution"] == f"{side}x{side}"
    checkpoint = MADE.to_safetensors(kind, prediction=prediction)
    assert checkpoint["modelspec.architecture"] == architecture
    for key in ("sai_model_spec", "implementation", "title", "description", "date", "resolution", "prediction_type"):
        assert checkpoint[f"modelspec.{key}"]
        assert lora[f"modelspec.{key}"]


@pytest.mark.parametrize(("kind", "prediction", "own", "said"), [
    ("sdxl", EPSILON, "segmind-stable-diffusion-1b", "segmind-stable-diffusion-1b"),
    ("sdxl", EPSILON, "stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"),
    ("sdxl", EPSILON, "stable-diffusion-xl-turbo-v1", "stable-diffusion-xl-turbo-v1"),
    ("sdxl", EPSILON, "someones-own", "someones-own"),
    ("sdxl", EPSILON, "stable-diffusion-v1", "stable-diffusion-xl-v1-base"),  # false: another family's
    ("sd2", V, "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),  # what we wrote once
    ("sd2", EPSILON, "stable-diffusion-v2-768-v", "stable-diffusion-v2-512"),
    ("sd2", None, "stable-diffusion-v2-768-v", "stable-diffusion-v2-768-v"),
    ("sd1", None, "", "stable-diffusion-v1"),
])  # fmt: skip
def test_a_models_own_architecture_is_kept_if_it_can_be(kind, prediction: str | None, own: str, said: str) -> None:
    old = {"modelspec.architecture": own, "modelspec.resolution": "640x640", "modelspec.license": "X", "modelspec.title": "old"}
    for ranks, end in ((None, ""), (4, "/lora")):
        text = MADE.to_safetensors(kind, ranks, old, prediction)
        assert text["modelspec.architecture"] == said + end
        assert (text["modelspec.resolution"], text["modelspec.license"]) == ("640x640", "X")
        assert text["modelspec.title"] != "old"


def test_hashes_are_of_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, FACTORS, MADE.to_safetensors("sd1", 2))
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(path, "pt") as file:
        text = file.metadata()
    assert text["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert text["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    key = next(n for n in SafetensorsFile.open(path).entries if n.endswith("lora_up.weight"))
    rewrite(path, tmp_path / "b.safetensors", {key: lambda w: 2 * w}, {})
    assert not {"modelspec.hash_sha256", "sshs_model_hash"} & SafetensorsFile.open(tmp_path / "b.safetensors").metadata.keys()
    write_lora(tmp_path / "bare.safetensors", FACTORS, {})
    assert SafetensorsFile.open(tmp_path / "bare.safetensors").metadata == {}, "--disable-metadata means none"


def small(path: Path, keys: tuple[str, ...] = (), deviation: float | None = None, **metadata: str) -> SafetensorsFile:
    state = {k: torch.ones(1) for k in keys}
    if deviation is not None:
        state[BIAS] = torch.tensor([deviation, -deviation])
    save_file(state | {"x": torch.zeros(1)}, path, {k.replace("__", "."): v for k, v in metadata.items()})
    return SafetensorsFile.open(path)


SPEC = "modelspec__prediction_type"


@pytest.mark.parametrize(("kind", "keys", "deviation", "metadata", "found", "zero", "doubts"), [
    ("sdxl", (), None, {SPEC: "v"}, V, False, 0),
    ("sdxl", (), None, {SPEC: "v_prediction"}, V, False, 0),
    ("sdxl", (), None, {SPEC: " V-Prediction "}, V, False, 0),
    ("sdxl", (), None, {SPEC: "velocity"}, V, False, 0),
    ("sdxl", (), None, {SPEC: "epsilon"}, EPSILON, False, 0),
    ("sdxl", (), None, {SPEC: "eps"}, EPSILON, False, 0),
    ("sdxl", (), None, {}, EPSILON, False, 0),
    ("sdxl", (), None, {SPEC: ""}, EPSILON, False, 0),
    ("sdxl", ("v_pred",), None, {}, V, False, 0),
    ("sdxl", ("v_pred", "ztsnr"), None, {}, V, True, 0),
    ("sdxl", ("v_pred", "ztsnr"), None, {SPEC: "v"}, V, True, 0),
    ("sdxl", ("v_pred",), None, {SPEC: "epsilon"}, V, False, 1),
    ("sdxl", ("ztsnr",), None, {SPEC: "v"}, V, True, 0),
    ("sdxl", (), None, {SPEC: "v", "ss_zero_terminal_snr": "True"}, V, True, 0),
    ("sdxl", (), None, {SPEC: "v", "ss_zero_terminal_snr": "False"}, V, False, 0),
    ("sdxl", (), None, {SPEC: "epsilon", "ss_zero_terminal_snr": "True"}, EPSILON, False, 1),
    ("sdxl", (), None, {"ss_v_parameterization": "True"}, V, False, 0),
    ("sdxl", (), None, {"ss_v_parameterization": "False", SPEC: "v"}, V, False, 1),
    ("sdxl", (), None, {"modelspec__predict_key": "v"}, V, False, 0),
    ("sdxl", (), None, {"modelspec__predict_key": "epsilon", SPEC: "v"}, V, False, 1),
    ("sdxl", (), None, {SPEC: "something new"}, EPSILON, False, 1),
    ("sd1", (), None, {SPEC: "v"}, V, False, 0),
    ("sd1", ("v_pred",), None, {}, V, False, 0),
    ("sd2", (), 0.1, {}, V, False, 0),
    ("sd2", (), 0.05, {}, EPSILON, False, 0),
    ("sd2", (), 0.1, {SPEC: "epsilon"}, EPSILON, False, 1),
    ("sd2", (), 0.05, {"modelspec__architecture": "stable-diffusion-v2-768-v"}, EPSILON, False, 1),
    ("sd2", (), None, {"modelspec__architecture": "stable-diffusion-v2-768-v"}, V, False, 0),
])  # fmt: skip
def test_what_a_file_says_of_its_prediction(tmp_path: Path, kind, keys, deviation, metadata, found, zero, doubts) -> None:
    result = prediction_of_file(small(tmp_path / "a.safetensors", keys, deviation, **metadata), kind)
    assert (result.type, result.zero_snr, len(result.doubts)) == (found, zero, doubts)
    assert result.by
    for line in result.doubts:
        assert "a.safetensors" in line
        assert "--prediction" in line
        assert "\n" not in line


@pytest.mark.parametrize("word", ["sample", "x0", "flow", "rectified_flow", "EDM"])
def test_predictions_of_other_kinds_are_refused_unless_the_user_knows_better(tmp_path: Path, word: str) -> None:
    file = small(tmp_path / "a.safetensors", **{SPEC: word})
    with pytest.raises(
        ErasureError, match="only epsilon and v_prediction are supported: use another model, or give --prediction"
    ):
        prediction_of_file(file, "sdxl")
    assert prediction_of_file(file, "sdxl", V).type == V


def test_what_the_user_says_holds_and_the_contradiction_is_told(tmp_path: Path) -> None:
    file = small(tmp_path / "a.safetensors", ("v_pred", "ztsnr"))
    assert prediction_of_file(file, "sdxl", V) == prediction_of_file(file, "sdxl", V)
    assert prediction_of_file(file, "sdxl", V).doubts == ()
    against = prediction_of_file(file, "sdxl", EPSILON)
    assert against.type == EPSILON
    assert len(against.doubts) == 2


@pytest.mark.parametrize("word", ["v_prediction", "epsilon", None, "sample", ["epsilon"], 3])
def test_a_folder_speaks_by_its_scheduler(tmp_path: Path, word: object) -> None:
    import os
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_files("sd1")[0], model, copy_function=os.symlink)
    path = model / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": word}
    path.unlink()
    path.write_text(json.dumps(config))
    checkpoint = open_checkpoint(model)
    if word in (EPSILON, V):
        assert checkpoint.prediction().type == word
    else:
        with pytest.raises(ErasureError, match="only models that predict"):
            checkpoint.prediction()
        with pytest.raises(ErasureError, match="only models that predict"):
            prepare(Job(str(model), (Concept("cat", "dog"),), tmp_path / "out"))  # before any work is done
    assert checkpoint.prediction(V).type == V
