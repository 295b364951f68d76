"""The diffusers backend on tiny models: text, noise, and edits that leave no trace."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from realera_nodes.backends.diffusers import DiffusersBackend
from realera_nodes.backends.text_cache import TextCache
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.spans import TextStates
from tests.tiny import KINDS, SIDE, tiny_backend

PROMPTS = ["cat", "oil painting of Mira Calder", ""]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_end_states_are_those_of_encode(kind: str) -> None:
    backend = tiny_backend(kind)
    text = backend.encode(PROMPTS)
    ends = torch.stack([s[ids.index(49407)] for s, ids in zip(text.states, text.ids, strict=True)])
    torch.testing.assert_close(backend.end_states(PROMPTS), ends, **TOLERANCE)
    for states, prompt in zip(text.states, PROMPTS, strict=True):
        [(rows, weights)] = backend.rows([prompt])
        n = len(rows)  # words, end, two of padding, each encoder's own
        assert n == text.ids[PROMPTS.index(prompt)].index(49407) + 2
        torch.testing.assert_close(rows, states[1 : n + 1], **TOLERANCE)
        assert weights.sum() == 76
        [(whole, counted)] = backend.rows([prompt], start=True)
        torch.testing.assert_close(whole, states[: n + 1], **TOLERANCE)
        assert torch.equal(counted, torch.cat([torch.ones(1), weights]))
    [(rows, weights)] = backend.rows(PROMPTS)
    assert weights.sum() == 3 * 76
    assert sum(w.sum() for _, w in backend.rows(PROMPTS, start=True)) == 3 * 77
    assert len(rows) == len(weights)


@pytest.mark.parametrize(("kind", "pads"), [("sd1", [49407]), ("sd2", [0]), ("sdxl", [49407, 0])])
def test_each_tokenizer_has_its_own_padding(kind: str, pads: list[int]) -> None:
    assert [tokenizer.pad_token_id for tokenizer, _ in tiny_backend(kind)._texters] == pads
    assert tiny_backend(kind).encode(["cat"]).ids[0][3:] == [pads[0]] * 74


def test_encoding_needs_no_more_than_77_tokens() -> None:
    with pytest.raises(ErasureError, match="has 80 tokens and the text encoder reads 75"):
        tiny_backend("sd1").encode(["cat " * 80])


def noisy(backend: DiffusersBackend, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, Any]:
    z = backend.noise(range(n))
    return z, torch.tensor([1, 500, 981])[:n], backend.encode(["cat", "dog", "a ship"][:n])


def test_v_prediction_gives_noise() -> None:
    """One DDIM step with eps from the v-model is the step that the scheduler takes with v."""
    from diffusers import DDIMScheduler

    backend = tiny_backend("sd2")
    z, t, text = noisy(backend)
    with torch.no_grad():
        eps = backend.predict_noise(z, t, text)
        v = backend.unet(z, t, text.states)[0]
    of_eps = DDIMScheduler.from_config(backend.scheduler.config, prediction_type="epsilon")
    of_eps.set_timesteps(50)
    backend.scheduler.set_timesteps(50)
    for i, step in enumerate(t):
        ours, theirs = of_eps.step(eps[i], step, z[i]), backend.scheduler.step(v[i], step, z[i])
        torch.testing.assert_close(ours.prev_sample, theirs.prev_sample, atol=1e-4, rtol=1e-4)
        x0 = theirs.pred_original_sample
        a = backend.scheduler.alphas_cumprod[step]
        torch.testing.assert_close(a.sqrt() * x0 + (1 - a).sqrt() * eps[i], z[i], **TOLERANCE)
    assert (eps - v).abs().max() > 0.1


def test_epsilon_is_passed_on() -> None:
    backend = tiny_backend("sd1")
    z, t, text = noisy(backend)
    with torch.no_grad():
        assert torch.equal(backend.predict_noise(z, t, text), backend.unet(z, t, text.states)[0])


def test_other_schedulers_do_not_make_ddim_clip() -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny_backend("sd1").pipe
    kept = pipe.scheduler
    try:
        pipe.scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        config = DiffusersBackend(pipe, SIDE).scheduler.config
        assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
        pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="sample")
        with pytest.raises(ErasureError, match='predicts "sample"'):
            DiffusersBackend(pipe, SIDE)
    finally:
        pipe.scheduler = kept


def snapshot(backend: DiffusersBackend) -> tuple[Any, ...]:
    """Everything about the UNet that an edit might leave changed; Parameters by identity and by content."""
    unet, digest = backend.unet, hashlib.sha256()
    for name, value in unet.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return (
        digest.hexdigest(),
        [(n, id(p), p.requires_grad, p.grad is None) for n, p in unet.named_parameters()],
        [(n, id(m), m.training) for n, m in unet.named_modules()],
        hasattr(unet, "peft_config"),
        bool(unet._hf_peft_config_loaded),
    )


def random_deltas(backend: DiffusersBackend) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(w.shape, generator=g) * 0.05 for name, w in backend.projections().items()}


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cancel", [False, True])
def test_edits_are_undone(kind: str, cancel: bool) -> None:
    backend = tiny_backend(kind)
    before, deltas, base = snapshot(backend), random_deltas(backend), {n: w.clone() for n, w in backend.projections().items()}
    z, t, text = noisy(backend)
    with torch.no_grad():
        plain = backend.predict_noise(z, t, text)
        try:
            with backend.edited(deltas):
                for name, w in backend.projections().items():
                    assert torch.equal(w, base[name] + deltas[name])
                assert (backend.predict_noise(z, t, text) - plain).abs().max() > 1e-4
                first = dict(list(deltas.items())[:1])
                with backend.edited(first):
                    name = next(iter(first))
                    torch.testing.assert_close(backend.projections()[name], base[name] + 2 * first[name])
                if cancel:
                    raise Cancelled
        except Cancelled:
            pass
        assert torch.equal(backend.predict_noise(z, t, text), plain)
    assert snapshot(backend) == before


def test_edits_of_another_model_are_refused() -> None:
    backend = tiny_backend("sd1")
    before, name = snapshot(backend), backend.names[-1]
    with pytest.raises(ErasureError, match=r"no layer down_blocks\.9"), backend.edited({"down_blocks.9.to_k": torch.zeros(1)}):
        pass
    with (
        pytest.raises(ErasureError, match=rf"edit of {name} has shape \(1, 768\) instead of"),
        backend.edited(random_deltas(backend) | {name: torch.zeros(1, 768)}),
    ):
        pass
    assert snapshot(backend) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cancel", [False, True])
def test_training_leaves_the_model_as_it_was(kind: str, cancel: bool) -> None:
    backend = tiny_backend(kind)
    frozen = next(iter(backend.unet.parameters()))
    frozen.requires_grad_(False)  # flags differ, and each must come back
    try:
        before, deltas = snapshot(backend), random_deltas(backend)
        z, t, text = noisy(backend, 1)
        with torch.no_grad():
            plain = backend.predict_noise(z, t, text)
            with backend.edited(deltas):
                edited = backend.predict_noise(z, t, text)
        try:
            with backend.training(deltas, AlignmentConfig(rank=2)) as student:
                assert sorted(student.factors()) == sorted(backend.names)
                with torch.no_grad(), student.teacher():
                    torch.testing.assert_close(student.predict_noise(z, t, text), plain, **TOLERANCE)
                optimizer = torch.optim.SGD(student.parameters(), 1.0)
                loss = student.predict_noise(z, t, text)
                torch.testing.assert_close(loss.detach(), edited, **TOLERANCE)
                loss.square().sum().backward()
                optimizer.step()
                factors = student.factors()
                assert any(up.abs().max() > 0 for _, up in factors.values())
                with torch.no_grad():
                    trained = student.predict_noise(z, t, text)
                if cancel:
                    raise Cancelled
        except Cancelled:
            pass
        assert snapshot(backend) == before
        total = {n: deltas[n] + factors[n][1] @ factors[n][0] for n in deltas}
        with torch.no_grad(), backend.edited(total):
            torch.testing.assert_close(backend.predict_noise(z, t, text), trained, atol=1e-4, rtol=1e-3)
    finally:
        frozen.requires_grad_(True)


def test_training_that_cannot_start_leaves_no_trace() -> None:
    backend = tiny_backend("sd1")
    before = snapshot(backend)
    with (
        pytest.raises(ErasureError, match="no layer of the model ends with attn9"),
        backend.training({}, AlignmentConfig(targets=("attn9",))),
    ):
        pass
    with (
        pytest.raises(ErasureError, match="no layer nowhere"),
        backend.training({"nowhere": torch.zeros(1)}, AlignmentConfig()),
    ):
        pass
    assert snapshot(backend) == before
    with backend.training({}, AlignmentConfig()):
        pass
    assert snapshot(backend) == before, "and it can start afterwards"


def test_thousands_of_prompts_do_not_stay_in_memory() -> None:
    """A list of a hundred concepts asks for 6,000 prompts; a batch larger than the limit still comes whole."""
    cache = TextCache(limit=3)
    for i in range(10):
        assert cache.missing([f"{i}", f"{i}"]) == [f"{i}"]
        cache.put(f"{i}", TextStates(torch.full((1, 77, 4), float(i)), [[i]]))
        cache.gather([f"{i}"])
    assert cache.missing([f"{i}" for i in range(10)]) == [f"{i}" for i in range(7)]
    for i in range(7):
        cache.put(f"{i}", TextStates(torch.full((1, 77, 4), float(i)), [[i]]))
    assert cache.gather([f"{i}" for i in range(10)]).states[:, 0, 0].tolist() == list(range(10))
