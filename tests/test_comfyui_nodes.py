"""The node pack in a real ComfyUI server: graphs through /prompt, files through the core's loaders, and weights that stay."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import platformdirs
import pytest
from PIL import Image

import realera_nodes
from realera_nodes.demo import expand
from realera_nodes.formats.metadata import inspect_file
from tests.conftest import ComfyServer, require_comfyui, served
from tests.http_graphs import fetch, queue, wait

pytestmark = pytest.mark.comfyui

PACK = Path(realera_nodes.__file__).parents[1]
EXAMPLES = PACK / "example_workflows" / "api"
NODES = {
    "RealEra_Concept": "Erasure Concept", "RealEra_MineNeighbors": "Mine Neighbor Concepts",
    "RealEra_ClosedForm": "Closed-Form Edit W_K/W_V", "RealEra_TrainLora": "Train Erasure LoRA",
    "RealEra_SaveLora": "Save Erasure LoRA", "RealEra_SaveCheckpoint": "Save Erased Checkpoint",
    "RealEra_Report": "Erasure Report", "RealEra_Erase": "Erase Concept (RealEra)",
}  # fmt: skip
#: of 255, largest difference of pictures whose models are the same but for the order of sums
SAME = 2
#: the tests' own nodes: the hash of a model's unpatched weights, a model that fails after some calls, a node's progress
PROBE = PACK / "tests" / "data" / "probe_nodes.py.txt"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the pack linked into custom_nodes, the tests' own nodes and the embedded checkpoint."""
    require_comfyui()
    base = tmp_path_factory.mktemp("comfyui-nodes")
    (base / "custom_nodes" / "tests-probe").mkdir(parents=True)
    (base / "custom_nodes" / "realera-nodes").symlink_to(PACK)
    (base / "custom_nodes" / "tests-probe" / "__init__.py").write_text(PROBE.read_text())
    # what ComfyUI-Manager would install from requirements.txt and ComfyUI itself does not need
    shutil.copytree(Path(platformdirs.__file__).parent, base / "packages" / "platformdirs")
    (base / "models" / "loras").mkdir(parents=True)
    with served(base, {"PYTHONPATH": str(base / "packages"), "XDG_CACHE_HOME": str(base / "cache")}) as server:
        yield server


def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def run(comfy: ComfyServer, graph: dict, seconds: float = 180) -> dict[str, Any]:
    """Queues a graph and returns its outputs by node."""
    done = wait(comfy.url, queue(comfy.url, graph), seconds)
    assert done["status"]["status_str"] == "success", (done["status"], comfy.log.read_text()[-3000:])
    return done["outputs"]


def failure(comfy: ComfyServer, graph: dict) -> dict[str, Any]:
    """Queues a graph that fails and returns the message of its failure."""
    done = wait(comfy.url, queue(comfy.url, graph))
    assert done["status"]["status_str"] == "error"
    return done["status"]["messages"][-1][1]


def pictures(comfy: ComfyServer, output: dict[str, Any]) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(fetch(comfy.url, i)))).astype(int) for i in output["images"]])


def loader(name: str = expand.CHECKPOINT) -> dict:
    return node("CheckpointLoaderSimple", ckpt_name=name)


def concept(phrase: str = "airplane", anchor: str = "sky", **more: Any) -> dict:
    return node("RealEra_Concept", **({"phrase": phrase, "anchor": anchor, "kind": "object", "aliases": "", "preserve": "bird: 2",
                                       "templates": "a photo of the {}"} | more))  # fmt: skip


def with_defaults(info: dict[str, Any], class_type: str, /, **inputs: Any) -> dict:
    """A node with the defaults of /object_info for what is not given."""
    fields = info[class_type]["input"]["required"]
    return node(class_type, **({n: f[1]["default"] for n, f in fields.items() if "default" in f[1]} | inputs))


@pytest.fixture(scope="module")
def info(comfy) -> dict[str, Any]:
    return httpx.get(f"{comfy.url}/object_info", timeout=60).json()


