"""ComfyUI's nodes on models held as float8, or quantised with scales: edits stay as precise as the host allows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import host_packages, require_comfyui

pytestmark = pytest.mark.comfyui

#: what the host's rounding of the sum to the weight's type may lose of what an edit does to its concept's keys and values
LOSSES = {"half": 0.001, "e4m3fn": 0.05, "e5m2": 0.08, "scaled-fp8": 0.05, "int8": 0.03, "nvfp4": 0.1}
#: formats with scales that the host knows since 0.8
NEW = ("int8", "nvfp4")


def ask(amount: str, formats: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    root, python = require_comfyui()
    script, out = Path(__file__).with_name("nodes_quantised.py"), folder / "answers.json"
    environment = os.environ | host_packages(folder) | {"XDG_CACHE_HOME": str(folder)}
    command = [str(python), str(script), str(root), str(out), amount, *formats]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8", timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root, _ = require_comfyui()
    known = (root / "comfy" / "quant_ops.py").exists() and (root / "QUANTIZATION.md").exists()
    return ask("few", [f for f in LOSSES if known or f not in NEW], tmp_path_factory.mktemp("quantised"))


@pytest.fixture(params=LOSSES)
def answers(few, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    if request.param not in few:
        pytest.skip(f"this ComfyUI does not know {request.param}")
    return request.param, few[request.param]


def test_edits_and_training_work(answers) -> None:
    _, found = answers
    assert {name: said for name, said in found["said"].items() if name != "TrainEsd x"} == {
        "ClosedForm": "nothing",
        "TrainLora": "nothing",
    }


def test_weights_that_cannot_be_trained_are_named_in_a_sentence(answers) -> None:
    format, found = answers
    said = found["said"]["TrainEsd x"]
    assert said == "nothing" if format == "half" else "cannot be trained: load it as float16 or float32" in said


def test_weights_are_read_as_the_host_computes_with_them(answers) -> None:
    assert answers[1]["read"] < 1e-6


def test_the_edit_is_kept_in_half_or_single_precision(answers) -> None:
    _, found = answers
    assert min(found["bits"]) >= 16
    assert found["delta"] < 1e-3


@pytest.mark.parametrize("where", ["loaded", "saved"])
def test_no_more_of_the_edit_is_lost_than_the_host_rounds_away(answers, where: str) -> None:
    format, found = answers
    assert found[where] < LOSSES[format]


def test_the_base_stays_as_it_is(answers) -> None:
    _, found = answers
    assert (found["changed"], found["hooks"], found["base changed"]) == ([], 0, 0)


def test_every_node_works_on_a_float8_model(tmp_path: Path) -> None:
    said = ask("all", ["e4m3fn"], tmp_path)["e4m3fn"]["said"]
    assert len(said) == 15
    refused = {name for name, sentence in said.items() if "cannot be trained: load it as float16 or float32" in sentence}
    assert refused == {"TrainEsd x", "TrainEsd u"}
    assert {name: sentence for name, sentence in said.items() if sentence != "nothing" and name not in refused} == {}
