"""The training code's parts, and that a stopped stage goes on where it was."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.demo_training import pictures, tiny_vae, train_unet, train_vae
from tools.demo_training.optim import Muon, orthogonalize
from tools.demo_training.run import launch, save_atomic
from tools.demo_training.text import TextStates


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 24), cols=st.integers(40, 90), turn=st.booleans())
def test_orthogonalize_keeps_directions_and_levels_strengths(seed: int, rows: int, cols: int, turn: bool) -> None:
    g = torch.randn(2, rows, cols, generator=torch.Generator().manual_seed(seed))
    out = orthogonalize(g.transpose(1, 2) if turn else g)
    out = out.transpose(1, 2) if turn else out
    strengths = torch.linalg.svdvals(out)
    assert strengths.min() > 0.5
    assert strengths.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    inner = u.transpose(1, 2) @ out @ v.transpose(1, 2)
    off = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
    assert off.abs().max() < 1e-2


def test_muon_step_has_the_promised_size() -> None:
    p = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    p.grad = torch.randn_like(p)
    Muon([p], lr=0.1).step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.25)


def test_every_timestep_has_a_similar_share_of_an_even_error() -> None:
    """The weight grows with noise, monotonically, and stays finite."""
    weight = train_unet.loss_weight(train_unet.ALPHA_BAR)
    assert torch.isfinite(weight).all()
    assert (weight.diff() > 0).all()


def test_learning_rate_warms_up_and_decays() -> None:
    assert train_unet.learning_rate(1.0, 0, 0.0) < 0.1
    assert train_unet.learning_rate(1.0, 500, 0.05) == 1.0
    assert train_unet.learning_rate(1.0, 500, 0.999) == 0.01


def test_noise_keeps_norms_and_importances_and_spares_special_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 768)
    words = torch.tensor([[False, True, True, False, False]] * 3)
    y = TextStates.disturb(x, words, noise=0.5)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(y[..., -1], x[..., -1])
    assert torch.allclose(y[~words], x[~words], atol=1e-6)
    assert ((y - x)[words].norm(dim=-1) > 0.01).all()


def test_pictures_have_every_concept_style_and_background() -> None:
    drawings = np.random.default_rng(0).integers(0, 256, (3, 3, 128, 128, 4), dtype=np.uint8)
    x, meta = pictures.build(drawings)
    assert x.shape[1:] == (64, 64, 3)
    assert x.dtype == np.uint8
    assert set(meta[:, 0]) == {0, 1, 2}
    assert set(meta[:, 1]) == set(range(len(pictures.STYLES)))
    assert set(meta[:, 2]) == set(range(len(pictures.BACKGROUNDS)))
    again, _ = pictures.build(drawings)
    assert np.array_equal(x, again)


def test_a_transparent_drawing_shows_its_background() -> None:
    clear = np.zeros((128, 128, 4), np.uint8)
    picture = pictures.paint(*pictures.place(clear, 56, 4, 4), "flat", "blue")
    assert (picture == np.array(pictures.BACKGROUNDS["blue"])).all()


@pytest.fixture
def small_work(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", J=x, F=x[:16], H=x[:8])
    return tmp_path


def test_vae_training_resumes_and_the_decoder_stage_keeps_the_latents(small_work: Path) -> None:
    def run(minutes: float, refine: bool = False) -> None:
        args = argparse.Namespace(work=small_work, minutes=minutes, batch=2, lr=1e-3, refine=refine, noise=0.02)
        launch(train_vae.worker, args, world=1)

    run(0.04)
    first = torch.load(small_work / "vae_train.pt", weights_only=True)
    assert first["step"] >= 20
    run(0.12)
    second = torch.load(small_work / "vae_train.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert second["elapsed"] > first["elapsed"]
    with (small_work / "vae.csv").open() as f:
        steps = [int(row["step"]) for row in csv.DictReader(f)]
    assert steps == sorted(set(steps)), "a resumed run does not repeat its first rows"
    before = torch.load(small_work / "vae.pt", weights_only=True)
    run(0.04, refine=True)
    after = torch.load(small_work / "vae.pt", weights_only=True)
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("taesd_decoder"))
    kernels = [k for k in before if k.startswith("taesd_encoder") and before[k].ndim == 4]
    assert max((before[k] - after[k]).norm() / before[k].norm() for k in kernels) < 0.5, "refinement keeps the encoder near"


def test_a_widened_decoder_draws_the_same_pictures() -> None:
    torch.manual_seed(1)
    slim = tiny_vae.TinyVAE(tiny_vae.WIDTHS)
    wide, x = tiny_vae.widen(slim), torch.rand(2, 3, 64, 64)
    assert wide.taesd_decoder[-1].weight.shape == (3, 32, 3, 3)
    with torch.no_grad():
        assert torch.equal(wide(x)[1], slim(x)[1])
        assert (wide(x)[0] - slim(x)[0]).abs().max() < 1e-5


def test_atomic_save_leaves_no_temporary(tmp_path: Path) -> None:
    save_atomic({"a": 1}, tmp_path / "x.pt")
    save_atomic({"a": 2}, tmp_path / "x.0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.0", "x.pt"]


def test_padded_vae_shapes_are_taesds() -> None:
    shapes = tiny_vae.padded_shapes()
    assert shapes["taesd_decoder.1.weight"] == (64, 4, 3, 3)
    assert shapes["taesd_encoder.14.weight"] == (4, 64, 3, 3)
    assert shapes["taesd_decoder.19.weight"] == (3, 64, 3, 3)
