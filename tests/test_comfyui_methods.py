"""UCE Edit and Train ESD in a real ComfyUI server: pictures, files, the cache, cancelling, and a base that stays as it is."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import numpy as np
import pytest

from realera_nodes.demo import expand
from realera_nodes.formats.metadata import inspect_file
from tests.comfyui_graphs import concept, drawn, failure, loader, node, pictures, run, weights, with_defaults
from tests.http_graphs import queue, wait

pytestmark = pytest.mark.comfyui

#: of 255, largest difference of pictures whose models are the same but for the order of sums
SAME = 2
METHODS = ("uce", "x", "u")


def esd(info: dict[str, Any], variant: str, lr: float, **more: Any) -> dict[str, Any]:
    given = {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2], "concepts": ["concept", 0], "variant": variant,
             "steps": 6, "lr": lr, "sampling_steps": 4, "templates": "a photo of the {}", "picture_size": 64,
             "preview_every": 3}  # fmt: skip
    return with_defaults(info, "RealEra_TrainEsd", **(given | more))


def methods(info: dict[str, Any]) -> dict[str, dict]:
    """The three edits of one loaded model."""
    return {
        "loader": loader(),
        "concept": concept(),
        "uce": with_defaults(info, "RealEra_Uce", model=["loader", 0], clip=["loader", 1], concepts=["concept", 0],
                             tokens="aligned", templates="a photo of the {}"),
        "x": esd(info, "x", 1e-3),
        "u": esd(info, "u", 1e-4),
    }  # fmt: skip


def shown(model: list, name: str) -> dict[str, dict]:
    """``drawn`` with names of its own, so that several fit into a graph."""
    parts = drawn(model)
    renamed = {part: f"{name} {part}" for part in parts}
    return {
        renamed[part]: {"class_type": p["class_type"], "inputs": {
            k: [renamed.get(v[0], v[0]), v[1]] if isinstance(v, list) else v for k, v in p["inputs"].items()}}
        for part, p in parts.items()
    }  # fmt: skip


def checkpoint(model: list, prefix: str) -> dict:
    return node("RealEra_SaveCheckpoint", model=model, clip=["loader", 1], vae=["loader", 2], filename_prefix=prefix)


@pytest.fixture(scope="module")
def done(comfy, info) -> dict[str, Any]:
    """Outputs of a graph that edits by each method, draws, and saves."""
    graph = methods(info) | shown(["loader", 0], "base")
    for name in METHODS:
        graph |= shown([name, 0], name) | {f"{name} file": checkpoint([name, 0], f"checkpoints/tests-{name}")}
    graph["lora"] = node("RealEra_SaveLora", lora=["uce", 1], filename_prefix="loras/tests-uce", precision="float32")
    return run(comfy, graph, 400)


@pytest.mark.parametrize("name", METHODS)
def test_pictures_change_and_the_base_does_not(comfy, info, done, base_hash, name) -> None:
    before, after = (pictures(comfy, done[f"{n} save"]) for n in ("base", name))
    assert np.abs(before - after).max() > 10
    assert weights(comfy, methods(info), [name, 0]) == base_hash
    again = run(comfy, methods(info) | shown(["loader", 0], "base"))
    assert np.array_equal(pictures(comfy, again["base save"]), before)


@pytest.mark.parametrize("name", METHODS)
def test_the_saved_checkpoint_draws_the_same_pictures(comfy, info, done, name) -> None:
    item = done[f"{name} file"]["checkpoint"][0]
    found = inspect_file(comfy.base / "output" / "checkpoints" / item["filename"])
    made = found["erasure"]
    assert (made["method"], made["concepts"], made["base_name"]) == (
        {"uce": "uce", "x": "esd-x", "u": "esd-u"}[name], ("airplane",), expand.CHECKPOINT
    )  # fmt: skip
    assert made["anchors"] == (("sky",) if name == "uce" else ("",))
    assert made["preserved"] == (("bird",) if name == "uce" else ())
    graph = methods(info) | {"saved": loader(item["filename"])} | shown(["saved", 0], "again")
    graph["again positive"]["inputs"]["clip"] = graph["again negative"]["inputs"]["clip"] = ["saved", 1]
    again = pictures(comfy, run(comfy, graph)["again save"])
    assert np.abs(again - pictures(comfy, done[f"{name} save"])).max() <= SAME


def test_uces_lora_is_the_edit(comfy, info, done) -> None:
    name = done["lora"]["lora"][0]["filename"]
    graph = methods(info) | {"loaded": node("LoraLoaderModelOnly", model=["loader", 0], lora_name=name, strength_model=1.0)}
    again = pictures(comfy, run(comfy, graph | shown(["loaded", 0], "again"))["again save"])
    assert np.abs(again - pictures(comfy, done["uce save"])).max() <= SAME


def test_what_the_nodes_say(done) -> None:
    said = done["uce"]["text"][0]
    assert said.startswith("erased: airplane -> sky")
    assert "as a LoRA of rank" in said
    for name in ("x", "u"):
        assert done[name]["text"][0].startswith("6 steps, loss from")
        assert "no LoRA holds exactly" in done[name]["text"][0]
        assert len(done[name]["realera_loss"]) == 6


def test_a_second_queue_is_served_from_the_cache(comfy, info, done) -> None:
    graph = methods(info)
    graph |= {f"look {n}": node("LossGraphNode", loss=[n, 1], filename_prefix="tests-loss") for n in ("x", "u")}
    graph["look uce"] = node("PreviewAny", source=["uce", 2])
    history = wait(comfy.url, queue(comfy.url, graph))
    assert history["status"]["status_str"] == "success"
    cached = next(m[1]["nodes"] for m in history["status"]["messages"] if m[0] == "execution_cached")
    assert set(METHODS) <= set(cached)


@pytest.mark.parametrize("variant", ["x", "u"])
def test_cancelling_leaves_no_trace(comfy, info, done, base_hash, variant) -> None:
    graph = methods(info)
    graph["long"] = esd(info, variant, 1e-4, steps=100000, preview_every=2)
    key = queue(comfy.url, graph | {"look": node("LossGraphNode", loss=["long", 1], filename_prefix="tests-loss")})
    end, progress = time.time() + 120, {"value": 0, "max": 0}
    while time.time() < end and not (progress["max"] == 100000 and progress["value"] >= 3):
        time.sleep(0.1)
        progress = httpx.get(f"{comfy.url}/tests/progress/long", timeout=30).json()
    start = time.time()
    httpx.post(f"{comfy.url}/interrupt", timeout=30)
    history = wait(comfy.url, key, 30)
    assert time.time() - start < 5
    name, message = history["status"]["messages"][-1]
    assert (name, message["node_id"]) == ("execution_interrupted", "long")
    assert weights(comfy, methods(info), ["loader", 0]) == base_hash
    after = run(comfy, methods(info) | shown(["loader", 0], "base"))
    assert np.array_equal(pictures(comfy, after["base save"]), pictures(comfy, done["base save"]))


def test_an_error_inside_training_leaves_the_base_alone(comfy, info, done, base_hash) -> None:
    graph = methods(info)
    graph["broken"] = node("Test_Fail", model=["loader", 0], calls=40)
    graph["fails"] = esd(info, "u", 1e-4, model=["broken", 0], steps=50)
    message = failure(comfy, graph | {"look": node("LossGraphNode", loss=["fails", 1], filename_prefix="tests-loss")})
    assert (message["node_id"], message["exception_message"].strip()) == ("fails", "made to fail")
    assert any("train_esd" in line for line in message["traceback"])
    assert weights(comfy, methods(info), ["loader", 0]) == base_hash


def test_other_nodes_go_on_from_a_trained_model(comfy, info, done, base_hash) -> None:
    """A LoRA trained after ESD counts its model as the original; a report still compares with the model that was loaded."""
    graph = methods(info)
    graph["edit"] = with_defaults(
        info, "RealEra_ClosedForm", model=["u", 0], clip=["loader", 1], concepts=["concept", 0], prior=0.0
    )
    graph["train"] = with_defaults(info, "RealEra_TrainLora", model=["edit", 0], clip=["loader", 1], concepts=["concept", 0],
                                   steps=2, lr=1e-7, trajectories=1, trajectory_steps=2, picture_size=64,
                                   preview_every=0)  # fmt: skip
    graph |= shown(["edit", 0], "edit") | shown(["train", 0], "train")
    reports = {"u": "u", "both": "edit"}
    for name, model in reports.items():
        graph[f"report {name}"] = with_defaults(info, "RealEra_Report", model=[model, 0], clip=["loader", 1], vae=["loader", 2],
                                                concepts=["concept", 0], pictures=1, sampling_steps=4,
                                                picture_size=64)  # fmt: skip
        graph[f"numbers {name}"] = node("PreviewAny", source=[f"report {name}", 2])
    graph["file"] = checkpoint(["train", 0], "checkpoints/tests-all")
    out = run(comfy, graph, 400)
    edit, train, alone = (pictures(comfy, o) for o in (out["edit save"], out["train save"], done["u save"]))
    assert np.abs(edit - train).max() <= SAME, "a LoRA that learned nothing stands on all edits before it"
    assert np.abs(edit - alone).max() > 10
    numbers = {name: json.loads(out[f"numbers {name}"]["text"][0]) for name in reports}
    assert numbers["u"]["picture_change"]["concept"] > 0.01
    assert numbers["u"]["value_drift"] == {}
    assert numbers["both"]["value_drift"]["concept"] > 0
    made = inspect_file(comfy.base / "output" / "checkpoints" / out["file"]["checkpoint"][0]["filename"])["erasure"]
    assert made["method"].startswith("esd-u; realera: closed-form")
    assert weights(comfy, graph, ["train", 0]) == base_hash


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("uce", {"guide": "art"}, "set to_anchor off"),
        ("uce", {"keys": False, "values": False}, "neither W_K nor W_V"),
        ("uce", {"templates": "a photo"}, "must hold {} once"),
        ("x", {"templates": ""}, "must hold {} once"),
        ("x", {"variant": "y"}, 'variant is "y"'),
        ("uce", {"tokens": "all"}, "choose one of last-subject"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(comfy, info, name, changes, sentence) -> None:
    graph = methods(info)
    graph[name]["inputs"] |= changes
    graph["look"] = node("PreviewAny", source=[name, 0])
    answer = httpx.post(f"{comfy.url}/prompt", json={"prompt": graph}, timeout=30)
    assert answer.status_code == 400
    errors = answer.json()["node_errors"][name]["errors"]
    assert any(sentence in e["details"] for e in errors), errors


def test_a_rate_that_is_too_high_is_told_in_a_sentence(comfy, info, base_hash) -> None:
    graph = methods(info)
    graph["wild"] = esd(info, "u", 1.0, eta=100.0, steps=200, preview_every=0)
    message = failure(comfy, graph | {"look": node("LossGraphNode", loss=["wild", 1], filename_prefix="tests-loss")})
    assert "the loss is not finite at step" in message["exception_message"]
    assert weights(comfy, methods(info), ["loader", 0]) == base_hash
