"""The benchmark on the embedded model: one concept, two methods, one picture a prompt, few steps."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from realera_nodes.cli import app


def test_a_small_run_tells_an_erased_concept_from_the_others(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [
        "bench", "objects", "--split", "tuning", "--concepts", "airplane", "--methods", "original,uce-old", "--pictures", "1",
        "--steps", "8", "--others", "4", "--out", str(tmp_path),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    methods = json.loads((tmp_path / "table.json").read_text())["methods"]
    before, after = ({k: v["mean"] for k, v in methods[m]["all"].items()} for m in ("original", "uce-old"))
    assert before["Acc_e"] == 1
    assert before["Acc_s"] == 1
    assert after["Acc_e"] == 0, "the name is gone"
    assert after["Acc_s"] >= 0.75
    assert after["Acc_g"] > 0, "a closed form over the name alone leaves synonyms"
    assert {"H_o", "residue", "unseen", "pixel MSE", "latent MSE", "seconds"} <= after.keys()
    assert before["pixel MSE"] == before["latent MSE"] == 0
    assert after["pixel MSE"] > 0
