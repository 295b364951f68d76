"""The nodes for many concepts in a real ComfyUI server: refine, suppress, fuse, priors, and all of it in one node."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np
import pytest

from realera_nodes.formats.metadata import inspect_file
from tests.comfyui_graphs import concept, drawn, failure, loader, node, pictures, run, weights, with_defaults
from tests.conftest import ComfyServer
from tests.http_graphs import queue, wait

pytestmark = pytest.mark.comfyui

#: of 255, largest difference of pictures whose models are the same but for the order of sums
SAME = 2
CAPTIONS = "a man rides a bike down the street\na bowl of fruit on a table\ntwo people sit on a bench"
SMALL = {"paper_settings": False, "contexts": 2, "lambda_3": 1.0}
TRAIN = {"paper_settings": False, "steps": 4, "lr": 5e-3, "images": 2, "image_steps": 3, "picture_size": 64, "preview_every": 2}


def mass(info: dict[str, Any], folder: str = "", loras: bool = True) -> dict[str, dict]:
    """Two concepts through prior, refinement, a LoRA each, and fusion."""
    base = {"model": ["loader", 0], "clip": ["loader", 1]}
    refined = {"model": ["refine", 0], "clip": ["loader", 1]}
    kinds = {"prior": "RealEra_BuildPrior", "refine": "RealEra_Refinement", "fuse": "RealEra_FuseLoras"}
    first = with_defaults(info, "RealEra_TrainSuppression", **refined, concept=["first", 0], vae=["loader", 2], **TRAIN)
    second = with_defaults(
        info, "RealEra_TrainSuppression", **refined, concept=["second", 0], loras=["train first", 2], **TRAIN
    )  # fmt: skip
    both = {"loras": ["train second", 2]} if loras else {}
    return {
        "loader": loader(),
        "first": concept(preserve="", templates=""),  # a file says a concept's kind, not its own templates
        "second": concept("apple", "table", preserve="", templates=""),
        "both": concept("apple", "table", preserve="", templates="", concepts=["first", 0]),
        "prior": with_defaults(
            info, kinds["prior"], **base, concepts=["both", 0], retained="bird", kind="object", contexts=2, captions=CAPTIONS
        ),
        "refine": with_defaults(info, kinds["refine"], **base, concepts=["both", 0], prior=["prior", 0], **SMALL),
        "train first": first,
        "train second": second,
        "fuse": with_defaults(info, kinds["fuse"], **refined, **both, folder=folder, prior=["prior", 0], **SMALL),
    }


@pytest.fixture(scope="module")
def fused(comfy, info) -> dict[str, Any]:
    graph = mass(info) | drawn(["fuse", 0])
    for name, source in (("one", ["train first", 1]), ("two", ["train second", 1]), ("whole", ["fuse", 1])):
        folder = "fused/" if name == "whole" else "pair/"
        graph[f"lora {name}"] = node(
            "RealEra_SaveLora", lora=source, filename_prefix=f"loras/{folder}{name}", precision="float32"
        )  # fmt: skip
    graph["prior file"] = node("RealEra_SavePrior", prior=["prior", 0], filename_prefix="priors/tests")
    return run(comfy, graph)


def test_the_chain_erases_and_leaves_the_base_alone(comfy, info, fused, base_hash) -> None:
    assert "1 retained" in fused["prior"]["text"][0]
    assert "no caption holds" in fused["prior"]["text"][0]
    assert fused["train first"]["text"][0].startswith("airplane: 4 steps")
    assert len(fused["train second"]["realera_loss"]) == 4
    assert fused["fuse"]["text"][0].startswith("2 LoRAs fused by closed form")
    base = pictures(comfy, run(comfy, mass(info) | drawn(["loader", 0]))["save"])
    assert np.abs(base - pictures(comfy, fused["save"])).max() > 10
    for name in ("refine", "train first", "train second", "fuse"):
        assert weights(comfy, mass(info), [name, 0]) == base_hash, name


def test_a_second_queue_is_served_from_the_cache(comfy, info, fused) -> None:
    done = wait(comfy.url, queue(comfy.url, mass(info) | {"look": node("PreviewAny", source=["fuse", 2])}))
    cached = next(m[1]["nodes"] for m in done["status"]["messages"] if m[0] == "execution_cached")
    assert {"prior", "refine", "train first", "train second", "fuse"} <= set(cached)


def test_files_in_a_folder_fuse_as_sockets_do(comfy, info, fused) -> None:
    found = inspect_file(comfy.base / "output" / "loras" / "pair" / fused["lora one"]["lora"][0]["filename"])
    assert found["erasure"]["concepts"] == ("airplane",)
    assert found["erasure"]["kinds"] == ("object",)
    graph = mass(info, folder="pair", loras=False)
    again = run(comfy, graph | drawn(["fuse", 0]))
    assert again["fuse"]["text"][0].startswith("2 LoRAs fused")
    assert np.abs(pictures(comfy, again["save"]) - pictures(comfy, fused["save"])).max() <= SAME


def test_the_fused_lora_is_the_fused_model(comfy, info, fused) -> None:
    item = fused["lora whole"]["lora"][0]
    name = f"fused/{item['filename']}"
    assert name in httpx.get(f"{comfy.url}/models/loras", timeout=30).json()
    graph = mass(info) | {"loaded": node("LoraLoaderModelOnly", model=["loader", 0], lora_name=name, strength_model=1.0)}
    again = pictures(comfy, run(comfy, graph | drawn(["loaded", 0]))["save"])
    assert np.abs(again - pictures(comfy, fused["save"])).max() <= SAME


def test_one_file_at_a_time_is_listed_and_fused(comfy, info, fused) -> None:
    names = [f"pair/{fused[f'lora {n}']['lora'][0]['filename']}" for n in ("one", "two")]
    assert set(names) <= set(comfy_options(comfy, "RealEra_AddLora", "file"))
    graph = mass(info, loras=False)
    graph["add one"] = node("RealEra_AddLora", file=names[0])
    graph["add two"] = node("RealEra_AddLora", file=names[1], concept=["second", 0], loras=["add one", 0])
    graph["fuse"]["inputs"]["loras"] = ["add two", 0]
    again = pictures(comfy, run(comfy, graph | drawn(["fuse", 0]))["save"])
    assert np.abs(again - pictures(comfy, fused["save"])).max() <= SAME


def test_a_saved_prior_is_the_one_that_was_built(comfy, info, fused) -> None:
    name = fused["prior file"]["prior"][0]["filename"]
    assert name in comfy_options(comfy, "RealEra_LoadPrior", "file")
    graph = mass(info)
    edited = {"a": ["prior", 0], "b": ["stored", 0]}
    graph["stored"] = node("RealEra_LoadPrior", file=name)
    for key, prior in edited.items():
        graph[key] = node("RealEra_Refinement", **(graph["refine"]["inputs"] | {"prior": prior}))
    first, second = (pictures(comfy, run(comfy, graph | drawn([key, 0]))["save"]) for key in edited)
    assert np.array_equal(first, second)


def comfy_options(comfy: ComfyServer, kind: str, name: str) -> list[str]:
    field = httpx.get(f"{comfy.url}/object_info/{kind}", timeout=30).json()[kind]["input"]["required"][name]
    return field[1]["options"] if field[0] == "COMBO" else field[0]


def many(info: dict[str, Any], **changes: Any) -> dict[str, dict]:
    given = (
        TRAIN
        | SMALL
        | {
            "list": "airplane -> sky\napple -> table\nfrog -> pond",
            "retained": "bird",
            "preview_every": 0,
            "lambda_2": 0.0,
            "mu": 1.0,
        }
    )
    inputs = {"model": ["loader", 0], "clip": ["loader", 1], **given, **changes}
    return {"loader": loader(), "many": with_defaults(info, "RealEra_EraseMany", **inputs)}


def test_a_stopped_run_of_many_goes_on_with_what_is_missing(comfy, info, base_hash) -> None:
    graph = many(info, steps=40)
    key = queue(comfy.url, graph | {"look": node("PreviewAny", source=["many", 2])})
    cache = comfy.base / "cache" / "realera-nodes" / "concepts"
    end = time.time() + 150
    while time.time() < end and not list(cache.glob("airplane-*.safetensors")):
        time.sleep(0.05)
    httpx.post(f"{comfy.url}/interrupt", timeout=30)
    done = wait(comfy.url, key, 60)
    assert done["status"]["messages"][-1][0] == "execution_interrupted"
    finished = sorted(cache.glob("*.safetensors"))
    assert 1 <= len(finished) < 3
    kept = {p: p.stat().st_mtime_ns for p in finished}
    assert weights(comfy, graph, ["loader", 0]) == base_hash

    out = run(comfy, graph | drawn(["many", 0]))
    assert f"3 concepts by mace, {len(finished)} of their LoRAs found finished" in out["many"]["text"][0]
    assert {p: p.stat().st_mtime_ns for p in finished} == kept
    assert len(list(cache.glob("*.safetensors"))) == 3
    assert not list(cache.glob(".*"))
    assert weights(comfy, graph, ["many", 0]) == base_hash
    base = pictures(comfy, run(comfy, graph | drawn(["loader", 0]))["save"])
    assert np.abs(base - pictures(comfy, out["save"])).max() > 10

    sums = many(info, steps=40, fusion="sum")  # another fusion of the same LoRAs: nothing is trained
    again = run(comfy, sums | {"look": node("PreviewAny", source=["many", 2])})
    assert "3 of their LoRAs found finished" in again["many"]["text"][0]


def test_realera_mass_runs_in_the_host(comfy, info, base_hash) -> None:
    graph = many(
        info,
        method="realera-mass",
        list="airplane -> sky\napple -> table",
        alignment_steps=2,
        words=1,
        candidates=4,
        vocabulary=64,
    )
    out = run(comfy, graph | drawn(["many", 0]))
    assert "2 concepts by realera-mass, 0 of their LoRAs" in out["many"]["text"][0]
    assert weights(comfy, graph, ["many", 0]) == base_hash


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"list": "airplane"}, "says no anchor"),
        ({"list": "airplane -> sky\nairplane -> sea"}, "airplane"),
        ({"retained": "Airplane"}, "both erased and retained"),
        ({"targets": " , "}, "targets is empty"),
        ({"t1": 500.0}, "t1 must be below t2"),
    ],
)
def test_bad_lists_are_refused_before_anything_runs(comfy, info, changes, sentence) -> None:
    graph = many(info, **changes) | {"look": node("PreviewAny", source=["many", 2])}
    answer = httpx.post(f"{comfy.url}/prompt", json={"prompt": graph}, timeout=30)
    assert answer.status_code == 400
    errors = answer.json()["node_errors"]["many"]["errors"]
    assert any(sentence in e["details"] for e in errors), errors


@pytest.mark.parametrize(
    ("at", "changes", "sentence"),
    [
        ("train first", {"concept": ["both", 0]}, "connect one to each node"),
        ("train second", {"model": ["train first", 0]}, "carries another concept's LoRA"),
        ("fuse", {"model": ["train first", 0]}, "carries other edits"),
        ("fuse", {"loras": None}, "no LoRA to fuse"),
        ("fuse", {"folder": "../../checkpoints"}, "no folder with LoRA files"),
        ("fuse", {"folder": "pair"}, "airplane"),  # the same concept twice
        ("fuse", {"retained": "apple"}, "both erased and retained"),
    ],
)
def test_wrong_wiring_is_answered_in_one_sentence(comfy, info, fused, at, changes, sentence) -> None:
    graph = mass(info)
    graph[at]["inputs"] = {k: v for k, v in (graph[at]["inputs"] | changes).items() if v is not None}
    message = failure(comfy, graph | {"look": node("PreviewAny", source=["fuse", 2])})
    assert message["node_id"] == at
    assert sentence in message["exception_message"]
    assert "\n" not in message["exception_message"].strip()


def test_a_prior_of_another_encoder_is_refused(comfy, info, fused) -> None:
    graph = mass(info) | {"skip": node("CLIPSetLastLayer", clip=["loader", 1], stop_at_clip_layer=-2)}
    graph["refine"]["inputs"]["clip"] = ["skip", 0]
    message = failure(comfy, graph | {"look": node("PreviewAny", source=["refine", 2])})
    assert "built for another text encoder" in message["exception_message"]


def test_empty_lists_and_foreign_loras_are_refused(comfy, info, fused) -> None:
    look = node("PreviewAny", source=["many", 2])
    assert "nothing to erase" in failure(comfy, many(info, list="") | {"look": look})["exception_message"]
    graph = mass(info, loras=False)
    graph["add"] = node("RealEra_AddLora", file="none")
    graph["fuse"]["inputs"]["loras"] = ["add", 0]
    message = failure(comfy, graph | {"look": node("PreviewAny", source=["fuse", 2])})
    assert "give one LoRA" in message["exception_message"]
