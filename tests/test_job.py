"""Whole jobs on tiny random models of every kind: files that load and agree, resume, cancel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera_nodes.backends.loading import load_backend
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.erasure import ErasureConfig
from realera_nodes.formats.checkpoint import open_checkpoint
from realera_nodes.formats.lora import read_lora
from realera_nodes.formats.metadata import ErasureMetadata
from realera_nodes.formats.stream import SafetensorsFile, sha256_of
from realera_nodes.job import Job, open_source, planned_files, run
from realera_nodes.resume import state_path
from tests.stopping import Stopped, Watched
from tests.tiny import SIDE, tiny_files

#: float16 weights: an edit is rounded to a spacing of 2^-11 of the weight
TOLERANCE = 1e-3
SMALL = ErasureConfig(
    neighbors=NeighborConfig(m=2, n=3, vocabulary=40, candidates=8, words=2, words_beyond=2, response=-1, response_beyond=-1),
    alignment=AlignmentConfig(steps=3, lr=1e-2, rank=2, trajectories=1, trajectory_steps=2),
)
CONCEPT = Concept("airplane", "sky", templates=("a photo of the {}",), preserve=(Preserved("bird"),))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def job(source: Path, out: Path, **changes) -> Job:
    base = Job(str(source), (CONCEPT,), out, SMALL, residue=("jet",), pictures=1, sampling_steps=2, size=SIDE, device="cpu")
    return replace(base, **changes)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_job_writes_checkpoints_and_loras_that_agree(kind: str, tmp_path: Path) -> None:
    folder, single = tiny_files(kind)
    hashes = sha256_of(single)
    edited = {}
    for source in (folder, single) if kind == "sd1" else (single,):
        work = job(source, tmp_path / source.name)
        table = run(work)
        files = planned_files(work, open_source(str(source)))
        assert all(p.exists() for p in files.values())
        assert sorted(table["files"]) == sorted(files[k].name for k in ("checkpoint", "lora", "edit lora"))
        checkpoint, base = open_checkpoint(files["checkpoint"]), open_checkpoint(source)
        names = list(base.architecture.projections)
        trained, edit = read_lora(files["lora"], names), read_lora(files["edit lora"], names)
        for name in names:
            w0, w = base.read_projection(name).float(), checkpoint.read_projection(name).float()
            both = trained[name][1] @ trained[name][0] + edit[name][1] @ edit[name][0]
            assert float((w - w0).norm()) > 0
            assert torch.allclose(w0 + both, w, atol=TOLERANCE * float(w.abs().max())), name
            edited.setdefault(name, []).append(w)
        facts = ErasureMetadata.from_safetensors(checkpoint.metadata)
        assert facts is not None
        assert (facts.concepts, facts.anchors, facts.preserved) == (("airplane",), ("sky",), ("bird",))
        assert facts.base_sha256 == base.sha256()
        assert facts.config["alignment"]["steps"] == 3
    for name, weights in edited.items():
        assert all(torch.equal(weights[0], w) for w in weights), f"{name}: folder and single file were edited differently"
    assert sha256_of(single) == hashes


def test_the_erased_file_draws_what_the_report_shows(tmp_path: Path) -> None:
    _, single = tiny_files("sd1")
    work = job(single, tmp_path)
    run(work)
    erased = load_backend(planned_files(work, open_source(str(single)))["checkpoint"], device="cpu", size=SIDE)
    base = load_backend(single, device="cpu", size=SIDE)
    prompt = "a photo of the airplane"
    lora = read_lora(tmp_path / f"{single.stem}-erased-lora.safetensors", base.names)
    edit = read_lora(tmp_path / f"{single.stem}-erased-edit-lora.safetensors", base.names)
    deltas = {n: lora[n][1] @ lora[n][0] + edit[n][1] @ edit[n][0] for n in base.names}
    with base.edited(deltas):
        expected = base.pictures([prompt], [0], steps=2)
    plain = base.pictures([prompt], [0], steps=2)
    found = erased.pictures([prompt], [0], steps=2)
    assert (found - expected).abs().max() < 0.02
    assert (found - plain).abs().max() > (found - expected).abs().max()


def test_the_lora_loads_in_diffusers_and_equals_the_adapters(tmp_path: Path) -> None:
    folder, _ = tiny_files("sd1")
    work = job(folder, tmp_path, config=replace(SMALL, closed_form_on=False))
    run(work)
    path = planned_files(work, open_source(str(folder)))["lora"]
    backend = load_backend(folder, device="cpu", size=SIDE)
    text = backend.encode(["a photo of the airplane"])
    z, t = backend.noise([3]), torch.tensor([400])
    with torch.no_grad():
        with backend.adapted(read_lora(path, backend.names)):
            ours = backend.predict_noise(z, t, text)
        plain = backend.predict_noise(z, t, text)
        backend.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        theirs = backend.predict_noise(z, t, text)
    assert (ours - plain).abs().max() > 1e-4, "the LoRA does nothing"
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_strength_scales_the_closed_form(tmp_path: Path) -> None:
    folder, _ = tiny_files("sd1")
    only_edit = replace(SMALL, alignment_on=False)
    weights = {}
    for strength in (0.0, 0.5, 1.0):
        config = replace(only_edit, closed_form=replace(only_edit.closed_form, strength=strength))
        work = job(folder, tmp_path / str(strength), config=config)
        run(work)
        checkpoint = open_checkpoint(planned_files(work, open_source(str(folder)))["checkpoint"])
        weights[strength] = {n: checkpoint.read_projection(n).float() for n in checkpoint.architecture.projections}
    base = open_checkpoint(folder)
    for name in base.architecture.projections:
        w0 = base.read_projection(name).float()
        assert torch.equal(weights[0.0][name], w0)
        full, half = weights[1.0][name] - w0, weights[0.5][name] - w0
        # the sum of two float16 roundings, each half a spacing of the largest weight
        assert torch.allclose(half, full / 2, atol=TOLERANCE * float(weights[1.0][name].abs().max()))


def test_a_stopped_training_goes_on_to_the_same_files(tmp_path: Path) -> None:
    folder, _ = tiny_files("sd1")
    long = replace(SMALL, alignment=replace(SMALL.alignment, steps=24))
    whole = job(folder, tmp_path / "whole", config=long)
    run(whole)
    stopped = job(folder, tmp_path / "stopped", config=long)
    with pytest.raises(Stopped):
        run(stopped, Watched("noise alignment", stop=22))
    assert not (tmp_path / "stopped").exists(), "a cancelled job left files"
    assert state_path(stopped, open_source(str(folder)).checkpoint.sha256()).exists()
    again = Watched("noise alignment")
    run(stopped, again)
    assert again.visited == [21, 22, 23, 24]
    assert not state_path(stopped, open_source(str(folder)).checkpoint.sha256()).exists()
    names = list(open_checkpoint(folder).architecture.projections)
    a, b = (read_lora(planned_files(w, open_source(str(folder)))["lora"], names) for w in (whole, stopped))
    for name in names:
        assert torch.equal(a[name][0], b[name][0])
        assert torch.equal(a[name][1], b[name][1])


def test_the_report_holds_numbers_and_pictures(tmp_path: Path) -> None:
    from PIL import Image

    folder, _ = tiny_files("sd1")
    run(job(folder, tmp_path))
    table = json.loads((tmp_path / "report.json").read_text())
    groups = {p["group"] for p in table["probes"]}
    assert groups == {"concept", "associated", "preserved", "unrelated"}
    assert "jet" in {p["label"] for p in table["probes"]}
    assert len(table["loss"]) == 3
    assert table["condition"] > 1
    image = Image.open(tmp_path / "grid.png")
    assert image.height > 60 * len(table["probes"])
    assert "grid.png" in (tmp_path / "report.md").read_text()


def test_damage_in_the_weights_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, single = tiny_files("sd1")
    state = load_file(single)
    key = next(k for k in state if k.endswith("attn2.to_v.weight"))
    state[key] = torch.full_like(state[key], float("nan"))
    broken = tmp_path / "broken.safetensors"
    save_file(state, broken)
    with pytest.raises(ValueError, match=r"NaN|nan"):
        run(job(broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert SafetensorsFile.open(broken).entries
