"""UCE and ESD as whole jobs on tiny random models: files that load and agree, the same report, resume, cancel, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from realera_nodes.backends.loading import load_backend
from realera_nodes.cli import app
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.esd import EsdConfig
from realera_nodes.core.uce import UceConfig
from realera_nodes.formats.checkpoint import open_checkpoint
from realera_nodes.formats.lora import read_lora
from realera_nodes.formats.metadata import ErasureMetadata
from realera_nodes.formats.stream import sha256_of
from realera_nodes.job import Job, open_source, planned_files, run
from realera_nodes.methods import METHODS, config_of
from realera_nodes.resume import state_path
from realera_nodes.uce import erase_uce
from tests.stopping import Stopped, Watched
from tests.tiny import SIDE, tiny_backend, tiny_files

#: float16 weights: an edit is rounded to a spacing of 2^-11 of the weight
TOLERANCE = 1e-3
CONCEPT = Concept("airplane", "sky", preserve=(Preserved("bird"),))
X = EsdConfig(steps=2, lr=1e-2, sampling_steps=2)
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")


def job(source: Path, out: Path, **changes) -> Job:
    base = Job(str(source), (CONCEPT,), out, X, residue=("jet",), pictures=1, sampling_steps=1, size=SIDE, device="cpu")
    return replace(base, **changes)


def files_of(work: Job) -> dict[str, Path]:
    return planned_files(work, open_source(work.checkpoint))


def changed(work: Job) -> set[str]:
    """diffusers' names of the parameters that the written checkpoint has other values of."""
    base, erased = open_checkpoint(Path(work.checkpoint)), open_checkpoint(files_of(work)["checkpoint"])
    assert base.architecture.parameters == erased.architecture.parameters
    return {name for name in base.architecture.parameters if not torch.equal(base.read(name), erased.read(name))}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("variant", ["x", "u"])
def test_esd_writes_all_that_it_trained_and_nothing_else(kind: str, variant: str, tmp_path: Path) -> None:
    single = tiny_files(kind)[1]
    hashes, work = sha256_of(single), job(single, tmp_path / "out", config=replace(X, variant=variant))
    table = run(work)
    assert sha256_of(single) == hashes
    base, found = open_checkpoint(single), changed(work)
    wanted = {name for name in base.architecture.parameters if ("attn2" in name.split(".")) == (variant == "x")}
    assert found <= wanted
    # a key's bias alone moves nothing behind a softmax, and float16 rounds the smallest steps away
    assert len(found) > 0.9 * len(wanted)
    assert table["files"] == [files_of(work)["checkpoint"].name]
    assert table["method"] == f"esd-{variant}"
    assert len(table["loss"]) == 2
    assert "no LoRA holds exactly" in table["notes"][0]
    assert table["notes"][0] in (tmp_path / "out" / "report.md").read_text()
    assert table["embedding_residue"] == {}
    assert bool(table["value_drift"]) == (variant == "x")
    assert table["picture_change"]["concept"] > 0
    facts = ErasureMetadata.from_safetensors(open_checkpoint(files_of(work)["checkpoint"]).metadata)
    assert facts is not None
    assert (facts.method, facts.concepts, facts.anchors, facts.preserved) == (f"esd-{variant}", ("airplane",), ("",), ())
    assert facts.config["steps"] == 2


@pytest.mark.parametrize("variant", ["x", "u"])
def test_the_erased_file_predicts_as_the_trained_network_did(variant: str, tmp_path: Path) -> None:
    """Folder and file: what was drawn for the report is what the written models draw."""
    prompt, pictures = "airplane", {}
    for source in tiny_files("sd1"):
        work = job(source, tmp_path / source.name, config=replace(X, variant=variant))
        run(work)
        erased = load_backend(files_of(work)["checkpoint"], device="cpu", size=SIDE)
        pictures[source.suffix] = erased.pictures([prompt], [0], steps=2)
    assert torch.allclose(pictures[""], pictures[".safetensors"], atol=1e-3)
    plain = tiny_backend("sd1")
    before = plain.pictures([prompt], [0], steps=2)
    from realera_nodes.esd import erase_esd

    with erase_esd(plain, (CONCEPT,), replace(X, variant=variant)).on(plain):
        expected = plain.pictures([prompt], [0], steps=2)
    assert float((pictures[""] - expected).abs().max()) < 0.02
    assert float((pictures[""] - before).abs().max()) > 2 * float((pictures[""] - expected).abs().max())
    assert torch.equal(plain.pictures([prompt], [0], steps=2), before)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_uce_writes_a_checkpoint_and_an_exact_lora(kind: str, tmp_path: Path) -> None:
    single = tiny_files(kind)[1]
    work = job(single, tmp_path / "out", config=UceConfig(strength=0.8), retained=(Preserved("ship"),))
    table = run(work)
    files = files_of(work)
    assert table["files"] == [files["lora"].name, files["checkpoint"].name]
    assert changed(work) == {f"{name}.weight" for name in open_checkpoint(single).architecture.projections}
    base, erased = open_checkpoint(single), open_checkpoint(files["checkpoint"])
    lora = read_lora(files["lora"], base.architecture.projections)
    outcome = erase_uce(tiny_backend(kind), (CONCEPT,), work.config, work.retained)
    for name in base.architecture.projections:
        w0, w = base.read(name).float(), erased.read(name).float()
        assert torch.allclose(w0 + lora[name][1] @ lora[name][0], w, atol=TOLERANCE * float(w.abs().max())), name
        delta = outcome.delta(name, w0)
        assert torch.allclose(w0 + delta, w, atol=TOLERANCE * float(w.abs().max()))
        assert float((lora[name][1] @ lora[name][0] - delta).norm() / delta.norm()) < 1e-3
    facts = ErasureMetadata.from_safetensors(erased.metadata)
    assert (facts.method, facts.anchors, facts.preserved) == ("uce", ("sky",), ("bird", "ship"))
    assert table["rank"]["dropped"] < 1e-6
    assert table["condition"] > 1
    assert set(table["embedding_residue"]) == {"concept", "associated"}
    assert table["named_neighbors"] == {}
    assert table["notes"] == []


