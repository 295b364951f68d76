"""The speed benchmark measures what it says: its two sides compute the same. No time is tested."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from realera_nodes.bench.speed import closed_form, streaming, training
from realera_nodes.bench.speed.__main__ import app
from realera_nodes.bench.speed.closed_form import GEOMETRIES, Case, Geometry
from realera_nodes.bench.speed.measure import Clock, in_fresh_process, save
from realera_nodes.bench.speed.plain import FORMS, cost, plain_edit
from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.stream import SafetensorsFile

TINY = Geometry("tiny", 24, (8, 8, 16, 16))


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def broken() -> None:
    raise ValueError("broken on purpose")


def test_geometries_are_those_of_the_models() -> None:
    sd, xl = GEOMETRIES["sd14"], GEOMETRIES["sdxl"]
    assert (len(sd.outs), sum(sd.outs), sd.width) == (32, 24960, 768)
    assert (len(xl.outs), sum(xl.outs), xl.width) == (140, 166400, 2048)
    assert sd.part(32) == sd
    assert sd.spread(1) == [16]


@pytest.mark.parametrize("form", FORMS)
def test_plain_formula_in_float64_gives_our_weights(form: str) -> None:
    case = Case(TINY, 2, prompts=2, neighbors=3)
    rows = [list(closed_form.concept_rows(case, i)) for i in range(2)]
    assert sum(e.shape[:2].numel() for group in rows for e, _ in group) == case.rows == 2 * 2 * 4 * 75
    erased, targets = ([torch.cat([pair[k] for pair in group]).double() for group in rows] for k in (0, 1))
    transform = closed_form.our_transform(case, Clock())
    weights = [closed_form.weight(case, i).double() for i in range(4)]
    for w, new in zip(weights, plain_edit(weights, erased, targets, transform.mu, form, Clock()), strict=True):
        wanted = transform.delta(w)
        assert float(wanted.norm()) > 0.1 * float(w.norm())
        assert float((new - w - wanted).norm()) < 1e-9 * float(wanted.norm())


@pytest.mark.parametrize("form", FORMS)
def test_plain_formula_in_float32_gives_our_weights_to_single_precision(form: str) -> None:
    found = closed_form.measure_plain(Case(TINY, 2, neighbors=3), 2, 4, form)
    assert found["difference"] < 1e-4
    assert (found["layers"], found["concepts"]) == (4, 2)
    assert found["seconds"] == pytest.approx(found["measured_seconds"])


def test_a_part_is_scaled_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(weights, erased, targets, mu, form, clock):
        clock.seconds.update(rows=2.0, inverse=3.0)
        return plain_edit(weights, erased, targets, mu, form, Clock())

    monkeypatch.setattr(closed_form, "plain_edit", fixed)
    found = closed_form.measure_plain(Case(TINY, 10, neighbors=0), 2, 1, "public")
    share = sum(cost(out, 24, "public") for out in TINY.outs) / cost(TINY.outs[TINY.spread(1)[0]], 24, "public")
    assert found["stages"] == pytest.approx({"rows": 2.0 * share * 5, "inverse": 3.0 * share})


def test_what_is_too_long_or_too_large_is_cut_layers_first() -> None:
    case, unit = Case(TINY, 100), 1 / cost(16, 24, "public")  # the two wide layers take 1 s a concept each, the others .8
    assert closed_form.fitting(case, unit, "public", 1000) == (100, 4)
    assert closed_form.fitting(case, unit, "public", 40) == (10, 1)
    assert closed_form.fitting(case, unit, "public", 0.1) == (1, 1)
    huge = Case(GEOMETRIES["sd14"], 100)
    assert closed_form.fitting(huge, 0.0, "product", 1)[1] < 32  # 25 GB of targets


def test_closed_form_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "in_fresh_process", lambda function, *args: function(*args))  # eight would take long
    found = closed_form.run([TINY], [1, 2], 1, 5, console(), neighbors=1, rate_size=64)
    assert [row["concepts"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert row["limit"]["float64"] == pytest.approx(4 * 24**2 * row["rows"] + 11 / 3 * 24**3)
        assert set(row["ours"]["stages"]) == {"grams", "solve", "apply"}
        assert max(row[form]["difference"] for form in FORMS) < 1e-4
    save(tmp_path / "sub" / "found.json", found)
    assert json.loads((tmp_path / "sub" / "found.json").read_text())["results"]["rows"][0]["rows"] == 3 * 2 * 75


def test_training_runs_and_trains() -> None:
    found = training.measure(training.sd14_geometry(32, 8), 1, 1)
    assert found["projections"] == 32
    assert found["steps"]["odd"]["latents"] == 1
    assert found["steps"]["even"]["latents"] == 2
    assert len(found["losses"]) == 4
    assert all(0 < loss < 100 for loss in found["losses"])


def test_streaming_writes_the_edit_and_nothing_else_and_cleans_up(tmp_path) -> None:
    found = streaming.run(0.045, tmp_path, 1, console())
    assert list(tmp_path.iterdir()) == []
    assert found["difference"] < 2e-3  # float16, relative to an edit of about a quarter of the weights
    assert found["bytes"] == pytest.approx(0.045e9, rel=1e-2)
    assert found["growth"] < 1e9


def test_streaming_notices_other_tensors_and_leaves_nothing_after_an_interruption(tmp_path, monkeypatch) -> None:
    streaming.make_checkpoint(tmp_path / "a", 40_000_000)
    streaming.make_checkpoint(tmp_path / "b", 41_000_000)
    assert len(SafetensorsFile.open(tmp_path / "a").entries) == 25 + 32 + 8
    assert streaming.check(tmp_path / "a", tmp_path / "a") == pytest.approx(1)  # not edited: off by all of the edit
    with pytest.raises(RuntimeError, match="other tensors"):
        streaming.check(tmp_path / "a", tmp_path / "b")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (folder := tmp_path / "empty").mkdir()
    monkeypatch.setattr(streaming, "measure_cp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        streaming.run(0.04, folder, 1, console())
    assert list(folder.iterdir()) == []


def test_a_failure_in_the_other_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="broken on purpose"):
        in_fresh_process(broken)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["closed-form", "--model", "sd3"], "sd3"),
        (["training", "--width", "33"], "multiples"),
        (["streaming", "--gb", "0.01"], "--gb"),
    ],
)
def test_unusable_arguments_are_explained(arguments: list[str], word: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "error: " in result.output
    assert word in result.output


def test_no_space_is_said_before_writing(tmp_path) -> None:
    with pytest.raises(ErasureError, match="disk space"):
        streaming.run(1e6, tmp_path, 1, console())
    assert list(tmp_path.iterdir()) == []
