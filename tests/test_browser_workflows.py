"""The example workflows in ComfyUI's page: each opens whole and sends to the server what its API form says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.browser_page import OPTIONS, ComfyPage, opened, require_browser
from tests.conftest import PACK, require_comfyui, served, with_pack
from tests.ui_graphs import structure

pytestmark = pytest.mark.browser

EXAMPLES = PACK / "example_workflows"
#: what the page makes of a loaded graph: types that it does not know, the prompt it would send, nodes as it would draw them
LOOK = """async () => ({
    unknown: app.graph.nodes.filter((n) => !n.isVirtualNode && !LiteGraph.registered_node_types[n.type]).map((n) => n.type),
    red: app.graph.nodes.filter((n) => n.has_errors).map((n) => n.type),
    prompt: (await app.graphToPrompt()).output,
    sizes: Object.fromEntries(app.graph.nodes.map((n) => [n.id, [...n.size]])),
    values: Object.fromEntries(app.graph.serialize().nodes.map((n) => [n.id, n.widgets_values ?? []])),
    dialogs: [...document.querySelectorAll(".p-dialog")].map((d) => d.textContent),
})"""
#: the template browser's cards have their pictures, of which the page keeps copies under addresses of its own
THUMBNAILS = "(wanted) => [...document.images].filter((i) => i.naturalWidth === 512).length === wanted"
#: what the second example saves and the third one loads
LORA = "person_00001_.safetensors"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyPage]:
    require_comfyui()
    require_browser()
    base = tmp_path_factory.mktemp("comfyui-workflows")
    (base / "models" / "loras").mkdir(parents=True)
    (base / "models" / "loras" / LORA).touch()
    with served(base, with_pack(base), OPTIONS) as server, opened(server.url) as page:
        page.open()
        yield page


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_an_example_opens_whole(page, path) -> None:
    drawn = json.loads(path.read_text(encoding="utf-8"))
    page.load(drawn)
    found = page.page.evaluate(LOOK)
    assert (found["unknown"], found["red"], found["dialogs"]) == ([], [], [])
    assert structure(found["prompt"]) == structure(json.loads((EXAMPLES / "api" / path.name).read_text(encoding="utf-8")))
    for node in drawn["nodes"]:
        # saved again, nothing changes; and no node opens larger than it is drawn, over its neighbour
        assert found["values"][str(node["id"])] == node["widgets_values"], node["type"]
        assert found["sizes"][str(node["id"])] == pytest.approx(node["size"], abs=4), node["type"]
    assert page.complaints == []


def test_the_template_browser_shows_them(page) -> None:
    got = page.page.evaluate("async () => (await fetch('/api/workflow_templates')).json()")
    assert sorted(got["realera-nodes"]) == sorted(p.stem for p in EXAMPLES.glob("*.json"))
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_text("realera-nodes", exact=True).first.click()
    page.page.wait_for_function(THUMBNAILS, arg=len(got["realera-nodes"]))
    page.page.keyboard.press("Escape")
