"""Mass erasure on tiny random models: the stages, the shelf, several processes, files that agree."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera_nodes.backends.student import PeftStudent
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.suppression import SuppressionConfig
from realera_nodes.core.templates import CONTEXTS
from realera_nodes.formats.checkpoint import open_checkpoint
from realera_nodes.formats.lora import read_lora
from realera_nodes.job import Job, open_source, planned_files, run
from realera_nodes.mass import MassErasure, erase_many
from realera_nodes.mass_config import MassConfig
from realera_nodes.mass_work import Work, train_concept
from realera_nodes.mining import silent
from realera_nodes.parallel import shelf_of, train_all
from tests.tiny import SIDE, tiny_backend, tiny_files

SMALL = MassConfig(
    refinement=RefinementConfig(contexts=2, prior_rows=10.0, lambda_1=1e-2, lambda_2=1e-2),
    suppression=SuppressionConfig(steps=3, lr=1e-2, images=1, image_steps=2),
    neighbors=NeighborConfig(m=2, n=2, vocabulary=40, candidates=8, words=2, words_beyond=2, response=-1, response_beyond=-1),
    alignment=AlignmentConfig(steps=3, lr=1e-2, rank=1, trajectories=1, trajectory_steps=2),
)
CONCEPTS = (Concept("airplane", "sky"), Concept("red car", "road"))
KEPT = (Preserved("bird"),)

pytestmark = pytest.mark.usefixtures("own_cache")


def deltas(erasure: MassErasure) -> dict[str, torch.Tensor]:
    return erasure.deltas(tiny_backend("sd1").projections())


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference relative to the edit."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


@pytest.mark.parametrize(
    ("kind", "method"), [("sd1", "mace"), ("sd1", "realera-mass"), ("sd2", "mace"), ("sdxl", "mace"), ("sdxl", "realera-mass")]
)
def test_all_parts_change_every_projection_and_not_the_model(kind: str, method: str) -> None:
    backend = tiny_backend(kind)
    before = {n: w.clone() for n, w in backend.projections().items()}
    config = replace(SMALL, method=method)
    if kind != "sd1":  # without the general prior, whose captions take the larger encoders long
        config = replace(config, refinement=replace(config.refinement, lambda_1=0.0, lambda_2=0.0, mu=1.0))
    erasure = erase_many(backend, CONCEPTS, config, KEPT)
    found = erasure.deltas(backend.projections())
    assert set(found) == set(before)
    assert all(d.abs().max() > 0 and torch.isfinite(d).all() for d in found.values())
    assert all(torch.equal(w, before[n]) for n, w in backend.projections().items())
    assert erasure.trained == ["airplane", "red car"]
    assert bool(erasure.mined.words) == (method == "realera-mass")
    assert all(len(losses) == 3 for losses in erasure.losses.values())


def test_fusion_differs_from_the_sum_and_both_from_refinement_alone() -> None:
    backend = tiny_backend("sd1")
    parts = {f: deltas(erase_many(backend, CONCEPTS, replace(SMALL, fusion=f), KEPT)) for f in ("closed-form", "sum", "none")}
    assert far(parts["closed-form"], parts["sum"]) > 1e-3
    assert far(parts["sum"], parts["none"]) > 1e-3
    only = deltas(erase_many(backend, CONCEPTS, replace(SMALL, refine=False), KEPT))
    assert far(only, parts["closed-form"]) > 1e-3


def test_what_is_retained_moves_less() -> None:
    backend = tiny_backend("sd1")
    config = replace(SMALL, fusion="none", refinement=replace(SMALL.refinement, lambda_3=100.0))
    kept = backend.encode(["a photo of the bird"]).states[0, 1:]

    def drift(retained: tuple[Preserved, ...]) -> float:
        return sum(float((kept @ d.T).norm()) for d in deltas(erase_many(backend, CONCEPTS, config, retained)).values())

    assert drift(KEPT) < 0.5 * drift(())


@pytest.mark.parametrize(
    ("concept", "prompts", "wanted"),
    [
        (CONCEPTS[0], 30, {t.format("airplane") for t in CONTEXTS["object"]}),
        (replace(CONCEPTS[0], kind="person"), 4, {t.format("airplane") for t in CONTEXTS["person"][:4]}),
        (replace(CONCEPTS[0], templates=("see {}", "{} here")), 30, {"see airplane", "airplane here"}),
        (CONCEPTS[0], 1, {"a photo of the airplane"}),
    ],
)
def test_each_step_asks_by_one_of_the_prompts_of_the_concept(concept, prompts, wanted, monkeypatch) -> None:
    backend, asked = tiny_backend("sd1"), []
    attention = PeftStudent.attention

    def watched(self, z, t, text, columns=None):
        asked.extend(text.states)
        return attention(self, z, t, text, columns)

    monkeypatch.setattr(PeftStudent, "attention", watched)
    config = replace(SMALL, suppression=replace(SMALL.suppression, steps=60, mask="none", prompts=prompts))
    train_concept(Work(backend, (concept,), (), config, silent), 0)
    known = {p: backend.encode([p]).states[0] for p in wanted}
    found = {next(p for p, x in known.items() if torch.equal(x, e)) for e in asked}
    assert len(asked) == 60
    assert len(found) > 0.7 * len(wanted)


def test_given_pictures_and_masks_are_trained_on() -> None:
    backend = tiny_backend("sd1")
    g = torch.Generator().manual_seed(0)
    images, masks = torch.rand(2, 3, SIDE, SIDE, generator=g), torch.zeros(2, SIDE, SIDE)
    masks[:, : SIDE // 2] = 1
    drawn = erase_many(backend, CONCEPTS[:1], SMALL).losses["airplane"]
    given = erase_many(backend, [replace(CONCEPTS[0], images=images, masks=masks)], SMALL).losses["airplane"]
    whole = erase_many(backend, [replace(CONCEPTS[0], images=images, masks=torch.ones_like(masks))], SMALL).losses["airplane"]
    assert given != drawn
    assert given[0] < whole[0], "half of the pixels hold less attention than all"


@pytest.mark.parametrize(
    ("concepts", "retained", "says"),
    [
        ((), (), "name at least one"),
        ((CONCEPTS[0], Concept("Airplane", "sea")), (), '"Airplane" is on the list twice'),
        (CONCEPTS, (Preserved("Red  Car"),), '"Red Car" is both erased and retained'),
    ],
)
def test_contradictory_lists_are_named(concepts, retained, says: str) -> None:
    with pytest.raises(ErasureError, match=says):
        erase_many(tiny_backend("sd1"), concepts, SMALL, retained)


def job(out: Path, **changes) -> Job:
    base = Job(str(tiny_files("sd1")[1]), CONCEPTS, out, residue=("jet",), pictures=1, sampling_steps=1, size=SIDE, device="cpu",
               config=SMALL, retained=KEPT)  # fmt: skip
    return replace(base, **changes)


def test_a_stopped_job_goes_on_and_ends_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first-cache"))
    whole = job(tmp_path / "whole")
    run(whole)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second-cache"))
    stopped = job(tmp_path / "stopped")
    stops = iter([False] * 4 + [True])

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "suppression" and next(stops, False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, progress)
    shelf = shelf_of(stopped)
    assert [shelf.path(c).exists() for c in CONCEPTS] == [True, False]
    assert not stopped.out.exists()
    first = shelf.path(CONCEPTS[0]).stat().st_mtime_ns
    table = run(stopped)
    assert list(table["loss"]) == ["red car"], "the finished concept is not trained again"
    assert shelf.path(CONCEPTS[0]).stat().st_mtime_ns == first
    for role, path in planned_files(whole, open_source(whole.checkpoint)).items():
        if role in ("checkpoint", "lora"):
            other = planned_files(stopped, open_source(whole.checkpoint))[role]
            a, b = (open_checkpoint(p) for p in (path, other)) if role == "checkpoint" else (path, other)
            names = list(open_checkpoint(whole.checkpoint).architecture.projections)
            if role == "checkpoint":
                assert all(torch.equal(a.read_projection(n), b.read_projection(n)) for n in names)
            else:
                x, y = read_lora(a, names), read_lora(b, names)
                assert all(torch.equal(u, v) for n in names for u, v in zip(x[n], y[n], strict=True))


def test_checkpoint_and_lora_hold_the_same_edit(tmp_path: Path) -> None:
    work = job(tmp_path / "out")
    table = run(work)
    assert table["method"] == "mace"
    files = planned_files(work, open_source(work.checkpoint))
    base, erased = open_checkpoint(work.checkpoint), open_checkpoint(files["checkpoint"])
    lora = read_lora(files["lora"], base.architecture.projections)
    for name in base.architecture.projections:
        w0, w = base.read_projection(name).float(), erased.read_projection(name).float()
        # float16 weights: rounded to a spacing of 2^-11 of the erased weight
        assert (w0 + lora[name][1] @ lora[name][0] - w).abs().max() <= 1e-3 * w.abs().max()


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_several_processes_train_the_same_loras(executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("NO RAY: pip install ray")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first-cache"))
    one, seen = job(tmp_path / "out"), []
    train_all(one, 1)
    names = list(open_checkpoint(one.checkpoint).architecture.projections)
    alone = [read_lora(shelf_of(one).path(c), names) for c in CONCEPTS]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    train_all(one, 2, executor, lambda phrase, done, total: seen.append((phrase, done, total)))
    assert sorted(p for p, _, _ in seen) == ["airplane", "red car"]
    assert [(d, t) for _, d, t in seen] == [(1, 2), (2, 2)]
    together = [read_lora(shelf_of(one).path(c), names) for c in CONCEPTS]
    for a, b in zip(alone, together, strict=True):
        assert all(torch.allclose(u, v, atol=1e-5) for n in names for u, v in zip(a[n], b[n], strict=True))
    again: list = []
    train_all(one, 2, executor, lambda *x: again.append(x))
    assert not again, "nothing is trained twice"


def test_an_unknown_executor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="local, ray"):
        train_all(job(tmp_path / "out"), 1, "slurm")


def test_realera_mass_keeps_the_head_of_every_prompt_that_it_erases() -> None:
    """Rows that are their own targets and the start token: one for each context, concept prompt, sample and mined word."""
    backend = tiny_backend("sd1")
    config = replace(SMALL, method="realera-mass")
    work = Work(backend, CONCEPTS[:1], (), config, silent)
    rows = list(work._rows())
    start = backend.encode([""]).states[0, 0]
    kept = sum(int(((e == start).all(1) & (e == to).all(1)).sum()) for e, to in rows)
    pairs = work.groups[0]
    assert kept == config.refinement.contexts + len(pairs) * (1 + config.neighbors.m) + len(work.mined.near)
    assert work.mined.near
    bare = Work(backend, CONCEPTS[:1], (), replace(config, refinement=replace(config.refinement, head=False)), silent)
    assert not any(bool((e == start).all(1).any()) for e, _ in bare._rows())