def drawn(model: list, prompt: str = "a photo of the airplane", steps: int = 8) -> dict[str, dict]:
    """Nodes that draw two pictures with a model; ends in "save"."""
    return {
        "positive": node("CLIPTextEncode", text=prompt, clip=["loader", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["loader", 1]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "sampler": node("KSampler", model=model, positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
                        seed=3, steps=steps, cfg=5.0, sampler_name="euler", scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="tests/x"),
    }  # fmt: skip


def chain(info: dict[str, Any]) -> dict[str, dict]:
    """Loader, concept, mining, closed form and training, all as small as they go.

    The server keeps results of nodes that are in the next graph too, wired up or not: with the chain in it, nothing runs twice.
    """
    return {
        "loader": loader(),
        "concept": concept(),
        "mine": with_defaults(info, "RealEra_MineNeighbors", model=["loader", 0], clip=["loader", 1], concepts=["concept", 0],
                              vocabulary=64, candidates=8, words=2, words_beyond=2, trajectories=1, trajectory_steps=4,
                              picture_size=64),
        "edit": with_defaults(info, "RealEra_ClosedForm", model=["loader", 0], neighbors=["mine", 0], prior=0.0),
        "train": with_defaults(info, "RealEra_TrainLora", model=["edit", 0], clip=["loader", 1], neighbors=["mine", 0],
                               vae=["loader", 2], steps=4, lr=1e-3, trajectories=1, trajectory_steps=4, picture_size=64,
                               preview_every=2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def base_hash(comfy) -> str:
    """The hash of the loaded weights before any of the pack's nodes has run."""
    return weights(comfy, {"loader": loader()}, ["loader", 0])


_salt = iter(range(10**6))


def weights(comfy: ComfyServer, graph: dict, after: list) -> str:
    """The hash of the base's weights once ``after`` has run; no hook may be left on the network either."""
    probe = node("Test_Hash", model=["loader", 0], after=after, salt=next(_salt))
    digest, hooks = run(comfy, graph | {"probe": probe})["probe"]["text"]
    assert hooks == "0"
    return digest


@pytest.fixture(scope="module")
def erased(comfy, info, base_hash) -> dict[str, Any]:
    """The chain's outputs, with pictures of the base and of the erased model, and both saved."""
    graph = chain(info) | drawn(["train", 0])
    graph |= {
        "before": graph["sampler"] | {"inputs": graph["sampler"]["inputs"] | {"model": ["loader", 0]}},
        "before decode": node("VAEDecode", samples=["before", 0], vae=["loader", 2]),
        "before save": node("SaveImage", images=["before decode", 0], filename_prefix="tests/before"),
        "lora": node("RealEra_SaveLora", lora=["train", 1], filename_prefix="loras/tests-lora", precision="float32"),
        "edit lora": node("RealEra_SaveLora", lora=["edit", 1], filename_prefix="loras/tests-edit", precision="float16"),
        "checkpoint": node("RealEra_SaveCheckpoint", model=["train", 0], clip=["loader", 1], vae=["loader", 2],
                           filename_prefix="checkpoints/tests"),
    }  # fmt: skip
    return run(comfy, graph)


def test_the_pack_loads_whole(comfy, info) -> None:
    assert {k: v["display_name"] for k, v in info.items() if k.startswith("RealEra_")} == NODES
    assert {v["category"] for k, v in info.items() if k in NODES} == {"model/erasure"}
    assert re.search(r"seconds: \S*realera-nodes", comfy.log.read_text())
    for kind in NODES:
        for group in ("required", "optional"):
            for name, field in info[kind]["input"].get(group, {}).items():
                assert field[1].get("tooltip"), (kind, name)


def test_the_page_gets_docs_and_words(comfy) -> None:
    for kind, name in NODES.items():
        page = httpx.get(f"{comfy.url}/extensions/realera-nodes/docs/{kind}.md", timeout=30)
        assert page.status_code == 200
        assert page.text.startswith(f"# {name}")
    words = httpx.get(f"{comfy.url}/i18n", timeout=30).json()["en"]["nodeDefs"]
    assert {k: words[k]["display_name"] for k in NODES} == NODES


def test_the_chain_erases_and_leaves_the_base_alone(comfy, info, erased, base_hash) -> None:
    assert "erased: airplane -> sky" in erased["edit"]["text"][0]
    assert erased["train"]["text"][0].startswith("4 steps")
    assert len(erased["train"]["realera_loss"]) == 4
    base = pictures(comfy, run(comfy, chain(info) | drawn(["loader", 0]))["save"])
    assert np.array_equal(base, pictures(comfy, erased["before save"]))
    assert np.abs(base - pictures(comfy, erased["save"])).max() > 10
    for name in ("mine", "edit", "train"):
        assert weights(comfy, chain(info), [name, 0]) == base_hash, name


def test_the_map_is_a_picture_and_plain_values(comfy, erased) -> None:
    assert pictures(comfy, erased["mine"]).shape[1:] == (640, 900, 3)
    around = erased["mine"]["realera_map"][0]
    assert (around["concept"], around["anchor"], around["preserved"]) == ("airplane", "sky", ["bird"])
    assert len(around["points"]["neighbors"]) == 10
    assert len(around["words"]) == len(around["points"]["words"]) == 8


def test_a_second_queue_is_served_from_the_cache(comfy, info, erased) -> None:
    graph = chain(info) | {"look": node("LossGraphNode", loss=["train", 2], filename_prefix="tests-loss")}
    done = wait(comfy.url, queue(comfy.url, graph))
    assert done["status"]["status_str"] == "success"
    cached = next(m[1]["nodes"] for m in done["status"]["messages"] if m[0] == "execution_cached")
    assert {"mine", "edit", "train"} <= set(cached)


def test_the_saved_lora_is_the_one_in_the_graph(comfy, info, erased) -> None:
    item = erased["lora"]["lora"][0]
    assert item["subfolder"] == "loras"
    assert item["filename"] in httpx.get(f"{comfy.url}/models/loras", timeout=30).json()
    assert fetch(comfy.url, item)[8:9] == b"{"
    found = inspect_file(comfy.base / "output" / "loras" / item["filename"])
    assert (found["kind"], found["architecture"], found["ranks"]) == ("LoRA", "sd1", [4])
    assert found["erasure"]["concepts"] == ("airplane",)
    assert found["erasure"]["anchors"] == ("sky",)
    assert found["erasure"]["base_name"] == expand.CHECKPOINT
    assert len(found["erasure"]["base_sha256"]) == 64
    assert json.loads(found["metadata"]["prompt"])["train"]["class_type"] == "RealEra_TrainLora"
    graph = chain(info)
    graph["loaded"] = node("LoraLoaderModelOnly", model=["edit", 0], lora_name=item["filename"], strength_model=1.0)
    again = pictures(comfy, run(comfy, graph | drawn(["loaded", 0]))["save"])
    assert np.abs(again - pictures(comfy, erased["save"])).max() <= SAME


def test_the_edits_lora_changes_the_pictures_as_the_edit_does(comfy, info, erased) -> None:
    name = erased["edit lora"]["lora"][0]["filename"]
    graph = chain(info) | {"loaded": node("LoraLoaderModelOnly", model=["loader", 0], lora_name=name, strength_model=1.0)}
    by_lora = pictures(comfy, run(comfy, graph | drawn(["loaded", 0]))["save"])
    by_patch = pictures(comfy, run(comfy, graph | drawn(["edit", 0]))["save"])
    base = pictures(comfy, erased["before save"])
    assert np.abs(by_lora - by_patch).mean() < 0.2 * np.abs(base - by_patch).mean()


def test_the_saved_checkpoint_reloads_as_the_model_in_the_graph(comfy, info, erased) -> None:
    item = erased["checkpoint"]["checkpoint"][0]
    assert item["filename"] in httpx.get(f"{comfy.url}/models/checkpoints", timeout=30).json()
    found = inspect_file(comfy.base / "output" / "checkpoints" / item["filename"])
    assert (found["kind"], found["erasure"]["concepts"]) == ("checkpoint", ("airplane",))
    assert set(found["erasure"]["config"]) == {"edits"}
    assert not list((comfy.base / "output" / "checkpoints").glob(".*"))
    graph = chain(info) | drawn(["saved", 0]) | {"saved": loader(item["filename"])}
    again = pictures(comfy, run(comfy, graph)["save"])
    assert np.abs(again - pictures(comfy, erased["save"])).max() <= SAME


def test_neighbors_of_another_model_are_refused(comfy, info, erased) -> None:
    graph = chain(info)
    graph["saved"] = loader(erased["checkpoint"]["checkpoint"][0]["filename"])
    graph["other"] = node("RealEra_ClosedForm", **(graph["edit"]["inputs"] | {"model": ["saved", 0]}))
    message = failure(comfy, graph | {"look": node("PreviewAny", source=["other", 2])})
    assert "mined for another model" in message["exception_message"]


def test_cancelling_stops_a_training_and_leaves_the_base_alone(comfy, info, erased, base_hash) -> None:
    graph = chain(info)
    graph["long"] = node("RealEra_TrainLora", **(graph["train"]["inputs"] | {"steps": 100000, "preview_every": 0}))
    key = queue(comfy.url, graph | {"look": node("LossGraphNode", loss=["long", 2], filename_prefix="tests-loss")})
    end, progress = time.time() + 120, {"value": 0, "max": 0}
    while time.time() < end and not (progress["max"] == 100000 and progress["value"] >= 3):
        time.sleep(0.1)
        progress = httpx.get(f"{comfy.url}/tests/progress/long", timeout=30).json()
    start = time.time()
    httpx.post(f"{comfy.url}/interrupt", timeout=30)
    done = wait(comfy.url, key, 30)
    assert time.time() - start < 5
    name, message = done["status"]["messages"][-1]
    assert (name, message["node_id"]) == ("execution_interrupted", "long")
    assert weights(comfy, chain(info), ["loader", 0]) == base_hash
    after = run(comfy, chain(info) | drawn(["loader", 0]))
    assert np.array_equal(pictures(comfy, after["save"]), pictures(comfy, erased["before save"]))


def test_an_error_inside_training_leaves_the_base_alone(comfy, info, erased, base_hash) -> None:
    graph = chain(info)
    # the anchor's run calls six layers twice in each of four steps; then training begins
    graph["broken"] = node("Test_Fail", model=["loader", 0], calls=70)
    graph["fails"] = node("RealEra_TrainLora", **(graph["train"]["inputs"] | {"model": ["broken", 0], "steps": 50}))
    message = failure(comfy, graph | {"look": node("LossGraphNode", loss=["fails", 2], filename_prefix="tests-loss")})
    assert (message["node_id"], message["exception_message"].strip()) == ("fails", "made to fail")
    assert any("align_noise" in line for line in message["traceback"])
    assert weights(comfy, chain(info), ["loader", 0]) == base_hash


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"phrase": " "}, "the concept to erase is empty"),
        ({"anchor": ""}, "is empty: write what it should become"),
        ({"anchor": "Airplane"}, "both erased and the anchor"),
        ({"preserve": "airplane"}, "both erased and preserved"),
        ({"kind": "smell"}, "unknown kind"),
        ({"templates": "a photo"}, "must hold {} once"),
    ],
)
def test_bad_concepts_are_refused_before_anything_runs(comfy, info, changes, sentence) -> None:
    graph = chain(info) | {"concept": concept(**changes)}
    answer = httpx.post(f"{comfy.url}/prompt", json={"prompt": graph}, timeout=30)
    assert answer.status_code == 400
    errors = answer.json()["node_errors"]["concept"]["errors"]
    assert any(sentence in e["details"] for e in errors), errors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"concept": concept("embedding:easynegative")}, "textual inversion"),
        ({"concept": concept("very " * 90 + "old airplane")}, "shorten it"),
        ({"edit": {"neighbors": None}}, "nothing to erase is connected"),
        ({"edit": {"neighbors": None, "concepts": ["concept", 0]}}, "connect CLIP"),
        ({"mine": {"m": 0, "n": 0, "words": 0}, "edit": {"ridge": 0.0}}, "raise ridge"),
        ({"train": {"targets": "attn7.to_k"}}, "choose other targets"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(comfy, info, changes, sentence) -> None:
    graph = chain(info) | {"look": node("LossGraphNode", loss=["train", 2], filename_prefix="tests-loss")}
    for name, change in changes.items():
        if "class_type" in change:
            graph[name] = change
        else:
            graph[name]["inputs"] = {k: v for k, v in (graph[name]["inputs"] | change).items() if v is not None}
    message = failure(comfy, graph)["exception_message"].strip()
    assert sentence in message
    assert "\n" not in message


def test_a_prefix_outside_the_output_folder_is_refused(comfy, info, erased) -> None:
    graph = chain(info) | {"lora": node("RealEra_SaveLora", lora=["train", 1], filename_prefix="../../x", precision="float16")}
    assert "inside the output folder" in failure(comfy, graph)["exception_message"]


def test_one_node_erases_and_the_report_shows_it(comfy, info, base_hash) -> None:
    graph = {
        "loader": loader(),
        "erase": with_defaults(info, "RealEra_Erase", model=["loader", 0], clip=["loader", 1], phrase="airplane", anchor="sky",
                               preserve="bird", words=0, prior=0.0, steps=2, lr=1e-3, picture_size=64, preview_every=1),
        "concept": concept(),
        "report": with_defaults(info, "RealEra_Report", model=["erase", 0], clip=["loader", 1], vae=["loader", 2],
                                concepts=["concept", 0], residue="runway", pictures=1, sampling_steps=4, picture_size=64),
        "checkpoint": node("RealEra_SaveCheckpoint", model=["erase", 0], clip=["loader", 1], vae=["loader", 2],
                           filename_prefix="checkpoints/all-in-one"),
        "numbers": node("PreviewAny", source=["report", 2]),
    }  # fmt: skip
    out = run(comfy, graph)
    assert "2 steps, loss" in out["erase"]["text"][0]
    numbers = json.loads(out["numbers"]["text"][0])
    assert numbers["picture_change"]["concept"] > 0.02
    assert numbers["value_drift"]["preserved"] < numbers["value_drift"]["concept"]
    assert [p["group"] for p in numbers["probes"]][:3] == ["concept", "associated", "preserved"]
    assert pictures(comfy, out["report"]).shape[0] == 1
    assert inspect_file(comfy.base / "output" / "checkpoints" / out["checkpoint"]["checkpoint"][0]["filename"])["erasure"][
        "method"
    ]
    assert weights(comfy, graph, ["erase", 0]) == base_hash


def small(graph: dict[str, dict]) -> dict[str, dict]:
    """An example workflow with as little work in it as it goes."""
    less = {"candidates": 4, "words": 1, "vocabulary": 64, "prior": 0.0, "steps": 2, "trajectories": 1, "trajectory_steps": 2,
            "pictures": 1, "sampling_steps": 2, "preview_every": 0}  # fmt: skip
    for part in graph.values():
        part["inputs"] |= {k: v for k, v in less.items() if k in part["inputs"]}
    return graph


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_the_api_examples_run(comfy, path) -> None:
    out = run(comfy, small(json.loads(path.read_text())))
    assert any("images" in o or "checkpoint" in o for o in out.values())
