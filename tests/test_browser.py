"""The pack in ComfyUI's page: a real server, a real browser (playwright with Debian's chromium), an example workflow.

Environment:
    CHROMIUM             the browser, else ``chromium`` on the path
    COMFYUI_FRONTEND     a folder with another frontend to test with, such as ``comfyui_frontend_package/static`` of
                         ``pip download --no-deps comfyui-frontend-package``; without it the server's own
    COMFYUI_NODES_2      1: nodes rendered by Vue (newer frontends' "Nodes 2.0") instead of on the canvas
    REALERA_SCREENSHOTS  1: run the example with its own settings (minutes) and write docs/images/comfyui-*.png
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser_page import CONTRAST, FRONTEND, OPTIONS, PANEL, ComfyPage, opened, save_picture
from tests.conftest import PACK, ComfyServer, require_comfyui, served, with_pack

pytestmark = pytest.mark.browser

EXAMPLE = PACK / "example_workflows" / "1_erase_object.json"
SCREENSHOTS = os.environ.get("REALERA_SCREENSHOTS") == "1"
STEPS = 200 if SCREENSHOTS else 12
KINDS = ("RealEra_MineNeighbors", "RealEra_ClosedForm", "RealEra_TrainLora", "RealEra_Report")
MINE, EDIT, TRAIN, REPORT = KINDS
#: the example with everything as small as it goes
SMALL = {
    MINE: {"vocabulary": 64, "candidates": 8, "words": 4, "words_beyond": 4, "trajectories": 1, "trajectory_steps": 4},
    EDIT: {"prior": 0.0},
    TRAIN: {"steps": STEPS, "trajectories": 1, "trajectory_steps": 4, "preview_every": 0},
    REPORT: {"pictures": 1, "sampling_steps": 2},
    "KSampler": {"steps": 2},
    "EmptyLatentImage": {"batch_size": 1},
}
#: keeps what the training says while it runs
LISTEN = """() => { window.news = [];
    window.comfyAPI.api.api.addEventListener("realera.loss", ({ detail }) => window.news.push({ ...detail,
        state: document.querySelector(".realera-curve").closest("section").dataset.state })) }"""


@dataclass
class Run:
    """The page after a run of the example."""

    comfy: ComfyPage
    key: str
    outputs: dict[str, Any]  # by node type

    def panel(self, kind: str) -> Any:
        return self.comfy.panel(kind)


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    require_comfyui()
    base = tmp_path_factory.mktemp("comfyui-browser")
    environment = with_pack(base)
    if not SCREENSHOTS:  # which take the text states that the user's cache may have
        environment["XDG_CACHE_HOME"] = str(base / "cache")
    with served(base, environment, OPTIONS) as server:
        if FRONTEND:
            assert httpx.get(server.url, timeout=30).text == (Path(FRONTEND) / "index.html").read_text()
        yield server


@pytest.fixture(scope="module")
def page(comfy: ComfyServer) -> Iterator[ComfyPage]:
    """The page with the example in it, not queued yet."""
    with opened(comfy.url) as page:
        page.open()
        page.setting("Comfy.VueNodes.Enabled", os.environ.get("COMFYUI_NODES_2") == "1")
        page.load(json.loads(EXAMPLE.read_text()))
        page.set({REPORT: {"pictures": 2}} if SCREENSHOTS else SMALL)
        yield page


@pytest.fixture(scope="module")
def before(page: ComfyPage) -> dict[str, str]:
    """What the panels say before there are results, by node type."""
    return {kind: page.panel(kind).inner_text().strip() for kind in KINDS}


@pytest.fixture(scope="module")
def run(page: ComfyPage, before) -> Run:
    page.page.evaluate(LISTEN)
    key = page.queue()
    done = page.wait(key, 3600 if SCREENSHOTS else 900)
    assert done["status"]["status_str"] == "success", done["status"]
    kinds = {i: n["class_type"] for i, n in done["prompt"][2].items()}
    return Run(page, key, {kinds[i]: output for i, output in done["outputs"].items()})


def ready(panel: Any) -> None:
    """The panel shows results."""
    panel.wait_for_selector(".realera-empty", state="hidden")


def points_of(around: dict[str, Any]) -> int:
    return sum(len(places) for places in around["points"].values())


def test_the_scripts_are_served(comfy) -> None:
    listed = httpx.get(f"{comfy.url}/extensions", timeout=30).json()
    assert {Path(p).name for p in listed if "realera-nodes" in p} == {p.name for p in (PACK / "web").glob("*.js")}


def test_before_a_run_panels_say_what_will_come(before) -> None:
    assert {kind for kind, text in before.items() if text.startswith("Queue the graph")} == set(KINDS)
    assert len(set(before.values())) == len(KINDS)


def test_the_map_has_every_point(run: Run) -> None:
    around = run.outputs[MINE]["realera_map"][0]
    panel = run.panel(MINE)
    ready(panel)
    names = panel.eval_on_selector_all("[data-role]", "all => all.map((e) => [e.dataset.role, e.dataset.name])")
    assert len(names) == points_of(around)
    goes = {w["word"] for w in around["words"] if w["near"]}
    assert {name for role, name in names if role == "goes"} == goes
    assert {name for role, name in names if role == "preserved"} == set(around["preserved"])
    assert [around["concept"]] == [name for role, name in names if role == "concept"]


def test_no_two_labels_overlap(run: Run) -> None:
    panel = run.panel(MINE)
    ready(panel)
    boxes = panel.eval_on_selector_all(
        ".realera-label",
        "all => all.map((e) => { const b = e.getBBox(); return [b.x, b.y + 3, b.x + b.width, b.y + b.height - 3] })",
    )
    assert len(boxes) >= 4
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (a, b)


def test_the_words_are_listed(run: Run) -> None:
    told = run.outputs[MINE]["text"][0].splitlines()[0].split(": ", 1)[1]
    panel = run.panel(MINE)
    ready(panel)
    listed = panel.eval_on_selector_all(".realera-word", "all => all.map((e) => e.textContent)")
    assert (", ".join(listed) or "no word found") == told


@pytest.mark.parametrize("role", ["anchor", "preserved"])
def test_hovering_names_a_point(run: Run, role: str) -> None:
    panel = run.panel(MINE)
    ready(panel)
    mark = panel.query_selector(f'[data-role="{role}"]')
    box = mark.bounding_box()
    run.comfy.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = panel.wait_for_selector(".realera-tip", state="visible")
    assert tip.inner_text().startswith(mark.get_attribute("data-name"))
    plot = panel.query_selector(".realera-plot").bounding_box()
    inside = tip.bounding_box()
    assert plot["x"] <= inside["x"]
    assert inside["x"] + inside["width"] <= plot["x"] + plot["width"] + 1
    run.comfy.page.mouse.move(5, 5)
    panel.wait_for_selector(".realera-tip", state="hidden")


def test_the_map_grows_with_the_node(run: Run) -> None:
    panel = run.panel(MINE)
    ready(panel)
    wide = "e => e.querySelector('.realera-plot > svg').viewBox.baseVal.width"
    old = panel.evaluate(wide)
    resize = f"([kind, by]) => {{ const n = {PANEL}.node; n.setSize([n.size[0] + by, n.size[1]]); n.setDirtyCanvas(true, true) }}"
    run.comfy.page.evaluate(resize, [MINE, 120])
    run.comfy.page.wait_for_timeout(500)
    assert panel.evaluate(wide) == pytest.approx(old + 120, abs=3)
    run.comfy.page.evaluate(resize, [MINE, -120])
    run.comfy.page.wait_for_timeout(500)


def test_the_table_has_the_reports_numbers(run: Run) -> None:
    table = run.outputs[REPORT]["realera_report"][0]
    panel = run.panel(REPORT)
    ready(panel)
    shown = panel.eval_on_selector_all(
        "td[data-key]",
        "all => all.map((e) => [e.closest('tr').dataset.group, e.dataset.key, Number(e.dataset.value), e.innerText])",
    )
    told = {(g, k): v for k in ("picture_change", "value_drift", "embedding_residue") for g, v in table[k].items()}
    assert {(g, k): v for g, k, v, _ in shown} == told
    for _, _, value, text in shown:
        assert text.strip() == f"{100 * value:.1f}%"


def test_the_edits_words_are_readable(run: Run) -> None:
    panel = run.panel(EDIT)
    ready(panel)
    text = panel.inner_text()
    for part in ("erased", "airplane", "projections changed", "the concept", "unrelated prompts"):
        assert part in text
    assert panel.evaluate("e => e.querySelector('.realera-panel').scrollHeight <= e.clientHeight + 1"), "cut off"


def test_the_curve_has_every_step(run: Run) -> None:
    losses = run.outputs[TRAIN]["realera_loss"]
    panel = run.panel(TRAIN)
    ready(panel)
    line = panel.query_selector("polyline.realera-raw")
    assert len(losses) == STEPS == int(line.get_attribute("data-steps"))
    assert len(line.get_attribute("points").split()) == STEPS
    assert panel.query_selector("[data-state='done']")
    assert panel.inner_text().startswith(f"{STEPS} steps")


def test_the_curve_grows_while_it_trains(run: Run) -> None:
    news = run.comfy.page.evaluate("window.news")
    assert len(news) >= 2
    assert [n["start"] for n in news] == [sum(len(m["losses"]) for m in news[:i]) for i in range(len(news))]
    assert [loss for n in news for loss in n["losses"]] == run.outputs[TRAIN]["realera_loss"]
    assert {n["total"] for n in news} == {STEPS}
    assert {n["state"] for n in news[1:]} == {"live"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_from_their_ground(run: Run, theme: str) -> None:
    run.comfy.theme(theme)
    grounds = []
    for kind in KINDS:
        panel = run.panel(kind)
        ready(panel)
        back = panel.query_selector(".realera-panel")
        grounds.append(back.evaluate("e => getComputedStyle(e).backgroundColor"))
        for name in (".realera-label", ".realera-word", ".realera-entry", "td", "small", ".realera-aim th", ".realera-status b",
                     ".realera-status span", ".realera-axes text", ".realera-text > div"):  # fmt: skip
            for element in panel.query_selector_all(name):
                ratio = run.comfy.page.evaluate(CONTRAST, [element, back])
                assert ratio >= 4.5, (kind, name, element.text_content(), ratio)
    assert len(set(grounds)) == 1


def test_a_past_run_brings_its_results_back(run: Run) -> None:
    comfy = run.comfy
    if FRONTEND and httpx.get(f"{comfy.url}/api/jobs", timeout=30).status_code == 404:
        pytest.skip("this frontend reads past runs from /api/jobs, which this ComfyUI does not have yet")
    comfy.load(json.loads(EXAMPLE.read_text()))
    for kind in KINDS:
        assert comfy.panel(kind).inner_text().strip().startswith("Queue the graph")
    comfy.open(theme="dark")  # a reload
    comfy.open_past(run.key)
    for kind in KINDS:
        ready(comfy.panel(kind))
    assert len(comfy.panel(MINE).query_selector_all("[data-role]")) == points_of(run.outputs[MINE]["realera_map"][0])
    assert comfy.panel(TRAIN).query_selector("polyline.realera-raw").get_attribute("data-steps") == str(STEPS)


def test_results_are_no_part_of_a_saved_workflow(run: Run) -> None:
    saved = run.comfy.page.evaluate("JSON.stringify(window.app.graph.serialize())")
    assert "realera_map" not in saved
    assert "data-role" not in saved
    prompt = run.comfy.page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)")
    assert "realera_panel" not in prompt


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_pictures_of_the_nodes(run: Run, tmp_path: Path, theme: str) -> None:
    """Screenshots to look at; with REALERA_SCREENSHOTS the dark ones are the documentation's."""
    comfy = run.comfy
    folder = PACK / "docs" / "images" if SCREENSHOTS and theme == "dark" else tmp_path
    comfy.theme(theme)
    for name, kind in (("map", MINE), ("report", REPORT), ("training", TRAIN), ("edit", EDIT)):
        ready(comfy.panel(kind))
        if kind == REPORT:  # as one does to look at the pictures
            comfy.page.evaluate(f"(kind) => {{ const n = {PANEL}.node; n.setSize([n.size[0], 960]) }}", kind)
        save_picture(comfy.picture_of_node(kind), folder / f"comfyui-{name}.png")
        assert (folder / f"comfyui-{name}.png").stat().st_size < 400_000


def test_a_picture_of_the_whole_graph(run: Run, tmp_path: Path) -> None:
    run.comfy.theme("dark")
    path = (PACK / "docs" / "images" if SCREENSHOTS else tmp_path) / "comfyui-graph.png"
    save_picture(run.comfy.picture_of_graph(2400, 780), path)
    assert path.stat().st_size < 400_000


def test_a_stopped_training_says_so(run: Run) -> None:
    comfy = run.comfy
    comfy.set({TRAIN: {"steps": 5000, "seed": 1}})
    key = comfy.queue()
    panel = comfy.panel(TRAIN)
    panel.wait_for_selector("[data-state='live']", timeout=180_000)
    httpx.post(f"{comfy.url}/interrupt", timeout=30)
    comfy.wait(key, 120)
    panel.wait_for_selector("[data-state='stopped']")
    assert panel.inner_text().startswith("stopped at step ")
    comfy.set({TRAIN: {"steps": STEPS, "seed": 0}})


def test_nothing_of_ours_complains(run: Run) -> None:
    assert run.comfy.complaints == []
