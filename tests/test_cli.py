"""The command line: one sentence and exit code 1 for whatever a user can get wrong, before any work is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from realera_nodes.cli import app
from realera_nodes.cli.common import console
from realera_nodes.formats.stream import sha256_of
from tests.tiny import SIDE, tiny_backend, tiny_files

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")


def refused(*arguments: str | Path) -> str:
    result = RUNNER.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    text = " ".join(result.output.split())
    assert "error: " in text, text
    assert "Traceback" not in text
    return text


def erase(checkpoint: str | Path, out: Path, *more: str | Path) -> str:
    return refused("erase", checkpoint, "--concept", "airplane", "--anchor", "sky", "--out", out, *more)


def lora_file(path: Path) -> Path:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 4), "lora_unet_x.lora_up.weight": torch.zeros(4, 1)}, path)
    return path


def truncated(path: Path) -> Path:
    whole = tiny_files("sd1")[1].read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def foreign(path: Path) -> Path:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, path)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "none.safetensors", "does not exist"),
        (lambda p: truncated(p / "cut.safetensors"), "truncated|shorter|incomplete|cut"),
        (lambda p: [(p / "model.ckpt").write_bytes(b"\x80\x02}q\x00." * 40), p / "model.ckpt"][1], "pickle"),
        (lambda p: lora_file(p / "lora.safetensors"), "LoRA"),
        (lambda p: foreign(p / "flux.safetensors"), "SD1.x, SD2.x and SDXL"),
    ],
)
def test_files_that_cannot_be_erased_from(make, says: str, tmp_path: Path) -> None:
    import re

    out = tmp_path / "out"
    assert re.search(says, erase(make(tmp_path), out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--concept", "", "--anchor", "sky"], "concept to erase is empty"),
        (["--concept", "airplane", "--anchor", ""], "anchor of"),
        (["--concept", "sky", "--anchor", "Sky"], "both erased and the anchor"),
        (["--anchor", "sky"], "name at least one"),
        (["--concept", "a", "--concept", "b", "--concept", "c", "--anchor", "x", "--anchor", "y"], "3 concepts and 2 anchors"),
        (["--concept", "bird", "--anchor", "sky", "--preserve", "bird"], "both erased and preserved"),
        (["--concept", "bird", "--anchor", "sky", "--kind", "thing"], "unknown kind"),
        (["--concept", "bird", "--anchor", "sky", "--set", "alignment.lr=7"], "lr is 7"),
        (["--concept", "bird", "--anchor", "sky", "--set", "alignment.foo=7"], "no setting"),
        (["--concept", "bird", "--anchor", "sky", "--set", "neighbors.s1=0.1"], "s2"),
        (["--concept", "bird", "--anchor", "sky", "--config", "none.toml"], "does not exist"),
        (["--concept", "bird", "--anchor", "sky", "--pictures", "0"], "pictures"),
    ],
)
def test_settings_that_make_no_sense(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in refused("erase", tiny_files("sd1")[0], "--out", tmp_path / "out", *arguments)


def test_a_concept_too_long_for_the_encoder(tmp_path: Path) -> None:
    text = refused("edit", tiny_files("sd1")[0], "-c", "very " * 80 + "long", "-a", "sky", "--out", tmp_path, "--size", "16")
    assert "shorten it" in text
    assert not list(tmp_path.glob("*.safetensors"))


def test_existing_output_is_kept(tmp_path: Path) -> None:
    folder, _ = tiny_files("sd1")
    (tmp_path / "report.md").write_text("mine")
    assert "allow overwriting (--overwrite)" in erase(folder, tmp_path)
    assert (tmp_path / "report.md").read_text() == "mine"


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file" in erase(tiny_files("sd1")[0], tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be made" in erase(tiny_files("sd1")[0], tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    assert "GB" in erase(tiny_files("sd1")[0], tmp_path / "out")


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    folder, _ = tiny_files("sd1")
    result = RUNNER.invoke(
        app, ["erase", str(folder), "-c", "airplane", "-a", "sky", "--out", str(tmp_path / "o"), "--dry-run", "--size", "16"]
    )
    assert result.exit_code == 0, result.output
    for word in ("airplane -> sky", "noise alignment", "minutes", "would write", "erased-lora.safetensors"):
        assert word in result.output
    assert not (tmp_path / "o").exists()


def test_preserve_takes_several_words(tmp_path: Path) -> None:
    folder, _ = tiny_files("sd1")
    arguments = [
        "edit",
        str(folder),
        "-c",
        "airplane",
        "-a",
        "sky",
        "--preserve",
        "bird",
        "ice cream",
        "sky",
        "--out",
        str(tmp_path / "o"),
    ]
    result = RUNNER.invoke(app, [*arguments, "--residue", "jet", "liner", "--preserve", "airplane", "--size", "16"])
    assert '"airplane" is both erased and preserved' in result.output


def test_a_config_file_erases_several(tmp_path: Path) -> None:
    config = tmp_path / "many.toml"
    config.write_text(
        """
