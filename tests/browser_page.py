"""ComfyUI's page in a headless Chromium: load a workflow, queue it, look at nodes."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

#: another frontend than the server's own, and the server's options for it
FRONTEND = os.environ.get("COMFYUI_FRONTEND")
OPTIONS = ("--front-end-root", FRONTEND) if FRONTEND else ()
#: the pack's files in the page
OURS = "/extensions/realera-nodes/"
READY = "window.app?.extensionManager && window.app.graph && window.app.canvas && window.app.vueAppReady"
NODE = "window.app.graph.nodes.find((n) => n.comfyClass === kind)"
PANEL = f"{NODE}.widgets.find((w) => w.name === 'realera_panel')"
#: the page's store of past runs, which has no public name
PAST = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('queue')"
#: contrast of two colours by WCAG 2; browsers write mixed colours as "color(srgb r g b)"
CONTRAST = """([element, back]) => {
  const parts = (c) => c.match(/[\\d.]+/g).map(Number).map((v) => c.startsWith("color") ? v : v / 255);
  const light = (c) => { const [r, g, b] = parts(c).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const style = getComputedStyle(element);
  const [a, b] = [element instanceof SVGElement ? style.fill : style.color, getComputedStyle(back).backgroundColor].map(light);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def require_browser() -> tuple[Any, str]:
    """Playwright's entry and Chromium's path, or a loud skip."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("NO PLAYWRIGHT: pip install playwright, to run the browser tests")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("NO CHROMIUM: apt-get install chromium (or set CHROMIUM to its path), to run the browser tests")
    return sync_playwright, found


class ComfyPage:
    """The page, what its scripts complained about, and the messages of a training."""

    def __init__(self, page: Any, url: str):
        self.page, self.url = page, url
        self.complaints: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._note(error.stack or "", str(error)))
        page.on("response", lambda r: self._note(r.url if r.status >= 400 else "", f"{r.status} {r.url}"))

    def _note(self, where: str, what: str) -> None:
        if OURS in where:
            self.complaints.append(what)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self._note(message.location.get("url", "") + message.text, message.text)

    def open(self, theme: str = "dark") -> None:
        # without the dialog that greets new users, which lies over the graph
        httpx.post(f"{self.url}/settings", json={"Comfy.TutorialCompleted": True}, timeout=60).raise_for_status()
        self.page.goto(self.url, wait_until="commit", timeout=180_000)
        self.page.wait_for_function(READY, timeout=180_000)
        self.page.wait_for_timeout(2000)  # the page opens its last workflow after it is ready
        self.theme(theme)

    def setting(self, name: str, value: Any) -> None:
        self.page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])

    def theme(self, name: str) -> None:
        self.setting("Comfy.ColorPalette", name)
        self.page.wait_for_timeout(300)

    def load(self, workflow: dict[str, Any]) -> None:
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(1000)

    def set(self, values: dict[str, dict[str, Any]]) -> None:
        """Widgets' values by node type."""
        self.page.evaluate(
            """(values) => { for (const n of window.app.graph.nodes)
                               for (const [name, value] of Object.entries(values[n.comfyClass] ?? {}))
                                 n.widgets.find((w) => w.name === name).value = value; }""",
            values,
        )

    def queue(self) -> str:
        """Queues the graph as it is on the page; returns the run's id."""
        with self.page.expect_response(lambda r: r.url.endswith("/prompt") and r.request.method == "POST") as answer:
            self.page.evaluate("() => { window.app.queuePrompt(0) }")
        told = answer.value.json()
        assert told["node_errors"] == {}, told
        return told["prompt_id"]

    def wait(self, key: str, seconds: float) -> dict[str, Any]:
        """The history of a run. The page's own messages go on being handled meanwhile."""
        end = time.time() + seconds
        with httpx.Client(timeout=60) as client:
            while time.time() < end:
                history = client.get(f"{self.url}/history/{key}").json()
                if key in history:
                    self.page.wait_for_timeout(1000)
                    return history[key]
                self.page.wait_for_timeout(500)
        raise AssertionError(f"the graph did not finish in {seconds:.0f} s")

    def node_id(self, kind: str) -> str:
        return str(self.page.evaluate(f"(kind) => {NODE}.id", kind))

    def panel(self, kind: str) -> Any:
        """A handle of the panel in the node of a type, brought into view."""
        self.look_at(kind)
        return self.page.evaluate_handle(f"(kind) => {PANEL}.element", kind).as_element()

    def look_at(self, kind: str, scale: float = 1.0, top: int = 120) -> None:
        """Moves the canvas so that a node's panel is in view and no other node is above it."""
        self.page.evaluate(
            f"""([kind, scale, top]) => {{
                const [node, widget, canvas] = [{NODE}, {PANEL}, window.app.canvas];
                canvas.bringToFront(node);
                canvas.ds.scale = scale;
                canvas.ds.offset = [-node.pos[0] + 400 / scale, -node.pos[1] - (widget.y ?? 0) + top / scale];
                canvas.setDirty(true, true);
            }}""",
            [kind, scale, top],
        )
        self.page.wait_for_timeout(500)

    def picture_of_node(self, kind: str, scale: float = 1.5) -> bytes:
        """A screenshot of a node from a little above its panel to its end."""
        self.look_at(kind, scale)
        box = self.page.evaluate(
            f"""(kind) => {{
                const [node, ds] = [{NODE}, window.app.canvas.ds];
                const around = window.app.canvas.canvas.getBoundingClientRect();
                const panel = {PANEL}.element.getBoundingClientRect();
                const left = (node.pos[0] + ds.offset[0]) * ds.scale + around.x;
                const bottom = (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale + around.y;
                return {{ x: left - 12, y: panel.y - 80, width: node.size[0] * ds.scale + 24, height: bottom - panel.y + 92 }};
            }}""",
            kind,
        )
        box["height"] = min(box["height"], self.page.viewport_size["height"] - box["y"])
        return self.page.screenshot(clip=box)

    def picture_of_graph(self, width: int, height: int) -> bytes:
        """A screenshot of all nodes with their words, without the page's menus over them."""
        size = self.page.viewport_size
        left, top = 90, 90  # where the page has its side bar and its tabs
        self.page.set_viewport_size({"width": width + 2 * left, "height": height + 2 * top})
        for name, value in (("Comfy.Graph.CanvasMenu", False), ("Comfy.Minimap.Visible", False),
                            ("LiteGraph.Canvas.MinFontSizeForLOD", 0)):  # fmt: skip
            self.setting(name, value)
        self.page.wait_for_timeout(1000)
        self.page.evaluate(
            """([width, height, left, top]) => {
                const [canvas, nodes] = [window.app.canvas, window.app.graph.nodes];
                const around = canvas.canvas.getBoundingClientRect();
                const ends = (k) => [Math.min(...nodes.map((n) => n.pos[k] - 100 * k)),
                                     Math.max(...nodes.map((n) => n.pos[k] + n.size[k]))];
                const [[x0, x1], [y0, y1]] = [ends(0), ends(1)];
                const scale = Math.min((width - 30) / (x1 - x0), (height - 30) / (y1 - y0));
                canvas.ds.scale = scale;
                canvas.ds.offset = [(left - around.x + width / 2) / scale - (x0 + x1) / 2,
                                    (top - around.y + height / 2) / scale - (y0 + y1) / 2];
                canvas.deselectAll?.();
                canvas.setDirty(true, true);
            }""",
            [width, height, left, top],
        )
        self.page.wait_for_timeout(1500)
        png = self.page.screenshot(clip={"x": left, "y": top, "width": width, "height": height})
        self.page.set_viewport_size(size)
        return png

    def open_past(self, key: str) -> None:
        """Opens a past run, as a click on it in the queue does."""
        self.page.evaluate(
            f"""async (key) => {{
                const store = {PAST};
                await store.update();
                await store.historyTasks.find((t) => (t.promptId ?? t.jobId) === key).loadWorkflow(window.app);
            }}""",
            key,
        )
        self.page.wait_for_timeout(1000)


@contextmanager
def opened(url: str, width: int = 1700, height: int = 1250, scale: float = 1.0) -> Iterator[ComfyPage]:
    """A page of its own profile, before anything is loaded."""
    start, chromium = require_browser()
    with start() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.set_default_timeout(60_000)
            yield ComfyPage(page, url)
        finally:
            browser.close()


def save_picture(png: bytes, path: Path) -> None:
    """A screenshot with a palette, which is a third of the size and looks the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
