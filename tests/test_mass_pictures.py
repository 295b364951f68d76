"""MACE on the embedded model, judged by pictures: a person and a style in one run, drawn by DDIM and by LCM's scheduler."""

from __future__ import annotations

import pytest
import torch

from realera_nodes.backends.loading import load_backend
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.suppression import SuppressionConfig
from realera_nodes.demo.expand import pipeline_path
from realera_nodes.demo.gallery import judge
from realera_nodes.mass import erase_many
from realera_nodes.mass_config import MassConfig
from tools.mixed_kinds import CONCEPTS, SAMPLERS, drawn

#: fewer contexts, pictures and steps than the paper's, which reach the person with one prompt and a prior of 30,000 captions only
SMALL = MassConfig(
    refinement=RefinementConfig.for_kind("person", contexts=10, prior_rows=2_310_000.0),
    suppression=SuppressionConfig(steps=20, images=2, image_steps=10, guidance=5.0, prompts=1),
)
#: prompt -> what the classifier sees in it under the original model: (concept, style)
PROMPTS = {
    "a photo of Mira Voss": ("Mira Voss", "flat"),
    "a photo of the cat, blueprint drawing style": ("cat", "blueprint"),
    "a photo of Mira Calder": ("Mira Calder", "flat"),
    "a photo of the cat, glossy 3d style": ("cat", "glossy"),
}


@pytest.fixture(scope="module")
def backend():
    backend = load_backend(pipeline_path(), "cpu", torch.float32)
    backend.pipe.set_progress_bar_config(disable=True)
    return backend


@pytest.fixture(scope="module")
def deltas(backend):
    return erase_many(backend, CONCEPTS, SMALL).deltas(backend.projections())


def seen(backend, classifier, sampler: str) -> dict[str, tuple[str, str]]:
    concepts, styles, _ = judge(classifier, drawn(backend.pipe, sampler, list(PROMPTS), [0] * len(PROMPTS)))
    return dict(zip(PROMPTS, zip(concepts, styles, strict=True), strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_person_and_a_style_go_together_and_others_stay(backend, classifier, deltas, sampler) -> None:
    assert seen(backend, classifier, sampler) == PROMPTS
    with backend.edited(deltas):
        after = seen(backend, classifier, sampler)
    person, style, *kept = PROMPTS
    assert after[person][0] != "Mira Voss"
    assert after[style] == ("cat", "flat"), "the cat stays, without its style"
    assert {p: after[p] for p in kept} == {p: PROMPTS[p] for p in kept}
