"""The benchmark's numbers: the papers' printed averages from their printed rows, and intervals with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realera_nodes.bench.erasure.measures import Column, Estimate, columns_of, estimates
from realera_nodes.bench.erasure.tables import as_csv, markdown, summarise

LINES = [
    line.split("\t")
    for line in (Path(__file__).parent / "data" / "printed_tables.tsv").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
][1:]


def row(
    method: str = "m", case: str = "c", seconds: float = 1.0, **measures: list[tuple[str, str, str, int, float | None]]
) -> Any:
    """A row of shots (group, cluster, prompt, seed, value), the same shots for each measure."""
    shots = next(iter(measures.values()))
    sampler = {"steps": 1, "guidance": 1.0, "side": 0, "dtype": "float32", "name": "ddim"}
    return {
        "method": method, "case": case, "row": {"seconds": seconds, "memory": None}, "concepts": [[case, "sky"]],
        "scorer": "toy", "sampler": sampler, "config": None, "protocol": "objects",
        "group": [s[0] for s in shots], "cluster": [s[1] for s in shots], "prompt": [s[2] for s in shots],
        "label": [s[2] for s in shots], "seed": [s[3] for s in shots], "picture": [f"{case}{i}" for i in range(len(shots))],
        "values": {name: [s[4] for s in own] for name, own in measures.items()},
    }  # fmt: skip


def accuracies(case: str, acc_e: float, acc_s: float, acc_g: float) -> Any:
    shots = [("erased", case, "e", 0, acc_e), ("other", case, "s", 0, acc_s), ("synonym", case, "g", 0, acc_g)]
    return row(case=case, top1=shots)


@pytest.mark.parametrize(("paper", "method"), [("RealEra", "RealEra"), ("RealEra", "UCE"), ("MACE", "MACE"), ("MACE", "ESD-x")])
def test_a_methods_numbers_are_the_papers_averages_of_ten_classes(paper: str, method: str) -> None:
    tables = {"RealEra": ("1", "A1"), "MACE": ("1", "11")}[paper]
    printed = {c: [float(x) for x in n] for p, t, m, c, *n in LINES if (p, m) == (paper, method) and t in tables}
    average = printed.pop("average")
    rows = [accuracies(c, *(x / 100 for x in numbers[:3])) for c, numbers in printed.items()]
    found, cases = estimates(rows, columns_of(rows))
    assert len(cases) == 10
    for name, wanted in zip(("Acc_e", "Acc_s", "Acc_g", "H_o"), average, strict=True):
        assert 100 * found[name].mean == pytest.approx(wanted, abs=0.02), name
        assert found[name].low < found[name].mean < found[name].high


def test_residue_unseen_and_the_other_accuracy_stand_beside() -> None:
    groups = ("erased", "other", "synonym", "associated", "unseen")
    one = row(top1=[(g, "c", g, 0, 0.5) for g in groups], probability=[(g, "c", g, 0, 0.25) for g in groups])
    names = [c.name for c in columns_of([one])]
    assert names[:6] == ["Acc_e", "Acc_s", "Acc_g", "H_o", "residue", "unseen"]
    assert "Acc_e (probability)" in names
    found, _ = estimates([one], columns_of([one]))
    assert found["H_o"].mean == pytest.approx(0.5)
    assert found["H_o (probability)"].mean == pytest.approx(3 / (1 / 0.75 + 1 / 0.25 + 1 / 0.75))
    assert next(c.name for c in columns_of([one], "probability") if not c.shown) == "Acc_e (top-1)"


def test_what_has_no_synonyms_gets_h_c_and_faces_are_counted() -> None:
    shots = [("erased", "A", "a", 0), ("erased", "A", "a", 1), ("other", "B", "b", 0), ("other", "B", "b", 1)]
    one = row(top1=[(*s, v) for s, v in zip(shots, (1, 0, 1, 1), strict=True)],
              face=[(*s, v) for s, v in zip(shots, (1, 0, 1, 1), strict=True)])  # fmt: skip
    found, _ = estimates([one], columns_of([one]))
    assert found["Acc_e"].mean == 1.0, "one of one with a face"
    assert found["no face, erased"].mean == 0.5
    assert found["H_c"].mean == 0.0
    assert "H_o" not in found


def test_nobody_is_recognised_where_there_is_no_face() -> None:
    shots = [("erased", "A", "a", 0, 0.0), ("other", "B", "b", 0, 1.0)]
    one = row(top1=shots, face=shots)
    found, _ = estimates([one], columns_of([one]))
    assert found["Acc_e"].mean == 0.0
    assert found["H_c"].mean == 1.0


def test_detections_are_summed_and_styles_subtracted() -> None:
    nude = row(**{"total@0.6": [("explicit", str(i), str(i), i, float(i)) for i in range(4)]})
    assert estimates([nude], columns_of([nude]))[0]["total@0.6"].mean == 6.0
    style = row(clip=[("erased", "a", "a", 0, 22.59), ("other", "b", "b", 0, 28.58)])
    assert estimates([style], columns_of([style]))[0]["H_a"].mean == pytest.approx(5.99)


def test_intervals_have_the_width_of_theory_and_are_the_same_each_time() -> None:
    rng = np.random.default_rng(3)
    values = rng.random(400)
    one = row(top1=[("caption", str(i), str(i), i, float(v)) for i, v in enumerate(values)])
    columns = columns_of([one])
    found, _ = estimates([one], columns, draws=4000)
    half = 1.96 * values.std() / 20
    assert found["Acc"].high - found["Acc"].mean == pytest.approx(half, rel=0.1)
    assert found["Acc"].mean - found["Acc"].low == pytest.approx(half, rel=0.1)
    assert estimates([one], columns, draws=4000)[0] == found
    assert estimates([one], columns, seed=1, draws=4000)[0] != found


def test_seeds_are_drawn_together_for_all_prompts() -> None:
    """At every seed one of two prompts is seen, so that no draw of seeds changes their mean."""
    shots = [("other", "c", p, s, float((p == "a") == (s % 2 == 0))) for p in "ab" for s in range(8)]
    found, _ = estimates([row(top1=shots)], [Column("Acc_s", "up", (("other", "top1"),))])
    assert found["Acc_s"] == Estimate(0.5, 0.5, 0.5)


def test_concepts_erased_together_are_drawn_anew_with_all_their_prompts() -> None:
    """Efficacy and generality of a concept agree, so the draws of both must."""
    shots = [(g, c, f"{g}{c}", 0, v) for c, v in (("a", 1.0), ("b", 0.0), ("c", 0.0)) for g in ("erased", "synonym")]
    same = Column("difference", "", (("erased", "top1"), ("synonym", "top1")), lambda e, g: e - g)
    alone = Column("Acc_e", "", (("erased", "top1"),))
    found, _ = estimates([row(top1=shots)], [same, alone])
    assert found["difference"] == Estimate(0.0, 0.0, 0.0)
    assert found["Acc_e"].low == 0.0
    assert found["Acc_e"].high == 1.0


def test_a_case_without_a_number_is_left_out_of_its_mean() -> None:
    rows = [accuracies("a", 0.0, 1.0, 0.0), row(case="b", top1=[("erased", "b", "e", 0, 1.0), ("other", "b", "s", 0, 1.0)])]
    found, cases = estimates(rows, columns_of(rows))
    assert found["Acc_e"].mean == 0.5
    assert found["Acc_g"] == Estimate(0.0, 0.0, 0.0)
    assert "Acc_g" not in cases[1]


def test_tables_show_percent_with_bounds_and_say_what_is_missing() -> None:
    rows = [accuracies("a", 0.0, 1.0, 0.0), accuracies("b", 0.5, 1.0, 0.5)]
    rows.append(row(method="n", case="a", top1=[("erased", "a", "e", 0, 1.0), ("other", "a", "s", 0, 1.0)]))
    summary = summarise(rows)
    text = markdown("Title", summary, rows)
    assert "| method | Acc_e ↓ | Acc_s ↑ | Acc_g ↓ | H_o ↑ |" in text
    assert "| m | 25.0 [0.0, 50.0] | 100.0 |" in text
    assert "| n | 100.0 | 100.0 | - | - |" in text
    assert "| m | 100.0 | 60.0 |" in text, "H_o by case"
    lines = as_csv(summary).splitlines()
    assert lines[0].startswith("method,case,bound,Acc_e,Acc_s,Acc_g,H_o")
    assert lines[1].startswith("m,all,mean,25.0,100.0,25.0,")
