"""The page's modules by themselves, in a browser without ComfyUI: numbers, labels, empty results, long and late trainings."""

from __future__ import annotations

import http.server
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import realera_nodes
from tests.browser_page import opened

WEB = Path(realera_nodes.__file__).parents[1] / "web"
THEMES = {
    "dark": {"--fg-color": "#fff", "--bg-color": "#202020", "--comfy-menu-bg": "#353535"},
    "light": {"--fg-color": "#222", "--bg-color": "#DDD", "--comfy-menu-bg": "#FFFFFF"},
}
#: a panel in a box as a node would have it, around a view
SHOW = """async ([file, maker, output, width, height]) => {
    const view = (await import(`/${file}`))[maker]();
    const inner = document.createElement("div");
    inner.className = "realera-panel";
    inner.append(view.element);
    const box = document.createElement("div");
    box.className = "realera";
    box.style.cssText = `width: ${width}px; height: ${height}px`;
    box.append(inner);
    document.body.replaceChildren(box);
    window.view = view;
    return view.show(output);
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing: requests are no news."""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page that can import the modules, with the pack's style and a dark theme."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(WEB)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with opened(f"http://127.0.0.1:{server.server_port}") as comfy:
            comfy.page.goto(f"{comfy.url}/docs/")
            comfy.page.set_content('<link rel="stylesheet" href="/realera.css"><body></body>')
            dress(comfy.page, "dark")
            yield comfy.page
    finally:
        server.shutdown()


def dress(page: Any, theme: str) -> None:
    for name, value in THEMES[theme].items():
        page.evaluate("([n, v]) => document.documentElement.style.setProperty(n, v)", [name, value])


def around(words: int, seed: int = 0, concept: str = "airplane") -> dict[str, Any]:
    """A map as the node sends it, with words close together."""
    draw = random.Random(seed)

    def cloud(count: int, spread: float) -> list[list[float]]:
        return [[round(draw.gauss(0, spread), 4), round(draw.gauss(0, spread), 4)] for _ in range(count)]

    return {
        "concept": concept, "anchor": "sky", "preserved": ["bird", "ship"],
        "points": {"concept": [[0, 0]], "anchor": [[6, -5]], "neighbors": cloud(10, 2), "beyond": cloud(30, 6),
                   "words": cloud(words, 3), "preserved": cloud(2, 5)},
        "words": [{"word": f"word number {i}"[: 4 + i % 12], "near": i % 3 > 0} for i in range(words)],
    }  # fmt: skip


def show(page: Any, file: str, maker: str, output: Any, width: int = 400, height: int = 520) -> bool:
    return page.evaluate(SHOW, [file, maker, output, width, height])


def test_helper_modules_do_nothing_when_they_are_loaded(page) -> None:
    """The host loads every script as an extension."""
    before = page.evaluate("document.documentElement.outerHTML")
    for path in sorted(WEB.glob("*.js")):
        if path.name != "realera.js":  # the extension itself, which needs the host
            page.evaluate("(name) => import(`/${name}`).then(() => true)", path.name)
    assert page.evaluate("document.documentElement.outerHTML") == before


@pytest.mark.parametrize("words", [0, 1, 24, 40])
@pytest.mark.parametrize("width", [340, 700])
def test_labels_keep_off_each_other_and_in_the_map(page, words: int, width: int) -> None:
    assert show(page, "map.js", "neighborMap", {"realera_map": [around(words, words)]}, width)
    assert page.locator("[data-role]").count() == 44 + words
    boxes = page.eval_on_selector_all(
        ".realera-label", "all => all.map((e) => e.getBBox()).map((b) => [b.x, b.y + 3, b.x + b.width, b.y + b.height - 3])"
    )
    inner = page.evaluate("document.querySelector('.realera-plot').clientWidth")
    assert len(boxes) >= min(4, 2 + words)
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= inner + 1
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_concept_and_anchor_are_always_named(page) -> None:
    for seed in range(5):
        show(page, "map.js", "neighborMap", {"realera_map": [around(60, seed)]}, 340)
        named = page.eval_on_selector_all(".realera-label", "all => all.map((e) => e.textContent)")
        assert {"airplane", "sky"} <= set(named)


def test_points_that_all_coincide_are_drawn(page) -> None:
    flat = around(3)
    flat["points"] = {role: [[1.5, -2.0]] * len(places) for role, places in flat["points"].items()}
    assert show(page, "map.js", "neighborMap", {"realera_map": [flat]})
    assert "NaN" not in page.evaluate("document.querySelector('.realera-plot').innerHTML")


def test_several_concepts_have_tabs(page) -> None:
    maps = [around(4, 1), around(7, 2, "cat")]
    show(page, "map.js", "neighborMap", {"realera_map": maps, "text": ["airplane: jet, plane\ncat: no word found"]})
    assert page.locator(".realera-word").all_text_contents() == ["jet", "plane"]
    page.get_by_role("tab", name="cat").click()
    assert page.locator("[data-role]").count() == 51
    assert page.locator(".realera-words").inner_text().endswith("no word found")
    assert page.locator("[aria-selected=true]").inner_text() == "cat"


