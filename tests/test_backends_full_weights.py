"""Full weights in training on tiny models: the same numbers as plain training, and a UNet that nothing was written to."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch
from safetensors import safe_open

from realera_nodes.backends.full_weights import edited_parameters, esd
from realera_nodes.core.alignment import join
from realera_nodes.core.concepts import Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.esd import ESD_NEWER, ESD_ORIGINAL, EsdConfig, esd_loss, partly_denoised
from realera_nodes.core.spans import TextStates
from realera_nodes.core.training import TrainState
from realera_nodes.formats.unet_names import ldm_parameters
from tests.tiny import KINDS, tiny_backend, tiny_files

X, U = EsdConfig(variant="x"), EsdConfig(variant="u")
QUICK = {"steps": 3, "lr": 1e-3, "sampling_steps": 3}


class Cancelled(Exception):
    pass


def snapshot(backend: Any) -> tuple[Any, ...]:
    """Everything about the UNet that training might leave changed; Parameters by identity and by content."""
    unet, digest = backend.unet, hashlib.sha256()
    for name, value in unet.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return (
        digest.hexdigest(),
        [(n, id(p), p.requires_grad, p.grad is None) for n, p in unet.named_parameters()],
        [(n, id(m), m.training, len(m._forward_hooks)) for n, m in unet.named_modules()],
    )


def asked(backend: Any, n: int = 2) -> tuple[torch.Tensor, torch.Tensor, Any]:
    return backend.noise(range(n)), torch.tensor([1, 500])[:n], backend.encode(["cat", "dog"][:n])


def test_x_and_u_share_the_parameters_between_them() -> None:
    backend = tiny_backend("sd1")
    every = {n for n, _ in backend.unet.named_parameters()}
    whole = EsdConfig(variant="u", left_out="nothing")
    with backend.training_weights(X.trains) as x, backend.training_weights(whole.trains) as u:
        assert set(x.base) | set(u.base) == every
        assert not set(x.base) & set(u.base)
        assert {n + ".weight" for n in backend.names} < set(x.base)
        assert {"conv_in.bias", "time_embedding.linear_1.weight"} < set(u.base)
        assert [tuple(p.shape) for p in x.parameters()] == [tuple(p.shape) for p in x.base.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_u_trains_what_the_codes_train(kind: str) -> None:
    """The first code goes by LDM's names: neither cross-attention, nor what begins with "out.", nor what holds "time_embed".
    The later one by classes: linear layers and convolutions outside of cross-attention."""
    backend = tiny_backend(kind)
    every = {n for n, _ in backend.unet.named_parameters()}
    with safe_open(tiny_files(kind)[1], "pt") as file:
        prefix = "model.diffusion_model."
        ldm = [n.removeprefix(prefix) for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118
    names = ldm_parameters(ldm, kind == "sdxl")
    assert set(names) == every
    first = {n for n, old in names.items() if not (old.startswith("out.") or "attn2" in old or "time_embed" in old)}
    later = {
        f"{path}.{n}" for path, module in backend.unet.named_modules() if type(module).__name__ in ("Linear", "Conv2d")
        and "attn2" not in path for n, _ in module.named_parameters()
    }  # fmt: skip
    for left_out, wanted in (("ends", first), ("norms", later)):
        assert {n for n in every if EsdConfig(variant="u", left_out=left_out).trains(n)} == wanted
    assert ESD_ORIGINAL.left_out == "ends"
    assert ESD_NEWER.left_out == "norms"


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_the_model(kind: str) -> None:
    backend = tiny_backend(kind)
    z, t, text = asked(backend)
    with torch.no_grad():
        plain = backend.predict_noise(z, t, text)
        with backend.training_weights(U.trains) as student:
            assert student.latent_shape == tuple(z.shape[1:])
            with student.tuned():
                assert torch.equal(student.predict_noise(z, t, text), plain)
                with student.frozen():
                    assert torch.equal(student.predict_noise(z, t, text), plain)


@pytest.mark.parametrize("config", [X, U], ids=["x", "u"])
def test_a_step_is_that_of_plain_training(config: EsdConfig) -> None:
    """Gradients of the differences are those of the weights themselves, in a copy of the UNet that may be written to."""
    backend = tiny_backend("sd1")
    z, t, text = asked(backend)
    plain = copy.deepcopy(backend.unet).requires_grad_(False)
    trained = {n: p.requires_grad_(True) for n, p in plain.named_parameters() if config.trains(n)}
    expected = plain(z, t, text.states)[0]
    expected.square().mean().backward()
    with backend.training_weights(config.trains) as student:
        with student.tuned():
            noise = student.predict_noise(z, t, text)
            noise.square().mean().backward()
        assert torch.equal(noise, expected)
        for (name, p), delta in zip(student.base.items(), student.parameters(), strict=True):
            assert p.grad is None
            torch.testing.assert_close(delta.grad, trained[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_to_a_latent_is_that_of_the_sampler(kind: str) -> None:
    """``partly_denoised`` with guidance, against every latent of the pipeline's own run."""
    backend = tiny_backend(kind)
    run = backend.trajectories("cat", 1, 5, 3.0, seed=4)
    noise, cat, empty = backend.noise([4]), backend.encode(["cat"]), backend.encode([""])
    if kind == "sdxl":  # whose pipeline takes zeros for no prompt
        empty = TextStates(torch.zeros_like(empty.states), empty.ids, torch.zeros_like(empty.pooled))
    with backend.training_weights(X.trains) as student, torch.no_grad(), student.frozen():
        timesteps, alphas = student.schedule(5)
        assert torch.equal(timesteps, run.timesteps)
        for until in range(5):
            z = partly_denoised(student, noise, cat, empty, timesteps[: until + 1], alphas, 3.0)
            torch.testing.assert_close(z, run.latents[:, until], rtol=1e-3, atol=1e-3)
    assert float((run.latents[:, 4] - noise).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cancel", [False, True])
def test_training_leaves_the_model_as_it_was(kind: str, cancel: bool) -> None:
    backend = tiny_backend(kind)
    frozen = next(iter(backend.unet.parameters()))
    frozen.requires_grad_(False)  # flags differ, and each must come back
    try:
        before = snapshot(backend)
        z, t, text = asked(backend)
        try:
            with backend.training_weights(U.trains) as student:
                optimizer = torch.optim.SGD(student.parameters(), 1.0)
                with student.tuned():
                    student.predict_noise(z, t, text).square().sum().backward()
                optimizer.step()
                deltas = student.deltas()
                assert all(torch.isfinite(d).all() for d in deltas.values())
                with torch.no_grad(), student.tuned():
                    trained = student.predict_noise(z, t, text)
                    if cancel:
                        raise Cancelled
        except Cancelled:
            pass
        assert snapshot(backend) == before
        with torch.no_grad(), edited_parameters(backend.unet, deltas):
            if not cancel:
                assert torch.equal(backend.predict_noise(z, t, text), trained)
        assert snapshot(backend) == before
    finally:
        frozen.requires_grad_(True)


def test_half_weights_keep_small_steps_in_float32() -> None:
    """A difference that bfloat16 would round away is kept, and shows once it has grown."""
    backend = copy.copy(tiny_backend("sd1"))
    backend.unet = copy.deepcopy(backend.unet).bfloat16()
    z, t, text = asked(backend)
    with backend.training_weights(X.trains) as student, torch.no_grad():
        plain = backend.predict_noise(z, t, text)
        for _ in range(100):
            for p, delta in zip(student.base.values(), student.parameters(), strict=True):
                delta += 1e-4 * p.float()
                assert delta.dtype == torch.float32
        with student.tuned():
            grown = student.predict_noise(z, t, text)
    assert not torch.equal(grown, plain)
    deltas = student.deltas()
    name = next(n for n in deltas if n.endswith("to_k.weight"))
    torch.testing.assert_close(deltas[name], 1e-2 * student.base[name].float(), rtol=1e-4, atol=1e-9)


def test_small_gradients_survive_half_precision() -> None:
    """The gradients of a loss as small as a trained one's, which float16 alone would lose, are those of float32."""
    whole, half = tiny_backend("sd1"), copy.copy(tiny_backend("sd1"))
    half.unet = copy.deepcopy(half.unet).half()
    z, t, text = asked(whole)
    found = []
    for backend in (whole, half):
        with backend.training_weights(X.trains) as student:
            with student.tuned():
                loss = 1e-4 * student.predict_noise(z, t, text).square().mean()
                (loss * student.loss_scale).backward()
            found.append(torch.cat([p.grad.flatten() for p in student.parameters()]) / student.loss_scale)
            assert student.loss_scale == (1 if backend is whole else 2**13)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05
    with half.training_weights(X.trains) as student:
        with student.tuned():
            (1e-4 * student.predict_noise(z, t, text).square().mean()).backward()
        lost = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert float((lost - found[0]).norm() / found[0].norm()) > 0.05, "the scale is not needed here: a weaker test than meant"


def test_quantised_weights_are_refused() -> None:
    backend = copy.copy(tiny_backend("sd1"))
    backend.unet = copy.deepcopy(backend.unet)
    layer = backend.unet.get_submodule(backend.names[0])
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with (
        pytest.raises(ErasureError, match=r"held as torch\.float8_e4m3fn, which cannot be trained"),
        backend.training_weights(X.trains),
    ):
        pass


@pytest.mark.parametrize(("variant", "lr"), [("x", 1e-4), ("u", 3e-6)])
def test_esd_moves_the_concept_away(variant: str, lr: float) -> None:
    """The loss on its own prompt and latent falls under the learned differences."""
    backend = tiny_backend("sd1")
    before = snapshot(backend)
    deltas, state = esd(backend, [Concept("cat", "sky")], EsdConfig(variant=variant, steps=20, lr=lr, sampling_steps=1))
    assert snapshot(backend) == before
    assert (state.step, len(state.losses)) == (20, 20)
    assert all(EsdConfig(variant=variant).trains(n) for n in deltas)
    assert sum(float(d.abs().sum()) for d in deltas.values()) > 0
    z, t, cat, empty = backend.noise([0]), torch.tensor([1]), backend.encode(["cat"]), backend.encode([""])
    with torch.no_grad():
        concept, nothing = (backend.predict_noise(z, t, x) for x in (cat, empty))
        with edited_parameters(backend.unet, deltas):
            after = float(esd_loss(backend.predict_noise(z, t, cat), concept, nothing, 1.0))
        assert after < 0.9 * float(esd_loss(concept, concept, nothing, 1.0))


def test_the_models_own_answer_as_target_changes_nothing() -> None:
    deltas, state = esd(tiny_backend("sd1"), [Concept("cat", "sky")], EsdConfig(eta=0.0, origin="concept", **QUICK))
    assert state.losses == [0.0] * 3
    assert all(not d.any() for d in deltas.values())


def test_a_cancelled_run_resumes_to_the_same_weights() -> None:
    backend, config, state = tiny_backend("sd1"), EsdConfig(**QUICK), TrainState()
    concepts = [Concept("cat", "sky"), Concept("dog", "sky")]

    def cancel(now: TrainState) -> None:
        if now.step == 2:
            raise Cancelled

    before = snapshot(backend)
    whole, full = esd(backend, concepts, config)
    with pytest.raises(Cancelled):
        esd(backend, concepts, config, cancel, state)
    assert snapshot(backend) == before
    again, resumed = esd(backend, concepts, config, state=state)
    assert resumed.losses == full.losses
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_the_later_code_runs_on_sdxl() -> None:
    """Pooled states and sizes go along."""
    backend = tiny_backend("sdxl")
    before = snapshot(backend)
    config = EsdConfig(**{**vars(ESD_NEWER), "steps": 1, "sampling_steps": 2})
    deltas, _ = esd(backend, [Concept("cat", "sky")], config)
    assert any(d.any() for d in deltas.values())
    assert snapshot(backend) == before


def test_batches_of_prompts() -> None:
    backend = tiny_backend("sd1")
    texts = backend.encode(["cat", "dog"])
    assert len(join([texts[0], texts[1]])) == 2
    _, state = esd(backend, [Concept("cat", "sky"), Concept("dog", "sky")], EsdConfig(**QUICK, batch=3))
    assert state.step == 3


def test_edits_of_another_model_are_refused() -> None:
    backend = tiny_backend("sd1")
    before, name = snapshot(backend), "conv_in.weight"
    good = {name: torch.zeros_like(backend.unet.conv_in.weight)}
    for bad, sentence in (
        ({"down_blocks.9.conv.weight": torch.zeros(1)}, r"no parameter down_blocks\.9"),
        ({"conv_in.scale": torch.zeros(1)}, r"no parameter conv_in\.scale"),
        ({"conv_out.weight": torch.zeros(1, 2)}, r"shape \(1, 2\) instead of"),
    ):
        with pytest.raises(ErasureError, match=sentence), edited_parameters(backend.unet, good | bad):
            pass
        assert snapshot(backend) == before


def test_training_nothing_is_refused() -> None:
    backend = tiny_backend("sd1")
    before = snapshot(backend)
    with pytest.raises(ErasureError, match="no weight of the model was chosen"), backend.training_weights(lambda name: False):
        pass
    assert snapshot(backend) == before
