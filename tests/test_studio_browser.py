"""The studio's page in Chromium, on the embedded model. REALERA_SCREENSHOTS=1 writes docs/images/studio-*.png as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.browser_page import CONTRAST, require_browser, save_picture
from tests.studio_server import Server, served
from tests.tiny import tiny_files

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SCREENSHOTS = os.environ.get("REALERA_SCREENSHOTS") == "1"
PATIENCE = int(os.environ.get("REALERA_PATIENCE", "900")) * 1000
#: as little as still erases
SMALL = "neighbors.candidates=60\nalignment.trajectories=1\nalignment.trajectory_steps=6"
#: the nearest element around one that paints a background
BACKGROUND = """e => {
  const clear = (x) => getComputedStyle(x).backgroundColor == "rgba(0, 0, 0, 0)";
  while (e && clear(e)) e = e.parentElement;
  return e ?? document.body;
}"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_browser()
    base = tmp_path_factory.mktemp("studio")
    for folder in ("models", "loras"):
        (base / folder).mkdir()
    (base / "models" / "old.ckpt").write_bytes(b"\x80\x02}q\x00." * 40)
    options = ["--models", str(base / "models"), "--export", f"loras={base / 'loras'}"]
    with served(base / "out", options, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    start, path = require_browser()
    with start() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tab(
    browser: Any, server: Server, theme: str = "light", width: int = 1280, query: str = "", wrong: list[str] | None = None
) -> Iterator[Any]:  # fmt: skip
    """A tab of a new user. What its scripts complain about and what it fetches from elsewhere fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong = [] if wrong is None else wrong
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:", "blob:", "ws:")) else wrong.append(r.url))
    page.goto(f"{server.url}?__theme={theme}{query}")
    page.locator("#concept").locator("textarea, input").wait_for()
    yield page
    wrong += page.locator("[data-testid=toast-body]").all_inner_texts()
    context.close()
    assert wrong == []


def fill(page: Any, name: str, value: str) -> None:
    field = page.locator(f"#{name}").locator("textarea, input").first
    field.fill(value)
    field.blur()


def example(page: Any, title: str) -> None:
    """Chooses an example and waits until it is in the form: what is clicked before that is about an empty one."""
    page.get_by_role("button", name=title).click()
    concept = title.partition(" → ")[0]
    page.wait_for_function(f"document.querySelector('#concept textarea, #concept input').value == '{concept}'")


def start(page: Any, steps: int, settings: str = SMALL) -> None:
    """The example with few steps."""
    example(page, "airplane → sky")
    page.get_by_role("button", name="Settings", exact=False).first.click()
    fill(page, "steps", str(steps))
    fill(page, "settings", settings)
    page.get_by_label("Pictures of each prompt").fill("1")
    page.get_by_label("Denoising steps").fill("8")
    page.get_by_label("Denoising steps").blur()


def shot(page: Any, name: str, top: str | None = None, height: int = 900) -> None:
    """A picture of the page from an element down."""
    if not SCREENSHOTS:
        return
    page.wait_for_timeout(1500)
    y = 0 if top is None else page.evaluate("(s) => document.querySelector(s).getBoundingClientRect().top + scrollY - 90", top)
    width = page.viewport_size["width"]
    save_picture(
        page.screenshot(full_page=True, clip={"x": 0, "y": max(0, y), "width": width, "height": height}),
        IMAGES / f"studio-{name}.png",
    )


def test_the_whole_flow_to_a_lora_that_diffusers_loads(chromium: Any, studio: Server, pipe: Any) -> None:
    with tab(chromium, studio) as page:
        shot(page, "start", height=760)
        start(page, 16 if SCREENSHOTS else 6)
        page.click("#look")
        page.wait_for_selector("#map .js-plotly-plot")
        page.wait_for_selector("#also input[type=checkbox]")
        assert page.locator("#also input[name='1:planes']").is_checked()
        shot(page, "around", "#look", 780)
        page.locator("#also input[name='1:aircraft']").uncheck()
        page.locator("#spare input[name='1:aircraft']").wait_for()
        assert page.locator("#spare input[name='1:aircraft']").is_checked(), "what is not erased with it is kept"
        page.click("#preview")
        page.wait_for_selector("#cards .card")
        first = page.locator("#cards .card").first
        assert "airplane" in first.inner_text()
        assert "seen as airplane → airplane" not in first.inner_text(), "it is gone already"
        shot(page, "preview", "#method", 830)
        knob = page.locator("#strength input[type=range]")
        knob.focus()
        for _ in range(20):
            page.keyboard.press("ArrowLeft")
        knob.dispatch_event("pointerup")
        page.wait_for_function("document.querySelector('#cards').innerText.includes('strength 0.')")
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        page.locator("#strength input[type=number]").fill("1")
        page.click("#erase-button")
        page.wait_for_selector("#status [role=progressbar]")
        page.wait_for_selector("#live img")
        page.wait_for_selector("#loss canvas, #loss svg")
        assert page.locator("#cancel").is_visible()
        if SCREENSHOTS:
            page.wait_for_function("document.querySelectorAll('#live figure').length > 3")
        shot(page, "training", "#erase-button", 640)
        page.wait_for_selector("#damage table")
        assert "Done" in page.inner_text("#status")
        assert "concept still seen" in page.inner_text("#damage")
        line = page.locator("#slider input[type=range]")
        line.focus()
        at = page.locator("#slider .compare").evaluate("e => getComputedStyle(e).getPropertyValue('--at')")
        page.keyboard.press("ArrowRight")
        assert page.locator("#slider .compare").evaluate("e => getComputedStyle(e).getPropertyValue('--at')") != at
        assert page.locator("#slider img").first.evaluate("i => i.complete && i.naturalWidth > 0")
        shot(page, "compare", "#prompt", 1150)
        page.locator("#prompt input").click()
        page.get_by_role("option", name="you keep it: bird").click()
        page.wait_for_function("document.querySelector('#slider').innerText.includes('bird')")
        name = "realera-demo-erased-edit-lora.safetensors"
        with page.expect_download() as download:
            page.locator("#files a", has_text=name).click()
        assert download.value.path().stat().st_size > 1_000_000
        page.locator("#copy-file input").click()
        page.get_by_role("option", name=name).click()
        page.click("#copy")
        page.wait_for_selector("#copied p")
        copied = Path(page.inner_text("#copied p").removeprefix("Copied to ").strip())
        assert copied.parent == studio.out.parent / "loras"
        page.get_by_role("tab", name="History").click()
        link = page.locator("#history a").first
        assert "airplane → sky" in link.inner_text()
        address = link.get_attribute("href")
    with tab(chromium, studio, "dark", 390, "&" + address.lstrip("?")) as page:  # another user opens it from the history
        page.wait_for_selector("#damage table")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shot(page, "phone", "#prompt", 1300)
    drawn = []
    for lora in (False, True):
        if lora:
            pipe.load_lora_weights(str(copied.parent), weight_name=copied.name)
        import torch

        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn.append(pipe("a photo of the airplane", latents=noise, num_inference_steps=8, guidance_scale=5, height=64, width=64,
                          output_type="pt").images)  # fmt: skip
    pipe.unload_lora_weights()
    assert (drawn[0] - drawn[1]).square().mean().sqrt() > 0.05


def test_a_run_outlives_its_tab_is_seen_by_others_and_can_be_cancelled(chromium: Any, studio: Server) -> None:
    with tab(chromium, studio) as page:
        start(page, 5000, "neighbors.words=0\nalignment.trajectories=1\nalignment.trajectory_steps=4")
        page.locator("#method label", has_text="Trained LoRA alone").click()
        page.click("#erase-button")
        page.wait_for_selector("#live img")
        page.reload()  # in the middle of it
        page.wait_for_selector("#status [role=progressbar]")
        page.wait_for_selector("#live img")
        assert page.locator("#concept").locator("textarea, input").input_value() == "airplane"
        with tab(chromium, studio) as other:
            other.wait_for_function("document.querySelector('#queue').innerText.includes('at work erasing: airplane')")
            assert "(yours)" not in other.inner_text("#queue")
            example(other, "apple → table")
            other.click("#look")
            other.wait_for_function("document.querySelector('#look-status').innerText.includes('1 run before it')")
            other.wait_for_function("document.querySelector('#queue').innerText.includes('apple → table (yours)')")
            shot(other, "queue", height=330)
            other.click("#look-cancel")
            other.wait_for_function("document.querySelector('#look-status').innerText.includes('Cancelled')")
        assert "(yours)" in page.inner_text("#queue")
        page.click("#cancel")
        page.wait_for_function("document.querySelector('#status').innerText.includes('Cancelled in')")
        assert page.locator("#resume").is_visible()
        assert not page.locator("#cancel").is_visible()
        page.wait_for_function("document.querySelector('#queue').innerText.includes('Nothing is at work')")
    assert not list(studio.out.glob("runs/*/files/*.safetensors")) or all(
        "lora" in p.name or "erased" in p.name for p in studio.out.glob("runs/*/files/*.safetensors")
    )


def test_bad_inputs_are_a_sentence_where_they_were_given(chromium: Any, studio: Server, tmp_path: Path) -> None:
    complaints: list[str] = []
    with tab(chromium, studio, wrong=complaints) as page:
        page.click("#look")
        page.wait_for_selector("#look-problem [role=alert]")
        assert "Nothing to erase was named" in page.inner_text("#look-problem")
        fill(page, "concept", "sky")
        fill(page, "anchor", "sky")
        page.click("#erase-button")
        page.wait_for_selector("#erase-problem [role=alert]")
        assert "both erased and the anchor" in page.inner_text("#erase-problem")
        fill(page, "anchor", "table")
        page.get_by_role("button", name="Settings", exact=False).first.click()
        fill(page, "settings", "alignment.lr=seven")
        page.click("#preview")
        page.wait_for_selector("#preview-problem [role=alert]")
        assert "alignment.lr must be float" in page.inner_text("#preview-problem")
        page.locator("#model input").click()
        page.get_by_role("option", name="old.ckpt").click()
        page.wait_for_selector("#form-note [role=alert]")
        assert "save as .safetensors" in page.inner_text("#form-note")
        page.get_by_role("button", name="Add a model").click()
        page.locator("#model input").blur()
        chosen = [tmp_path / "pickle.safetensors", tiny_files("sd1")[1]]
        chosen[0].write_bytes(b"\x80\x02}q\x00." * 400)
        sent = page.locator("input[type=file][accept*=safetensors]")
        with page.expect_response("**/upload*") as answer:
            sent.set_input_files(chosen[0])
        assert answer.value.status == 415
        sent.set_input_files(chosen[1])
        page.wait_for_function("document.querySelector('#form-note').innerText.includes('is among the models now')")
        page.wait_for_function("(name) => document.querySelector('#model input').value == name", arg=chosen[1].name)
        assert any("415" in c for c in complaints), complaints
        complaints.clear()
        page.locator("[data-testid=toast-close]").evaluate_all("all => all.forEach(b => b.click())")  # the refused upload's
        page.wait_for_function("!document.querySelector('[data-testid=toast-body]')")
    with tab(chromium, studio, query="&run=../../etc") as page:
        page.wait_for_selector("#form-note [role=alert]")
        assert "There is no run" in page.inner_text("#form-note")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_and_reached_by_keyboard(chromium: Any, studio: Server, theme: str, width: int) -> None:
    with tab(chromium, studio, theme, width) as page:
        page.wait_for_timeout(1000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if (theme, width) != ("light", 1280):
            shot(page, f"start-{theme}-{width}", height=860)
        for selector in (
            ".lead",
            "h1",
            "h2",
            ".hint",
            "#queue .queue",
            "#concept label span",
            "#look",
            "#kind label.selected span",
        ):
            element = page.locator(selector).first
            back = element.evaluate_handle(BACKGROUND)
            assert page.evaluate(CONTRAST, [element.element_handle(), back]) >= 4.5, selector
        page.locator("#concept").locator("textarea, input").focus()
        reached: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id ?? ''"))
        for name in ("anchor", "keep", "kind", "preset", "look", "method", "strength", "preview", "erase-button"):
            assert name in reached, name