def test_words_go_in_as_text(page) -> None:
    evil = around(2)
    evil["words"][1] = {"word": "<img src=x onerror=alert(1)>", "near": True}
    show(page, "map.js", "neighborMap", {"realera_map": [evil]})
    assert page.locator(".realera img").count() == 0
    assert page.locator(".realera-word").all_text_contents() == [evil["words"][1]["word"]]


@pytest.mark.parametrize(
    ("file", "maker"),
    [("map.js", "neighborMap"), ("loss.js", "lossCurve"), ("report.js", "reportTable"), ("text.js", "textBlock")],
)
@pytest.mark.parametrize("output", [None, {}, {"realera_map": [], "realera_loss": [], "realera_report": [], "text": [""]}])
def test_views_say_when_there_is_nothing_to_see(page, file: str, maker: str, output: Any) -> None:
    assert show(page, file, maker, output) is False


def test_running_means_are_exact(page) -> None:
    means = page.evaluate("async () => (await import('/loss.js')).smooth([4, 2, 6, 8, 5, 14, 1])")
    assert means == pytest.approx([4, 3, 4, 5, 5, 7, 34 / 5])


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [(0, 10, 5, [0, 2, 4, 6, 8, 10]), (0, 0.3, 3, [0, 0.1, 0.2, 0.3]), (0, 7, 2, [0, 5]), (0, 200, 4, [0, 50, 100, 150, 200])],
)
def test_ticks_are_round(page, low: float, high: float, count: int, expected: list[float]) -> None:
    assert page.evaluate("async (a) => (await import('/loss.js')).ticks(...a)", [low, high, count]) == expected


def test_a_curve_that_was_joined_late_starts_where_it_was_joined(page) -> None:
    show(page, "loss.js", "lossCurve", None)
    live = "(news) => window.view.live(news)"
    page.evaluate(live, {"start": 40, "losses": [1.0, 0.5], "total": 100})
    page.evaluate(live, {"start": 42, "losses": [0.25], "total": 100})
    assert page.locator(".realera-status").inner_text().startswith("step 43 of 100")
    line = page.locator("polyline.realera-raw")
    assert line.get_attribute("data-steps") == "3"
    right = page.evaluate("document.querySelector('.realera-plot').clientWidth")
    first = float(line.get_attribute("points").split(",")[0])
    assert first == pytest.approx(46 + 40 / 99 * (right - 58), abs=0.1)
    page.evaluate(live, {"start": 0, "losses": [2.0], "total": 50})  # another training
    assert page.locator(".realera-status").inner_text().startswith("step 1 of 50")
    page.evaluate("window.view.stop()")
    assert page.locator(".realera-status").inner_text().startswith("stopped at step 1 of 50")
    page.evaluate("window.view.show({ realera_loss: [3, 2, 1] }); window.view.stop()")
    assert page.locator(".realera-status").inner_text().startswith("3 steps")


def test_a_long_training_is_thinned_and_keeps_its_course(page) -> None:
    losses = [1 / (1 + i / 1000) for i in range(50_000)]
    show(page, "loss.js", "lossCurve", {"realera_loss": losses})
    line = page.locator("polyline.realera-raw")
    points = line.get_attribute("points").split()
    assert line.get_attribute("data-steps") == "50000"
    assert 1000 <= len(points) <= 2000
    heights = [float(p.split(",")[1]) for p in points]
    assert heights == sorted(heights), "a falling loss rises on the screen's downward axis"


def test_a_report_without_residue_has_no_column_for_it(page) -> None:
    table = {
        "picture_change": {"concept": 0.25, "unrelated": 0.004}, "value_drift": {"concept": 0.5}, "embedding_residue": {},
        "concepts": [{"concept": "cat", "anchor": "animal"}], "probes": [{"group": "concept", "label": "cat"}],
    }  # fmt: skip
    show(page, "report.js", "reportTable", {"realera_report": [table]})
    assert page.locator("thead th").count() == 3
    assert page.locator("td").all_inner_texts() == ["25.0%", "50.0%", "0.4%", "–"]
    assert page.locator(".realera-aim").all_inner_texts() == ["should change", "should stay"]


def test_a_damage_report_is_set_in_columns(page) -> None:
    text = "erased: cat -> animal\n32 projections changed\nvalues move by:\n  94.1% for the concept\n  4.9% for unrelated prompts"
    show(page, "text.js", "textBlock", {"text": [text]})
    assert page.locator(".realera-text b").all_text_contents() == ["erased", "values move by"]
    assert page.locator(".realera-share span:first-child").all_text_contents() == ["94.1%", "4.9%"]
