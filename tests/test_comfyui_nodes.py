"""The node pack in a real ComfyUI server: graphs through /prompt, files through the core's loaders, the same pictures."""

from __future__ import annotations

import json
import re

import httpx
import numpy as np
import pytest

from realera_nodes.demo import expand
from realera_nodes.formats.metadata import inspect_file
from tests.comfyui_graphs import PACK, chain, concept, drawn, loader, node, pictures, run, weights, with_defaults
from tests.http_graphs import fetch, queue, wait
from tests.node_names import DISPLAY

pytestmark = pytest.mark.comfyui

EXAMPLES = PACK / "example_workflows" / "api"
#: of 255, largest difference of pictures whose models are the same but for the order of sums
SAME = 2


def test_the_pack_loads_whole(comfy, info) -> None:
    assert {k: v["display_name"] for k, v in info.items() if k.startswith("RealEra_")} == DISPLAY
    assert {v["category"] for k, v in info.items() if k in DISPLAY} == {"model/erasure"}
    assert re.search(r"seconds: \S*realera-nodes", comfy.log.read_text())
    for kind in DISPLAY:
        for group in ("required", "optional"):
            for name, field in info[kind]["input"].get(group, {}).items():
                assert field[1].get("tooltip"), (kind, name)


def test_the_page_gets_docs_and_words(comfy) -> None:
    for kind, name in DISPLAY.items():
        page = httpx.get(f"{comfy.url}/extensions/realera-nodes/docs/{kind}.md", timeout=30)
        assert page.status_code == 200
        assert page.text.startswith(f"# {name}")
    words = httpx.get(f"{comfy.url}/i18n", timeout=30).json()["en"]["nodeDefs"]
    assert {k: words[k]["display_name"] for k in DISPLAY} == DISPLAY


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
    assert set(numbers["embedding_residue"]) == {"concept", "associated"}
    assert numbers["embedding_residue"]["concept"] < 0.5 < numbers["embedding_residue"]["associated"]
    assert out["report"]["realera_report"][0]["embedding_residue"] == numbers["embedding_residue"]
    assert "(residue):" in out["erase"]["text"][0]
    assert [p["group"] for p in numbers["probes"]][:3] == ["concept", "associated", "preserved"]
    assert pictures(comfy, out["report"]).shape[0] == 1
    assert inspect_file(comfy.base / "output" / "checkpoints" / out["checkpoint"]["checkpoint"][0]["filename"])["erasure"][
        "method"
    ]
    assert weights(comfy, graph, ["erase", 0]) == base_hash


def small(graph: dict[str, dict]) -> dict[str, dict]:
    """An example workflow with as little work in it as it goes."""
    less = {"candidates": 4, "words": 1, "vocabulary": 64, "prior": 0.0, "steps": 2, "trajectories": 1, "trajectory_steps": 2,
            "pictures": 1, "sampling_steps": 2, "preview_every": 0, "images": 1, "image_steps": 2, "contexts": 2}  # fmt: skip
    for part in graph.values():
        part["inputs"] |= {k: v for k, v in less.items() if not isinstance(part["inputs"].get(k, []), list)}
    return graph


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_the_api_examples_run(comfy, path) -> None:
    out = run(comfy, small(json.loads(path.read_text())))
    assert any("images" in o or "checkpoint" in o for o in out.values())
