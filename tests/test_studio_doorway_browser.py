"""The WebUI tab's page in Chromium, over a studio that is opened by hand: what it shows of each phase, in both themes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from realera_nodes.studio.doorway import add_doorway
from tests.browser_page import CONTRAST, require_browser
from tests.test_studio_browser import BACKGROUND
from tests.test_studio_doorway import serving

pytestmark = pytest.mark.browser
#: as Gradio 3 and 4 say that they are dark; the colour is a theme's own
TAB = ('<body class="{theme}" style="margin:0; background:{color}"><div id="tab" hidden><iframe src="realera-studio/" '
       'loading="lazy" style="width:100%; height:85vh; border:0"></iframe></div>')  # fmt: skip
COLORS = {"light": "rgb(250, 245, 255)", "dark": "rgb(31, 12, 25)"}
INNER = '<body style="margin:0"><div class="gradio-container"><button>Look around</button>{query}</div>'


class Opened:
    """An opening that a test turns."""

    def __init__(self, url: str):
        self.sidecar = SimpleNamespace(url=url)
        self.now: dict[str, Any] = {}
        self.begun: list[bool] = []
        self.turn("idle", installed=False)

    def turn(self, phase: str, **more: Any) -> None:
        self.now = {
            "phase": phase,
            "seconds": 0,
            "error": "",
            "failed": "",
            "doing": "",
            "log": [],
            "installed": True,
            "allowed": True,
        }
        self.now |= more

    @property
    def ready(self) -> bool:
        return self.now["phase"] == "ready"

    def state(self) -> dict[str, Any]:
        return self.now

    def begin(self, anew: bool = False) -> None:
        self.begun.append(anew)
        self.turn("installing" if anew or not self.now["installed"] else "starting", installed=self.now["installed"] and not anew)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    start, path = require_browser()
    with start() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def host() -> Iterator[tuple[str, Opened]]:
    studio = FastAPI()

    @studio.get("/{path:path}")
    def page(path: str, q: str = "") -> HTMLResponse:
        return HTMLResponse(INNER.format(query=""))

    with serving(studio) as (inner, _):
        opened, app = Opened(inner + "/"), FastAPI()

        @app.get("/")
        def tab(theme: str = "light") -> HTMLResponse:
            return HTMLResponse(TAB.format(theme=theme, color=COLORS[theme]))

        add_doorway(app, opened, "Everybody can open it.")  # type: ignore[arg-type]
        with serving(app) as (url, _):
            yield url, opened


@contextmanager
def tab(chromium: Any, url: str, theme: str = "light", width: int = 1400) -> Iterator[tuple[Any, Any]]:
    """The page of the tab, and the frame in it."""
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{url}/?theme={theme}")
    page.evaluate("document.querySelector('#tab').hidden = false")
    frame = page.frame_locator("iframe").first
    frame.locator("#main").wait_for()
    yield page, frame
    page.close()
    assert wrong == []


def test_it_tells_what_happens_from_the_first_moment(chromium: Any, host: tuple[str, Opened]) -> None:
    url, opened = host
    with tab(chromium, url) as (_, frame):
        assert "some minutes, once" in frame.locator("#first").inner_text()
        assert "Everybody can open it." in frame.locator("#warning").inner_text()
        assert opened.begun == [], "only when it is asked for"
        frame.get_by_role("button", name="Open the studio").click()
        frame.locator("li.now", has_text="Install its packages").wait_for()
        assert opened.begun == [False]
        assert not frame.locator("#ask").is_visible()
        lines = ["Collecting gradio<6.18,>=6", "  Downloading gradio-6.17.3-py3-none-any.whl (32.3 MB)"]
        opened.turn("installing", installed=False, seconds=75, doing="package 1, downloading gradio, 32.3 MB", log=lines)
        frame.get_by_text("package 1, downloading gradio, 32.3 MB").wait_for()
        at = frame.locator("#clock").inner_text()
        assert re.fullmatch(r"1:\d\d", at), at
        frame.locator("#fold summary").click()
        assert "32.3 MB" in frame.locator("#log").inner_text()
        opened.turn("starting", seconds=3)
        frame.locator("li.now", has_text="Start it").wait_for()
        assert frame.locator("li.done").count() == 1
        assert re.fullmatch(r"1:\d\d", frame.locator("#clock").inner_text()), "of all of it"
        opened.turn("ready")
        studio = frame.frame_locator("#studio")
        studio.get_by_role("button", name="Look around").wait_for()
        frame.locator("#main").wait_for(state="hidden")
        assert "__theme=light" in frame.locator("#studio").get_attribute("src")
        opened.turn("ended", error="The studio ended: out of memory", failed="ready", log=["out of memory"])
        frame.get_by_text("out of memory").first.wait_for()
        assert not frame.locator("#studio").is_visible()
        frame.get_by_role("button", name="Try again").click()
        frame.locator("li.now", has_text="Start it").wait_for()


def test_a_failure_is_a_sentence_its_log_and_what_to_press(chromium: Any, host: tuple[str, Opened]) -> None:
    url, opened = host
    sentence = (
        "The studio's packages could not be installed (no <b>space</b> left): check the connection and the disk, then try again."
    )
    opened.turn("failed", error=sentence, failed="installing", installed=False, log=[f"line {i}" for i in range(40)])
    with tab(chromium, url) as (_, frame):
        assert frame.get_by_role("alert").inner_text() == sentence, "as it is, nothing of it is markup"
        assert frame.locator("#fold").evaluate("e => e.open")
        assert frame.get_by_text("line 39").is_visible(), "the last lines are the ones in view"
        assert not frame.locator("#anew").is_visible()
        frame.get_by_role("button", name="Try again").click()
        frame.locator("li.now").wait_for()
        assert not frame.get_by_role("alert").is_visible()
        opened.turn("failed", error="No module named 'typer'", failed="starting")
        frame.get_by_role("button", name="Install its packages anew").click()
        frame.locator("li.now", has_text="Install").wait_for()
        assert opened.begun == [False, True]


def test_the_tab_finds_what_is_going_on(chromium: Any, host: tuple[str, Opened]) -> None:
    url, opened = host
    opened.turn("starting", seconds=20)
    with tab(chromium, url) as (_, frame):
        frame.locator("li.now", has_text="Start it").wait_for()
        assert re.fullmatch(r"0:2\d", frame.locator("#clock").inner_text())
        opened.turn("ready")
        frame.frame_locator("#studio").get_by_role("button").wait_for()
    with tab(chromium, url) as (_, frame):  # loaded again
        frame.frame_locator("#studio").get_by_role("button").wait_for()
        assert opened.begun == []


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_looks_like_the_webui_around_it(chromium: Any, host: tuple[str, Opened], theme: str, width: int) -> None:
    url, opened = host
    states: list[tuple[str, dict[str, Any]]] = [
        ("idle", {"installed": False}), ("installing", {"installed": False, "doing": "package 1, downloading gradio, 32.3 MB"}),
        ("failed", {"error": "It failed.", "log": ["a long line " * 40]}),
    ]  # fmt: skip
    with tab(chromium, url, theme, width) as (_, frame):
        for phase, more in states:
            opened.turn(phase, **more)
            shown = {"idle": "#first", "installing": "li.now span", "failed": "#sentence"}[phase]
            frame.locator(shown).first.wait_for()
            assert frame.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") == COLORS[theme]
            assert frame.locator("html").evaluate("e => e.scrollWidth") <= width
            for selector in (shown, "h1", ".lead", "button:visible", "#warning", "summary:visible", "pre:visible"):
                for element in frame.locator(selector).all():
                    handle = element.element_handle()
                    back = handle.evaluate_handle(BACKGROUND)
                    assert handle.evaluate(f"(e, b) => ({CONTRAST})([e, b])", back) >= 4.5, (phase, selector)
        opened.turn("ready")
        frame.frame_locator("#studio").get_by_role("button").wait_for()
        assert f"__theme={theme}" in frame.locator("#studio").get_attribute("src")


def test_the_webui_that_went_away_is_told(chromium: Any, host: tuple[str, Opened]) -> None:
    url, opened = host
    with tab(chromium, url) as (page, frame):
        page.route("**/realera-studio/state", lambda route: route.abort())
        frame.get_by_text("The WebUI does not answer").wait_for()
        page.unroute("**/realera-studio/state")
        opened.turn("starting")
        frame.locator("li.now", has_text="Start it").wait_for()
        assert not frame.get_by_role("alert").is_visible()
