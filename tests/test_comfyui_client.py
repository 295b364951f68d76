"""The example client against a real server: an API graph queued, its progress told, its files fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from realera_nodes.formats.metadata import inspect_file
from tests.conftest import PACK, ComfyServer, require_comfyui, served, with_pack

pytestmark = pytest.mark.comfyui

CLIENT = PACK / "example_workflows" / "client.py"
#: the example with as little work in it as it goes
LESS = {"candidates": 4, "words": 1, "vocabulary": 64, "prior": 0.0, "steps": 3, "preview_every": 1}


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    require_comfyui()
    pytest.importorskip("websockets", reason="NO WEBSOCKETS: pip install websockets, to run the example client")
    base = tmp_path_factory.mktemp("comfyui-client")
    with served(base, with_pack(base) | {"XDG_CACHE_HOME": str(base / "cache")}) as server:
        yield server


def run(comfy: ComfyServer, graph: dict, folder: Path) -> subprocess.CompletedProcess[str]:
    """The client as a user starts it, with the graph in a file."""
    (folder / "graph.json").write_text(json.dumps(graph))
    command = [
        sys.executable,
        str(CLIENT),
        str(folder / "graph.json"),
        comfy.url.removeprefix("http://"),
        str(folder / "results"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture
def graph() -> dict:
    graph = json.loads((PACK / "example_workflows" / "api" / "2_erase_person_save_lora.json").read_text())
    for part in graph.values():
        part["inputs"] |= {k: v for k, v in LESS.items() if k in part["inputs"]}
    return graph


def test_progress_is_told_and_files_arrive(comfy, graph, tmp_path) -> None:
    done = run(comfy, graph, tmp_path)
    assert done.returncode == 0, done.stderr
    told = done.stdout.replace("\r", "\n").splitlines()
    for name in ("model", "erase", "lora", "erased pictures"):
        assert f"{name} ({graph[name]['class_type']})" in told
    assert "erase: 3/3" in [line.strip() for line in told]
    assert "erased sampler: 3/3" in [line.strip() for line in told]
    results = tmp_path / "results"
    assert {str(p) for p in results.iterdir()} <= set(told)
    found = inspect_file(results / "person_00001_.safetensors")
    assert (found["kind"], found["erasure"]["concepts"]) == ("LoRA", ("Mira Voss",))
    pictures = [Image.open(p) for p in sorted(results.glob("erased_*.png"))]
    assert [p.size for p in pictures] == [(64, 64)] * 4
    again = run(comfy, graph, tmp_path)  # all from the server's cache
    assert again.returncode == 0, again.stderr
    assert "erase (" not in again.stdout


def test_a_refused_graph_and_a_failing_one_are_told(comfy, graph, tmp_path) -> None:
    graph["erase"]["inputs"]["anchor"] = ""
    refused = run(comfy, graph, tmp_path)
    assert refused.returncode == 1
    assert "refused" in refused.stderr
    assert "write what it should become" in refused.stderr
    graph["erase"]["inputs"] |= {"anchor": "person", "phrase": "embedding:easynegative"}
    failed = run(comfy, graph, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("\nerase: ")
    assert "textual inversion" in failed.stderr
    assert not (tmp_path / "results").exists()
