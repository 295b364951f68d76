"""Every method of the benchmark on a tiny random model: an edit that draws otherwise and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera_nodes.bench.erasure.methods import METHODS, Edit, check_settings, make_method
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.presets import load_preset
from tests.tiny import tiny_backend

#: as little of each method as runs
SMALL = (
    "neighbors.m=2", "neighbors.n=2", "neighbors.vocabulary=40", "neighbors.candidates=8", "neighbors.response=-1",
    "neighbors.response_beyond=-1", "alignment.steps=2", "alignment.lr=0.01", "alignment.trajectories=1",
    "alignment.trajectory_steps=2", "alignment.guidance=1.0", "refinement.contexts=2", "suppression.steps=2",
    "suppression.lr=0.01", "suppression.images=1", "suppression.image_steps=2", "sampling_steps=2", "lr=0.001", "steps=1",
)  # fmt: skip
CONCEPTS = (Concept("airplane", "sky"), Concept("red car", "road"))
KEPT = (Preserved("bird"),)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # one for all tests of this file: the prior's Gram takes a while
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(tmp_path_factory.getbasetemp()) / "cache"))


@pytest.mark.parametrize("name", METHODS)
def test_each_method_edits_and_leaves_the_model_as_it_was(name: str) -> None:
    backend = tiny_backend("sd1")
    before = {n: p.clone() for n, p in backend.unet.named_parameters()}
    z, t, text = backend.noise([0]), torch.tensor([500]), backend.encode(["a photo of the airplane"])

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return backend.predict_noise(z, t, text)

    plain = predicted()
    edit = make_method(name, settings=SMALL)(backend, CONCEPTS, KEPT)
    with edit.on(backend):
        edited = predicted()
    assert torch.equal(predicted(), plain)
    assert all(torch.equal(p, before[n]) for n, p in backend.unet.named_parameters())
    assert torch.equal(edited, plain) == (name == "original")
    assert all(torch.isfinite(d).all() for d in edit.deltas.values())
    if name.startswith("esd"):
        assert edit.full
        assert all(("attn2" in n) == (name == "esd-x") for n in edit.deltas)
    elif name != "original":
        assert set(edit.deltas) == set(backend.projections())


def test_the_papers_components_are_switched_one_by_one() -> None:
    def parts(name: str) -> tuple[bool, ...]:
        c = make_method(name).config
        return (c.closed_form_on, c.alignment_on, c.neighbors_on, c.beyond_on, c.neighbors.words > 0)

    assert parts("closed-form") == (True, False, False, False, True)
    assert parts("+alignment") == (True, True, False, False, True)
    assert parts("+neighbors") == (True, True, True, False, False)
    assert parts("+beyond") == (True, True, True, True, False)
    assert parts("+named-neighbors") == (True, True, True, False, True)
    assert parts("realera") == (True, True, True, True, True)


def test_what_is_retained_moves_less_by_the_closed_forms() -> None:
    backend = tiny_backend("sd1")
    kept = backend.encode(["bird"]).states[0, 1:2]  # the last token of the phrase, which is all that it keeps

    def drift(retained: tuple[Preserved, ...]) -> float:
        edit = make_method("uce-new", settings=("preserve_scale=100.0",))(backend, CONCEPTS, retained)
        return sum(float((kept @ d.T).norm()) for d in edit.deltas.values())

    assert drift(KEPT) < 0.05 * drift(())


def test_a_hash_names_the_weights_by_content() -> None:
    deltas = {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    assert Edit(deltas).hash() == Edit(dict(reversed(deltas.items()))).hash()
    assert Edit(deltas).hash() == Edit({n: d.clone() for n, d in deltas.items()}).hash()
    others = [Edit(deltas, full=True), Edit({**deltas, "b": torch.full((1,), 1e-7)}), Edit({"a": deltas["a"]}),
              Edit({"a": torch.ones(3, 2), "b": deltas["b"]}), Edit({})]  # fmt: skip
    assert len({e.hash() for e in (Edit(deltas), *others)}) == 6


def test_settings_come_with_the_name_or_for_all_and_those_of_the_name_win() -> None:
    shared = ("neighbors.m=3", "alignment.steps=7", "mu=0.25")
    assert make_method("realera@neighbors.m=20@closed_form.prior=3", settings=shared).config.neighbors.m == 20
    assert make_method("realera@neighbors.m=20", settings=shared).config.alignment.steps == 7
    assert make_method("uce-old", settings=shared).config.mu == 0.25
    assert make_method("mace", settings=shared).config.neighbors.m == 3
    assert make_method("original", settings=shared).config is None


def test_mace_takes_a_presets_settings_and_its_ablations_differ_in_one_thing() -> None:
    preset = load_preset("mace-cifar10-frog")
    mace = make_method("mace", preset=preset).config
    assert mace.refinement.mu == preset.method.lambda_1 == 0.4
    assert make_method("mace-refinement", preset=preset).config == replace(mace, fusion="none")
    assert make_method("mace-sum-cfis", preset=preset).config == replace(mace, fusion="sum")
    uniform = replace(mace.suppression, cfis=False)
    assert make_method("mace-no-cfis", preset=preset).config == replace(mace, suppression=uniform)
    assert make_method("mace-sum", preset=preset).config == replace(mace, fusion="sum", suppression=uniform)
    assert make_method("realera-mass", preset=preset).config == replace(mace, method="realera-mass")
    assert make_method("mace", "person").config.suppression.lr == 1e-4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reelera", "closed-form, .alignment"),
        ("realera@neighbours.m=20", "neighbours"),
        ("realera@neighbors.m=much", "must be int"),
        ("realera@neighbors.d1=2.0", "d2"),
        ("original@steps=3", "has no settings"),
    ],
)
def test_unknown_methods_and_settings_are_explained(name: str, says: str) -> None:
    with pytest.raises(ErasureError, match=says):
        make_method(name)


@pytest.mark.parametrize("setting", ["neighbors.words=0", "steps=3", "nonsense"])
def test_a_setting_that_no_method_has_is_refused(setting: str) -> None:
    with pytest.raises(ErasureError, match=setting.partition("=")[0]):
        check_settings(["original", "uce-new"], [setting])


def test_a_concept_both_erased_and_retained_is_named() -> None:
    with pytest.raises(ErasureError, match='"Airplane" is both'):
        make_method("uce-new")(tiny_backend("sd1"), CONCEPTS, (Preserved("Airplane"),))
