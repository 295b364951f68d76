"""Priors of mass erasures: what they sum up, their files, and what refuses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from realera_nodes.cli import app
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.templates import CONTEXTS
from realera_nodes.mass import erase_many
from realera_nodes.mass_config import MassConfig
from realera_nodes.mass_work import Work
from realera_nodes.mining import silent
from realera_nodes.priors import build_prior, prior_gram, read_prior, write_prior
from realera_nodes.shelf import Base, FolderShelf
from tests.tiny import tiny_backend, tiny_files

pytestmark = pytest.mark.usefixtures("own_cache")

CAPTIONS = ["a red car on a road", "an airplane above the sea", "two birds on a wire"]
KEPT = (Preserved("bird"), Preserved("ship", 2.0))
CONCEPTS = (Concept("airplane", "sky"),)
SMALL = MassConfig(fusion="none", refinement=RefinementConfig(contexts=2, prior_rows=10.0, lambda_1=1e-2, lambda_2=1e-2))


@pytest.fixture(scope="module")
def backend():
    return tiny_backend("sd1")


def prior_of(backend, **changes):
    return build_prior(backend, **({"retained": KEPT, "own": CAPTIONS, "contexts": 2} | changes))


def outer(backend, prompts: list[str]) -> tuple[torch.Tensor, float]:
    """Sum of p p^T over every token of prompts, start token and padding too, and how many there are; row by row."""
    total, count = torch.zeros(backend.context_width, backend.context_width, dtype=torch.float64), 0.0
    for states, weights in backend.rows(prompts, start=True):
        for x, w in zip(states.double(), weights.tolist(), strict=True):
            total += w * torch.outer(x, x)
            count += w
    return total, count


def test_the_sums_are_those_of_every_token(backend) -> None:
    prior = prior_of(backend)
    total, count = outer(backend, CAPTIONS)
    assert count == 77 * len(CAPTIONS)
    assert torch.allclose(prior.general, total / count, rtol=1e-9, atol=1e-12)
    kept = sum(p.weight * outer(backend, [t.format(p.phrase)])[0] for p in KEPT for t in CONTEXTS["object"][:2])
    # encoded in other batches, so float32 rounding apart; relative to the whole, as small entries are sums of large ones
    assert torch.dist(prior.domain, kept) <= 1e-5 * kept.norm()
    assert (prior.captions, prior.retained) == (3, KEPT)


@pytest.mark.parametrize("method", ["mace", "realera-mass"])
def test_a_mass_erasure_s_own_sums_are_those_of_every_token_too(method: str, backend, monkeypatch) -> None:
    monkeypatch.setattr("realera_nodes.mining.captions", lambda without, own=None: CAPTIONS)
    config = replace(SMALL, method=method, neighbors=replace(SMALL.neighbors, words=0))
    work = Work(backend, CONCEPTS, KEPT, config, silent)
    total, count = outer(backend, CAPTIONS)
    assert torch.dist(work.general, total / count) <= 1e-5 * (total / count).norm()
    kept = sum(p.weight * outer(backend, [t.format(p.phrase)])[0] for p in KEPT for t in CONTEXTS["object"][:2])
    assert torch.dist(work.domain, kept) <= 1e-5 * kept.norm()


def test_one_s_own_prior_with_and_without_the_start_token_are_kept_apart(backend) -> None:
    """Both are cached by the encoder and the captions: what one asked for is not what the other gets."""
    both = [prior_gram(backend, (), silent, CAPTIONS, start=start) for start in (False, True, False, True)]
    assert torch.equal(both[0], both[2])
    assert torch.equal(both[1], both[3])
    start = backend.encode([""]).states[0, 0].double()
    assert torch.dist(77 * both[1], 76 * both[0] + torch.outer(start, start)) <= 1e-5 * (77 * both[1]).norm()


def test_captions_of_what_is_erased_are_left_out(backend) -> None:
    prior = prior_of(backend, without=("airplane",))
    assert prior.captions == 2
    assert torch.equal(prior.general, prior_gram(backend, (), silent, [CAPTIONS[0], CAPTIONS[2]], start=True))
    with pytest.raises(ErasureError, match="every caption of the prior holds"):
        prior_of(backend, without=("a", "birds"), own=["a bird", "two birds"])


def test_files_hold_all_of_it(backend, tmp_path) -> None:
    for retained in (KEPT, ()):
        prior = prior_of(backend, retained=retained, without=("airplane",))
        path = tmp_path / f"{len(retained)}.safetensors"
        write_prior(path, prior)
        again = read_prior(path)
        assert torch.equal(again.general, prior.general)
        assert (again.domain is None) == (not retained)
        assert again.domain is None or torch.equal(again.domain, prior.domain)
        for name in ("retained", "without", "captions", "encoder"):
            assert getattr(again, name) == getattr(prior, name), name
        with pytest.raises(ErasureError, match="already exists"):
            write_prior(path, prior)


def test_erasing_with_a_prior_is_erasing_with_its_lists(backend, monkeypatch) -> None:
    monkeypatch.setattr("realera_nodes.mining.captions", lambda without, own=None: CAPTIONS[:1])
    alone = erase_many(backend, CONCEPTS, SMALL, KEPT)
    prior = build_prior(backend, KEPT, without=("airplane",), own=CAPTIONS, contexts=2)
    given = erase_many(backend, CONCEPTS, SMALL, prior=prior)
    assert torch.allclose(given.transform.change, alone.transform.change, rtol=1e-6, atol=1e-9)
    more = erase_many(backend, CONCEPTS, SMALL, (Preserved("house"),), prior=prior)
    assert not torch.allclose(more.transform.change, given.transform.change, rtol=1e-3)
    both = Work(backend, CONCEPTS, (Preserved("house"),), SMALL, silent, prior).domain
    house = Work(backend, CONCEPTS, (Preserved("house"),), SMALL, silent).domain
    assert torch.allclose(both, house + prior.domain)


def test_what_does_not_fit_is_refused(backend, tmp_path) -> None:
    prior = prior_of(backend)
    with pytest.raises(ErasureError, match='"bird" is both erased and retained'):
        erase_many(backend, (Concept("bird", "sky"),), SMALL, prior=prior)
    with pytest.raises(ErasureError, match="built for another text encoder"):
        erase_many(backend, CONCEPTS, SMALL, prior=replace(prior, encoder="x"))
    with pytest.raises(ErasureError, match="built for another text encoder"):
        erase_many(tiny_backend("sd2"), CONCEPTS, SMALL, prior=prior)
    broken = tmp_path / "broken.safetensors"
    write_prior(broken, replace(prior, general=prior.general * float("nan")))
    with pytest.raises(ErasureError, match=r"broken\.safetensors is damaged"):
        read_prior(broken)
    with pytest.raises(ErasureError, match="holds no prior"):
        read_prior(tiny_files("sd1")[1])


def test_a_shelf_tells_priors_apart(backend) -> None:
    base = Base(("x",), "sd1", "0" * 64, "model")
    keys = {
        FolderShelf.of(CONCEPTS, KEPT, SMALL, base, prior=p).key for p in (None, prior_of(backend), prior_of(backend, own=["x"]))
    }
    assert len(keys) == 3


def test_the_command_writes_one(tmp_path) -> None:
    _, checkpoint = tiny_files("sd1")
    lines = tmp_path / "captions.txt"
    lines.write_text("\n".join(CAPTIONS))
    out = tmp_path / "prior.safetensors"
    arguments = [
        "prior",
        str(checkpoint),
        "--out",
        str(out),
        "--retain",
        "bird",
        "--without",
        "airplane",
        "--captions",
        str(lines),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "2 captions, 1 retained phrases" in done.output
    assert read_prior(out).without == ("airplane",)
    lines.write_text("\n")
    refused = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert refused.exit_code != 0
    assert "is empty" in refused.output