def test_a_guide_is_told_in_place_of_anchors(tmp_path: Path) -> None:
    work = job(tiny_files("sd1")[0], tmp_path, config=UceConfig(to_anchor=False, guide="art"), save_checkpoint=False)
    table = run(work)
    assert [c["anchor"] for c in table["concepts"]] == ["art"]
    assert table["notes"] == ['Every concept became "art", the guide; anchors were not used.']
    assert table["embedding_residue"] == {}
    assert table["files"] == [files_of(work)["lora"].name]


def test_a_stopped_esd_goes_on_to_the_same_file(tmp_path: Path) -> None:
    single = tiny_files("sd1")[1]
    long = replace(X, steps=24, lr=1e-4, sampling_steps=1)
    whole, stopped = (job(single, tmp_path / name, config=long) for name in ("whole", "stopped"))
    run(whole)
    with pytest.raises(Stopped):
        run(stopped, Watched("training", stop=22))
    assert not (tmp_path / "stopped").exists(), "a cancelled job left files"
    kept = state_path(stopped, open_source(str(single)).checkpoint.sha256())
    assert kept.exists()
    assert state_path(replace(stopped, size=24), open_source(str(single)).checkpoint.sha256()) != kept
    again = Watched("training")
    run(stopped, again)
    assert again.visited == [20, 21, 22, 23, 24]
    assert not kept.exists()
    a, b = (open_checkpoint(files_of(w)["checkpoint"]) for w in (whole, stopped))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.architecture.parameters)


def test_esd_without_a_checkpoint_would_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="let the checkpoint be saved"):
        run(job(tiny_files("sd1")[0], tmp_path, save_checkpoint=False))


def command(*more: str | Path, checkpoint: int = 0) -> list[str]:
    start = ["erase", tiny_files("sd1")[checkpoint], "-c", "airplane", "-a", "sky", "--size", SIDE, "--device", "cpu"]
    return [str(a) for a in [*start, "--pictures", "1", "--sampling-steps", "1", *more]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, command("--method", method, "--dry-run", "--out", tmp_path / "o"))
    assert result.exit_code == 0, result.output
    trained = {"realera": "noise alignment", "mace": "suppression", "realera-mass": "noise alignment"}.get(method, "training")
    assert (trained in result.output) == (method != "uce")
    assert ("million weights" in result.output) == method.startswith("esd")
    assert ("airplane -> sky" in result.output) != method.startswith("esd")
    assert ("erased-lora.safetensors" in result.output) != method.startswith("esd")
    assert "would write" in result.output
    assert not (tmp_path / "o").exists()


def test_the_method_and_its_settings_come_from_a_file_too(tmp_path: Path) -> None:
    config = tmp_path / "esd.toml"
    config.write_text('method = "esd-u"\nsteps = 3\nsampling_steps = 1\nlr = 1e-4\n')
    out = tmp_path / "out"
    result = RUNNER.invoke(app, command("--config", config, "--set", "steps=2", "--out", out))
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert (report["method"], report["config"]["steps"], report["config"]["lr"]) == ("esd-u", 2, 1e-4)
    assert "no LoRA holds exactly" in result.output
    shown = RUNNER.invoke(app, ["inspect", str(next(out.glob("*-erased")))])
    assert "esd-u" in shown.output
    again = RUNNER.invoke(app, command("--config", config, "--method", "esd-x", "--out", out, "--overwrite"))
    assert again.exit_code == 0, again.output
    assert json.loads((out / "report.json").read_text())["method"] == "esd-x"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "esd"], 'there is no method "esd": choose one of realera, mace, realera-mass, uce, esd-x, esd-u'),
        (["--method", "uce", "--set", "tokens=first"], "choose one of last-subject, aligned"),
        (["--method", "uce", "--set", "guide=art"], "leave it empty, or set to_anchor off"),
        (["--method", "uce", "--set", "neighbors.m=3"], 'no setting "neighbors"'),
        (["--method", "esd-x", "--set", "steps=0"], "steps is 0"),
        (["--method", "esd-u", "--no-neighbors"], "esd-u has no such parts"),
        (["--method", "esd-u", "--no-save-checkpoint"], "let the checkpoint be saved"),
        (["--method", "esd-x", "--preserve", "airplane"], "both erased and preserved"),
        (["--method", "esd-x", "--set", "eta=1e30"], "eta is 1e+30: it must lie between -100 and 100"),
    ],
)
def test_what_makes_no_sense_is_answered_in_a_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, command(*arguments, "--out", tmp_path / "out"))
    assert result.exit_code == 1, result.output
    text = " ".join(result.output.split())
    assert says in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("out/*"))


def test_every_method_has_settings_of_its_own() -> None:
    concepts = (replace(CONCEPT, kind="style"),)
    made = {method: config_of(method, concepts) for method in METHODS}
    assert (made["esd-x"].variant, made["esd-u"].variant, made["mace"].method) == ("x", "u", "mace")
    assert made["mace"].suppression.mask == "none"
