"""A benchmark run on a tiny random model, judged by colour: tables, figures, resuming at each depth, several processes."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from realera_nodes.bench.erasure import run as runner
from realera_nodes.bench.erasure.figures import surface_methods
from realera_nodes.bench.erasure.pictures import PictureStore, Sampler, picture_key, shots_of
from realera_nodes.bench.erasure.protocols import Ask, Sizes
from realera_nodes.bench.erasure.rows import Ledger
from realera_nodes.bench.erasure.run import Bench, Worker, run
from realera_nodes.bench.erasure.scorers import SCORERS, Needs, classified
from realera_nodes.cli import app
from realera_nodes.core.errors import ErasureError
from tests.tiny import SIDE, tiny_files

METHODS = ("original", "uce-new", "uce-old")


class ColourScorer:
    """Each label has a colour, and a picture shows the label whose colour is nearest to its mean."""

    name = "colour"

    def __init__(self, needs: Needs):
        self.labels = needs.labels
        self.colours = torch.rand(len(needs.labels), 3, generator=torch.Generator().manual_seed(0))

    def score(self, pictures, shots):
        far = torch.cdist(pictures.mean((2, 3)), self.colours)
        return classified((-10 * far).softmax(1), self.labels, shots)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setitem(SCORERS, "colour", ColourScorer)


def bench(out: Path, **changes) -> Bench:
    sizes = Sizes(pictures=2, others=2, concepts=("airplane", "cat"))
    base = Bench("objects", METHODS, out, str(tiny_files("sd1")[0]), sizes, scorer="colour", steps=1, size=SIDE, device="cpu")
    return replace(base, **changes)


def without_costs(rows):
    return [{k: v for k, v in row.items() if k != "row"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A whole run: its folder and rows. For reading only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCORERS, "colour", ColourScorer)
        out = tmp_path_factory.mktemp("finished")
        return out, run(bench(out))


def test_every_method_meets_every_case_with_all_numbers(finished) -> None:
    _, rows = finished
    assert [(r["case"], r["method"]) for r in rows] == [(c, m) for c in ("airplane", "cat") for m in METHODS]
    for row in rows:
        assert len(row["group"]) == 2 * (1 + 3 + 2)
        for measure, values in row["values"].items():
            stays = [v is not None for v in values]
            assert stays == [measure in ("top1", "probability") or g == "other" for g in row["group"]]
        moved = [v for v in row["values"]["pixel"] if v is not None]
        assert (max(moved) == 0) == (row["method"] == "original")
        assert (row["row"]["seconds"] > 0) == (row["method"] != "original")


def test_the_same_run_gives_the_same_rows_elsewhere(finished, tmp_path: Path) -> None:
    _, rows = finished
    again = run(bench(tmp_path / "again", sizes=Sizes(pictures=2, others=2, concepts=("cat",))))
    assert without_costs(again) == without_costs([r for r in rows if r["case"] == "cat"])


def test_what_is_finished_is_not_done_again(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows = finished

    def no_work(*_):
        raise AssertionError("a finished row was begun again")

    monkeypatch.setattr(Worker, "row", no_work)
    assert run(bench(out)) == rows
    with pytest.raises(AssertionError, match="begun again"):
        run(bench(out, settings=("mu=0.3",)))


def test_a_run_that_is_stopped_while_drawing_goes_on_with_its_edit_and_pictures(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = finished
    job = bench(tmp_path / "stopped", sizes=Sizes(pictures=2, others=2, concepts=("airplane",)), batch=4)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pictures" and 4 <= done < total:  # some are drawn, some are not
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(replace(job, methods=("uce-old",)), progress=stop)
    drawn = {p: p.stat().st_mtime_ns for p in (job.out / "pictures").rglob("*.png")}
    assert drawn
    assert len(list((job.out / "edits").iterdir())) == 1
    assert not (job.out / "rows.jsonl").exists()
    erased: list[str] = []
    method = Worker.method

    def counted(self, name, case):
        made = method(self, name, case)
        return replace(made, run=lambda *a: erased.append(name) or made.run(*a))

    monkeypatch.setattr(Worker, "method", counted)
    found = run(job)
    assert "uce-old" not in erased, "the edit of the stopped run was made again"
    assert "uce-new" in erased
    assert all(p.stat().st_mtime_ns == t for p, t in drawn.items())
    assert not list((job.out / "edits").iterdir())
    wanted = [r for r in rows if r["case"] == "airplane"]
    for row, other in zip(found, wanted, strict=True):
        assert row["picture"] == other["picture"]
        for measure, values in row["values"].items():
            assert values == pytest.approx(other["values"][measure], abs=2e-3)  # batches of 4 round otherwise than of 16


def test_a_half_written_line_is_made_anew_and_a_damaged_one_is_named(finished, tmp_path: Path) -> None:
    out, rows = finished
    path = tmp_path / "rows.jsonl"
    text = (out / "rows.jsonl").read_bytes()
    path.write_bytes(text[:-40])
    ledger = Ledger(path)
    assert len(ledger.rows) == len(rows) - 1
    ledger.add(rows[-1])
    assert list(Ledger(path).rows) == [r["key"] for r in rows]
    path.write_bytes(b"nonsense\n" + text)
    with pytest.raises(ErasureError, match="line 1 of"):
        Ledger(path)


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_several_processes_give_the_same_rows(executor: str, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("NO RAY: pip install ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    _, rows = finished
    seen: list = []
    job = bench(tmp_path / "out", scorer="none", methods=METHODS[:2], sizes=Sizes(pictures=2, others=2, concepts=("cat",)))
    found = run(job, 2, executor, on_row=lambda row, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    wanted = [r for r in rows if r["case"] == "cat"][:2]
    assert [r["picture"] for r in found] == [r["picture"] for r in wanted]
    for row, other in zip(found, wanted, strict=True):
        there = [v for v in row["values"]["pixel"] if v is not None]
        assert there == pytest.approx([v for v in other["values"]["pixel"] if v is not None], abs=1e-3)


def test_equal_weights_share_pictures_and_other_samplers_do_not() -> None:
    ask, sampler = Ask("erased", "cat", "a photo of the cat", (3, 4)), Sampler(20, 5.0, 64)
    first = shots_of([ask], "w", sampler)
    assert [s.seed for s in first] == [3, 4]
    assert [s.key for s in shots_of([replace(ask, group="other", label="x")], "w", sampler)] == [s.key for s in first]
    keys = {picture_key("w", "p", 0, s) for s in (sampler, replace(sampler, steps=21), replace(sampler, guidance=7.5),
                                                  replace(sampler, side=128), replace(sampler, dtype="float16"))}  # fmt: skip
    assert (
        len(keys | {picture_key("v", "p", 0, sampler), picture_key("w", "q", 0, sampler), picture_key("w", "p", 1, sampler)}) == 8
    )


def test_pictures_are_judged_as_they_are_kept_and_damaged_ones_are_named(tmp_path: Path) -> None:
    store = PictureStore(tmp_path)
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    store.write("abcd", picture)
    assert torch.equal(store.read(["abcd"])[0], (picture * 255).round() / 255)
    store.path("abcd").write_bytes(b"")
    with pytest.raises(ErasureError, match=r"abcd\.png is damaged"):
        store.read(["abcd"])
    with pytest.raises(ErasureError, match=r"ef01\.png is gone"):
        store.read(["ef01"])


# the command


def bench_command(*arguments: str | Path):
    folder = str(tiny_files("sd1")[0])
    return CliRunner().invoke(app, ["bench", *(str(a) for a in (*arguments, "--model", folder, "--device", "cpu"))])


def small(out: Path, *more: str | Path, methods: str = "original,uce-new", protocol: str = "objects"):
    return bench_command(protocol, "--out", out, "--methods", methods, "--concepts", "airplane", "--pictures", "1",
                         "--others", "1", "--steps", "1", "--size", str(SIDE), "--scorer", "colour", *more)  # fmt: skip


def test_the_command_writes_tables_and_figures(tmp_path: Path) -> None:
    result = small(tmp_path / "out")
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert set(table["methods"]) == {"original", "uce-new"}
    assert set(table["methods"]["uce-new"]["all"]) >= {"Acc_e", "Acc_s", "Acc_g", "H_o", "pixel MSE", "latent MSE", "seconds"}
    assert table["methods"]["uce-new"]["config"]["tokens"] == "last-subject"
    assert "| uce-new |" in (tmp_path / "out" / "table.md").read_text()
    with (tmp_path / "out" / "pictures.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 2 * 5
    assert all((tmp_path / "out" / "pictures" / r["picture"][:2] / f"{r['picture']}.png").exists() for r in rows)
    for name in ("grid.png", "tradeoff.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 100
    first = (tmp_path / "out" / "table.csv").read_bytes()
    assert small(tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "table.csv").read_bytes() == first, "intervals are the same each time"


def test_a_surface_varies_two_settings(tmp_path: Path) -> None:
    result = small(tmp_path / "out", "--surface", "m-n", "--surface-of", "closed-form@neighbors_on=true@beyond_on=true@"
                   "neighbors.words=0@closed_form.prior=0.0", "--surface-x", "1,3", "--surface-y", "2,4",
                   protocol="ablation")  # fmt: skip
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "surface.csv").open() as f:
        points = list(csv.DictReader(f))
    assert [(p["x"], p["y"]) for p in points] == [("1", "2"), ("1", "4"), ("3", "2"), ("3", "4")]
    assert all(float(p["Acc_s-e"]) == pytest.approx(float(p["Acc_s"]) - float(p["Acc_e"])) for p in points)
    assert len({p["latent MSE"] for p in points}) == 4, "each pair of settings gives another edit"
    assert (tmp_path / "out" / "surface.png").exists()


def test_a_surface_without_a_scorer_shows_what_the_pictures_say(tmp_path: Path) -> None:
    result = small(tmp_path / "out", "--surface", "m-n", "--surface-x", "1,3", "--surface-y", "2,4",
                   "--scorer", "none", "--surface-of", "closed-form@neighbors_on=true@beyond_on=true@neighbors.words=0",
                   protocol="ablation")  # fmt: skip
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "surface.csv").open() as f:
        points = list(csv.DictReader(f))
    assert len(points) == 4
    assert all(float(p["latent MSE"]) >= 0 and "Acc_s-e" not in p for p in points)


def test_the_papers_surfaces_are_within_the_settings_ranges() -> None:
    from realera_nodes.bench.erasure.methods import make_method

    for name in ("d-s", "m-n"):
        for method in surface_methods(name, "+beyond"):
            assert make_method(method).config.neighbors.words == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--methods", "original,magic"), 'no method "magic"'),
        (("--methods", "original,original"), "named twice"),
        (("--methods", ""), "give --methods"),
        (("--set", "neighbors.words=0"), 'has the setting "neighbors.words"'),
        (("--set", "mu=-1.0"), "mu is -1.0"),
        (("--concepts", "unicorn"), '"unicorn" is not erased'),
        (("--scorer", "eyes"), 'no scorer "eyes"'),
        (("--executor", "slurm"), "local, ray"),
        (("--jobs", "0"), "jobs is 0"),
        (("--pictures", "0"), "pictures is 0"),
        (("--steps", "0"), "steps is 0: it must lie between 1 and 1000"),
        (("--split", "tuning"), "for the embedded model"),
        (("--surface", "d-s"), "--surface is for bench ablation"),
        (("--surface-x", "1,2"), "say which"),
        (("--accuracy", "top5"), "top1, probability"),
        (("--real", "nowhere"), "no two pictures"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(more: tuple[str, ...], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "load_backend", lambda *a, **k: pytest.fail("the model was loaded"))
    result = small(tmp_path / "out", *more)
    text = " ".join(result.output.split())
    assert result.exit_code == 1, text
    assert "error: " in text
    assert "Traceback" not in text
    assert says in text
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_and_a_surface_without_points_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in small(tmp_path / "file").output
    text = small(tmp_path / "out", "--surface", "m-n", "--surface-x", "3", protocol="ablation").output
    assert "two values or more" in " ".join(text.split())


def test_a_missing_picture_is_named_when_it_is_to_be_shown(tmp_path: Path) -> None:
    assert small(tmp_path / "out").exit_code == 0
    shutil.rmtree(tmp_path / "out" / "pictures")
    result = small(tmp_path / "out")
    assert result.exit_code == 1
    assert "is gone" in " ".join(result.output.split())