[[concepts]]
phrase = "airplane"
anchor = "sky"
preserve = ["bird", { phrase = "ship", weight = 2.0 }]
templates = ["a photo of the {}"]

[[concepts]]
phrase = "Mira Voss"
anchor = "a woman"
kind = "person"

[neighbors]
words = 0
m = 2
n = 2

[closed_form]
ridge = 0.01
"""
    )
    folder, _ = tiny_files("sd1")
    out = tmp_path / "out"
    arguments = [
        "edit",
        str(folder),
        "--config",
        str(config),
        "--out",
        str(out),
        "--size",
        "16",
        "--pictures",
        "1",
        "--sampling-steps",
        "2",
    ]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    import json

    report = json.loads((out / "report.json").read_text())
    assert [c["concept"] for c in report["concepts"]] == ["airplane", "Mira Voss"]
    assert report["config"]["closed_form"]["ridge"] == 0.01
    shown = RUNNER.invoke(app, ["inspect", str(out / f"{folder.name}-erased-edit-lora.safetensors")])
    assert shown.exit_code == 0
    assert "Mira Voss" in shown.output


def test_mine_lists_words_and_draws_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "size", (120, 40))  # a narrow terminal breaks the phrase
    folder, _ = tiny_files("sd1")
    plot = tmp_path / "map.png"
    small = ["--set", "neighbors.vocabulary=60", "--set", "neighbors.candidates=6", "--set", "alignment.trajectory_steps=3"]
    result = RUNNER.invoke(app, ["mine", str(folder), "-c", "airplane", "--word", "flying machine", "--plot", str(plot), *small])
    assert result.exit_code == 0, result.output
    assert "flying machine" in result.output, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "already exists" in refused("mine", folder, "-c", "airplane", "--plot", plot, *small)


def test_a_word_of_the_users_is_judged_once(tmp_path: Path) -> None:
    from realera_nodes.core.concepts import Concept
    from realera_nodes.core.neighbors import NeighborConfig
    from realera_nodes.mining import mine_words, silent

    backend, concept = tiny_backend("sd1"), Concept("airplane", "sky")
    known = backend.vocabulary()[7]
    config = NeighborConfig(vocabulary=20, candidates=20, response=-1, response_beyond=-1)
    run = backend.trajectories("a photo of the sky", 1, 3, 5.0, 0)
    mined = mine_words(backend, concept, [concept], run, config, silent, [known, "flying machine", "flying machine"])
    words = [w.word for w in mined.named["airplane"]]
    assert sorted(words) == sorted({*backend.vocabulary()[:20], "flying machine"})


def test_ctrl_c_in_mid_training_leaves_no_file_and_the_state_to_go_on_from(tmp_path: Path) -> None:
    checkpoint, out, cache = tiny_files("sd1")[1], tmp_path / "out", tmp_path / "cache"
    before = sha256_of(checkpoint)
    command = [sys.executable, "-m", "realera_nodes", "train-lora", checkpoint, "--concept", "airplane", "--anchor", "sky",
               "--size", SIDE, "--device", "cpu", "--pictures", "1", "--sampling-steps", "1", "--out", out,
               "--set", "neighbors.words=0", "--set", "alignment.steps=900000"]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])}

    def listen() -> None:  # a shell's background jobs, and what they start, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(list(map(str, command)), env=environment, stderr=log, preexec_fn=listen) as process,
    ):
        deadline = time.monotonic() + 300
        while not list(cache.glob("realera-nodes/training/*.safetensors")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, "no training state appeared"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert "cancelled" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not out.exists(), "nothing half-written stays"
    assert sha256_of(checkpoint) == before
    states = list((cache / "realera-nodes" / "training").iterdir())
    assert sorted(p.suffix for p in states) == [".answers", ".safetensors"], (
        "one whole state and what mining told, no temporary file"
    )
