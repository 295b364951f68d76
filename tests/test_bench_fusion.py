"""The fusion benchmark's two sides compute the same. No time is tested."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from realera_nodes.bench.speed import fusion
from realera_nodes.bench.speed.__main__ import app
from realera_nodes.bench.speed.closed_form import Geometry, weight
from realera_nodes.bench.speed.fusion import FusionCase
from realera_nodes.bench.speed.measure import Clock
from realera_nodes.bench.speed.plain import FORMS, kept_bytes, plain_fusion

TINY = Geometry("tiny", 24, (8, 8, 16, 16))


@pytest.mark.parametrize("form", FORMS)
def test_plain_formula_in_float64_gives_our_weights(form: str) -> None:
    case = FusionCase(TINY, 5, prompts=2)
    start, kept = fusion.refinement(case), fusion.prior(case)
    fused = fusion.our_fusion(case, start, kept, Clock())
    weights = [weight(case, i).double() for i in range(4)]
    refined = [w + start.delta(w) for w in weights]
    names = list(case.shapes)
    loras = [[tuple(x.double() for x in fusion.concept_lora(case, i)[n]) for n in names] for i in range(5)]
    states = [fusion.concept_states(case, i).double() for i in range(5)]
    assert sum(s.shape[:2].numel() for s in states) == case.rows == 5 * 2 * 77
    found = plain_fusion(weights, refined, loras, states, kept, form, Clock())
    for name, w, new in zip(names, weights, found, strict=True):
        wanted = fused.delta(name, w)
        assert float(wanted.norm()) > 0.05 * float(w.norm())
        assert float((new - w - wanted).norm()) < 1e-6 * float(wanted.norm())  # our factors are float32


def test_the_benchmark_runs_and_both_sides_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "in_fresh_process", lambda function, *args: function(*args))
    text = io.StringIO()
    found = fusion.run(TINY, [1, 3], 1, 5, Console(file=text, width=200), prompts=2)
    assert [row["loras"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert row["rows"] == row["loras"] * 2 * 77
        assert set(row["ours"]["stages"]) == {"add", "solve", "apply"}
        assert max(row[form]["difference"] for form in FORMS) < 1e-4
    assert "3 LoRAs: " in text.getvalue()
    assert "MB a LoRA" in text.getvalue()


def test_a_part_is_scaled_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(*args):
        *rest, clock = args
        clock.seconds.update(rows=2.0, inverse=3.0)
        return plain_fusion(*rest, Clock())

    monkeypatch.setattr(fusion, "plain_fusion", fixed)
    found = fusion.measure_plain(FusionCase(TINY, 10, prompts=2), 2, 2, "product")
    assert found["stages"] == pytest.approx({"rows": 2.0 * 2 * 5, "inverse": 3.0 * 2}, rel=0.2)  # half of the layers, by cost
    assert found["memory"] > kept_bytes(8 * 2 * 77, 24, TINY.outs, 1)


def test_an_unknown_model_is_explained() -> None:
    result = CliRunner().invoke(app, ["fusion", "--model", "sd3"])
    assert result.exit_code == 1
    assert "sd3" in result.output
