"""Pictures, plots and pages show words as they were written, whatever they would mean there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from realera_nodes import neighborhood
from realera_nodes.core.concepts import Concept
from realera_nodes.report.grid import before_after
from realera_nodes.report.report import literal, markdown
from realera_nodes.studio.charts import map_figure

ODD = [
    "a\nb",
    "$\\frac{$",
    "$x^2$",
    "<b>x</b>",
    "*x* _y_",
    "[a](b)",
    "# h",
    "| cell |",
    "`code`",
    "&amp;",
    "100% [/]",
    "\ufeff",
    "中文 \U0001f469\u200d\U0001f680",
]


@pytest.mark.parametrize("words", ODD)
def test_a_grid_takes_any_words(words: str) -> None:
    picture = torch.zeros(1, 3, 8, 8)
    assert before_after([("concept", words, words * 50, picture, picture)]).width > 100


@pytest.mark.parametrize("words", ODD)
def test_a_map_takes_any_words(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = torch.zeros(1, 2)
    at = dict.fromkeys(("concept", "anchor", "neighbors", "beyond", "words", "preserved"), point)
    monkeypatch.setattr(neighborhood, "project", lambda around: at)
    shown = words if words.strip("\ufeff") else "x"
    around = SimpleNamespace(
        concept=Concept(shown, "sky"), words=[words], preserved=[words], mined=SimpleNamespace(words=[words])
    )
    neighborhood.draw_map(around, tmp_path / "map.png")  # type: ignore[arg-type]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", ODD)
def test_a_page_escapes_what_means_something_there(words: str) -> None:
    found = literal(words)
    assert found.replace("\\", "") == words.replace("\\", "")
    for sign in "*_<>[]|`#$&":
        assert found.count(sign) == found.count("\\" + sign)
    table = {"before": {}, "after": {}, "picture_change": {}, "named_neighbors": {words: [words]}, "notes": [words]}
    page = markdown(f"Erased: {words}", table)
    assert page.startswith(f"# Erased: {found}\n")
    assert f"**{found}**: {found}." in page


def test_a_plot_in_the_studio_takes_tags_for_words() -> None:
    word = {"word": "<b>x</b> $y$", "near": True, "far": False, "response": 0.5, "cosine": 0.5}
    place = {
        "concept": "<i>c</i> $z$", "anchor": "a & b", "words": [word],
        "at": {r: [[0.0, 0.0]] for r in ("concept", "anchor", "neighbors", "beyond", "words", "preserved")},
    }  # fmt: skip
    figure = map_figure(place, set(), set())
    texts = [t for trace in figure.data for t in (trace.name or "", *(trace.text or ()))]
    assert "&lt;b&gt;x&lt;/b&gt; &#36;y&#36;" in texts
    assert "concept: &lt;i&gt;c&lt;/i&gt; &#36;z&#36;" in texts
    assert "anchor: a &amp; b" in texts
    assert not any("<b>x" in t or "<i>" in t or "$" in t for t in texts)
