"""MACE's two closed forms against what its public script computes, layer by layer, in float64, from whole prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.templates import CONTEXTS
from realera_nodes.mass import combine
from realera_nodes.mass_config import MassConfig
from realera_nodes.mass_work import Work
from realera_nodes.mining import silent
from realera_nodes.priors import Prior
from tests.tiny import tiny_backend

pytestmark = pytest.mark.usefixtures("own_cache")

CAPTIONS = ["a red car on a road", "two birds on a wire", "the sea"]
CONCEPTS = (Concept("airplane", "sky"), Concept("red bus", "a very old road"))
RETAINED = (Preserved("bird"), Preserved("ship"))
PROMPTS = CONTEXTS["object"][:4]


def common(old: list[int], new: list[int], length: int) -> tuple[list[int], list[int]]:
    """Rows that two tokenised prompts begin and end with, padding among them: as the script pairs them."""
    head = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    tail = next(i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
    ends = len(old) - tail, len(new) - tail
    n = length - max(ends)
    return [*range(head), *range(ends[0], ends[0] + n)], [*range(head), *range(ends[1], ends[1] + n)]


def solved(w: Tensor, start: Tensor, lamb: float, terms: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """(lamb W' + sum s v c^T) (lamb I + sum s c c^T)^-1 for rows c (n, d) with values v (n, out) and scales s."""
    a, b = lamb * start, lamb * torch.eye(w.shape[1], dtype=torch.float64)
    for c, v, scale in terms:
        a, b = a + scale * v.T @ c, b + scale * c.T @ c
    return torch.linalg.solve(b, a.T).T


@pytest.mark.parametrize(
    "own",
    [
        RefinementConfig(lambda_1=0.0, lambda_2=0.0, mu=10.0),
        # the script's lambda of persons is 0: its captions alone make the sum invertible, as these few would not
        RefinementConfig(lambda_1=1e-2, lambda_2=1e-2, lambda_3=0.8, mu=0.5),
        RefinementConfig(lambda_1=0.05, lambda_2=0.05, lambda_3=0.8, mu=0.5, double_scale=True),
    ],
    ids=["object", "person", "doubled"],
)
def test_refinement_and_fusion_are_the_scripts(own: RefinementConfig) -> None:
    backend = tiny_backend("sd1")

    def states(prompts: list[str]) -> Tensor:
        return backend.encode(prompts).states.double()

    captions = states(CAPTIONS).flatten(0, 1)
    kept = states([t.format(p.phrase) for p in RETAINED for t in PROMPTS]).flatten(0, 1)
    own = replace(own, contexts=len(PROMPTS), prior_rows=float(len(captions)), ridge=1e-9)
    prior = Prior(captions.T @ captions / len(captions), kept.T @ kept, RETAINED, (), len(CAPTIONS), backend.encoder_hash())
    work = Work(backend, CONCEPTS, (), MassConfig("mace", refinement=own), silent, prior)

    generator, loras = torch.Generator().manual_seed(3), {}
    for concept in CONCEPTS:
        loras[concept.phrase] = {
            name: (torch.randn(1, w.shape[1], generator=generator), 0.05 * torch.randn(w.shape[0], 1, generator=generator))
            for name, w in backend.projections().items()
        }
    transform, factors = combine(work, [(c, loras[c.phrase]) for c in CONCEPTS], work.refinement)
    assert transform is not None

    # the script's scale stands before both priors, once in its sums and again in its solve of the refinement
    scale = own.lambda_1
    weight = own.lambda_3 / scale if scale else 0.0
    again = scale if own.double_scale else 1.0
    for name, weights in backend.projections().items():
        w = weights.double()
        priors = [(captions, scale), (kept, scale * weight if scale else own.lambda_3)]
        pairs = []
        for concept in CONCEPTS:
            text = backend.encode([t.format(p) for t in PROMPTS for p in (concept.phrase, concept.anchor)])
            for i in range(0, len(text), 2):
                old, new = (row[: row.index(49407) + 1] for row in text.ids[i : i + 2])
                a, b = common(old, new, 77)
                pairs.append((text.states[i].double()[a], text.states[i + 1].double()[b]))
        erased = [(c, e @ w.T, 1.0) for c, e in pairs]
        refined = solved(w, w, own.mu, erased + [(c, c @ w.T, again * s) for c, s in priors])
        assert float((w + work.refinement.delta(w) - refined).norm()) <= 1e-4 * float((refined - w).norm())
        asked = []
        for concept in CONCEPTS:
            down, up = loras[concept.phrase][name]
            trained = refined + up.double() @ down.double()
            rows = states([t.format(concept.phrase) for t in PROMPTS]).flatten(0, 1)  # all 77 of each
            asked.append((rows, rows @ trained.T, 1.0))
        fused = solved(w, refined, own.mu, asked + [(c, c @ w.T, s) for c, s in priors])
        found = w + transform.delta(w) + factors[name][1].double() @ factors[name][0].double()
        assert float((found - fused).norm()) <= 1e-4 * float((fused - w).norm()), name
