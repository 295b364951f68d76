"""ESD on toy networks: its target, its way to x_t, what it converges to, resumption and what stops it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from realera_nodes.core.alignment import join
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.esd import EsdConfig, denoised, esd_loss, partly_denoised, train_esd
from realera_nodes.core.spans import TextStates
from realera_nodes.core.training import TrainState

WIDTH, LENGTH, SHAPE = 6, 3, (4, 2, 2)
CONFIG = EsdConfig(steps=6, lr=1e-2, batch=2, sampling_steps=5)


def text(seed: int) -> TextStates:
    return TextStates(torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)), [[seed] * LENGTH])


EMPTY, CONCEPTS = text(0), join([text(1), text(2)])


@dataclass
class Toy:
    """eps = z / 10 + (W + D) m, with m the mean text state: W frozen, D trained."""

    calls: list[tuple[str, Tensor, Tensor, TextStates]] = field(default_factory=list)
    mode: str = "none"
    spoil_after: int = 10**9
    latent_shape: tuple[int, ...] = SHAPE
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        n = math.prod(SHAPE)
        self.base = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(7))
        self.delta = nn.Parameter(torch.zeros(n, WIDTH))

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        t = (torch.arange(steps) * (1000 // steps) + 1).flip(0)
        return t, torch.cos(t / 1000 * 1.5).square()

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        assert self.mode != "none"
        self.calls.append((self.mode, z.detach().clone(), t.clone(), text))
        w = self.base + self.delta if self.mode == "tuned" else self.base
        noise = z / 10 + (text.states.mean(1) @ w.T).reshape(-1, *SHAPE)
        return noise * float("nan") if len(self.calls) > self.spoil_after else noise

    @contextmanager
    def _as(self, mode: str) -> Iterator[None]:
        assert self.mode == "none"
        self.mode = mode
        try:
            yield
        finally:
            self.mode = "none"

    def frozen(self):
        return self._as("frozen")

    def tuned(self):
        return self._as("tuned")

    def parameters(self) -> list[nn.Parameter]:
        return [self.delta]


def train(model: Toy, config: EsdConfig = CONFIG, **more) -> TrainState:
    return train_esd(model, CONCEPTS, EMPTY, config, **more)


def mean(states: TextStates) -> Tensor:
    return states.states.mean(1)


def test_the_loss_by_hand() -> None:
    """Target 1 - 0.5 (3 - 1) = 0, and from the concept 3 - 0.5 (3 - 1) = 2."""
    tuned, concept, empty = torch.tensor([4.0]), torch.tensor([3.0]), torch.tensor([1.0])
    assert float(esd_loss(tuned, concept, empty, 0.5)) == 16
    assert float(esd_loss(tuned, concept, empty, 0.5, "concept")) == 4
    halves = [x.bfloat16() for x in (tuned, concept, empty)]
    assert esd_loss(*halves, 0.5).dtype == torch.float32


def test_eta_2_of_the_later_code_is_eta_1_of_the_paper() -> None:
    parts = [torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert float(esd_loss(*parts, 2.0, "concept")) == pytest.approx(float(esd_loss(*parts, 1.0)), rel=1e-6)
    models = Toy(), Toy()
    train(models[0], replace(CONFIG, eta=1.0))
    train(models[1], replace(CONFIG, eta=2.0, origin="concept"))
    torch.testing.assert_close(models[0].delta, models[1].delta, rtol=1e-3, atol=1e-5)


def test_eta_0_from_the_concept_changes_nothing() -> None:
    """The target is the model's own answer, to the last bit, and Adam stays."""
    model = Toy()
    state = train(model, replace(CONFIG, eta=0.0, origin="concept"))
    assert state.losses == [0.0] * 6
    assert torch.equal(model.delta, torch.zeros_like(model.delta))


def test_eta_0_from_the_empty_prompt_forgets_the_prompt() -> None:
    """eps(c) is drawn to eps0(""): not nothing, as eps0(c) is what eta -1 keeps."""
    model = Toy()
    assert train(model, replace(CONFIG, steps=1, eta=0.0)).losses[0] > 0.1
    assert train(Toy(), replace(CONFIG, steps=1, eta=-1.0)).losses[0] < 1e-12


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_first_loss_is_the_distance_to_the_target(eta: float) -> None:
    """Untrained, eps(c) - [eps0("") - eta (eps0(c) - eps0(""))] = (1 + eta) (eps0(c) - eps0(""))."""
    model = Toy()
    state = train(model, replace(CONFIG, steps=1, eta=eta))
    asked = model.calls[-1][3]
    gap = (mean(asked) - mean(EMPTY)) @ model.base.T
    assert state.losses[0] == pytest.approx((1 + eta) ** 2 * float(gap.square().mean()), rel=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_it_converges_to_the_negated_concept(eta: float) -> None:
    model = Toy()
    train(model, replace(CONFIG, steps=600, lr=3e-2, eta=eta, sampling_steps=1))
    for concept in (CONCEPTS[0], CONCEPTS[1]):
        wanted = (mean(EMPTY) - eta * (mean(concept) - mean(EMPTY))) @ model.base.T
        torch.testing.assert_close(
            mean(concept) @ (model.base + model.delta).T, wanted, rtol=0, atol=0.02 * float(wanted.abs().max())
        )


def test_a_step_draws_with_the_tuned_and_aims_with_the_frozen_network() -> None:
    model = Toy()
    train(model, replace(CONFIG, steps=20))
    timesteps, _ = model.schedule(5)
    i, lengths = 0, []
    while i < len(model.calls):
        start = i
        while model.calls[i][0] == "tuned":
            _, z, t, asked = model.calls[i]
            assert len(z) == 4, "both halves of the guidance in one call"
            assert torch.equal(z[:2], z[2:])
            assert torch.equal(asked.states[2:], EMPTY.states.expand(2, -1, -1))
            assert set(t.tolist()) == {int(timesteps[i - start])}
            i += 1
        aims, answer = model.calls[i : i + 2], model.calls[i + 2]
        assert [c[0] for c in (*aims, answer)] == ["frozen", "frozen", "tuned"]
        assert all(torch.equal(c[1], answer[1]) for c in aims)
        assert all(set(c[2].tolist()) == {int(timesteps[i - start])} for c in (*aims, answer))
        assert torch.equal(aims[0][3].states, answer[3].states)
        assert torch.equal(aims[1][3].states, EMPTY.states.expand(2, -1, -1))
        assert all(any(torch.equal(x, c) for c in CONCEPTS.states) for x in answer[3].states)
        lengths.append(i - start)
        i += 3
    assert len(lengths) == 20
    assert set(lengths) == {0, 1, 2, 3, 4}


def test_the_frozen_network_may_draw() -> None:
    model = Toy()
    train(model, replace(CONFIG, drawn_by="frozen"))
    assert [c[0] for c in model.calls].count("tuned") == 6


class Denoiser:
    """Knows the picture: eps = (z - sqrt(a) x0) / sqrt(1 - a), x0 = 0 for the empty prompt."""

    def __init__(self, picture: Tensor, timesteps: Tensor, alphas: Tensor):
        self.picture, self.alphas = picture, dict(zip(timesteps.tolist(), alphas.tolist(), strict=True))

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        a = torch.tensor([self.alphas[int(x)] for x in t], dtype=z.dtype)[:, None, None, None]
        x0 = torch.stack([self.picture * (ids[0] != 0) for ids in text.ids])
        return (z - a.sqrt() * x0) / (1 - a).sqrt()


@pytest.mark.parametrize("until", [0, 1, 4])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_denoising_goes_straight_to_a_known_picture(until: int, guidance: float) -> None:
    """Guided, the picture is guidance times its own: x_t = sqrt(a_t) g x0 + sqrt(1 - a_t) n, n from the first latent."""
    g = torch.Generator().manual_seed(0)
    timesteps, alphas = Toy().schedule(5)
    picture, noise = (torch.randn(*s, generator=g, dtype=torch.float64) for s in (SHAPE, (2, *SHAPE)))
    model = Denoiser(picture, timesteps, alphas)
    ways: list[tuple[int, int]] = []
    z = partly_denoised(model, noise, CONCEPTS, join([EMPTY, EMPTY]), timesteps[: until + 1], alphas, guidance,
                        lambda *at: ways.append(at))  # fmt: skip
    first, last = float(alphas[0]), float(alphas[until])
    n = (noise - math.sqrt(first) * guidance * picture) / math.sqrt(1 - first)
    torch.testing.assert_close(z, math.sqrt(last) * guidance * picture + math.sqrt(1 - last) * n, rtol=1e-6, atol=1e-6)
    assert ways == [(i, until) for i in range(until)]


def test_the_base_weights_and_the_texts_stay() -> None:
    model = Toy()
    before = [model.base.clone(), CONCEPTS.states.clone(), EMPTY.states.clone()]
    train(model)
    assert float(model.delta.detach().abs().max()) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, (model.base, CONCEPTS.states, EMPTY.states), strict=True))


def test_the_same_seed_trains_the_same_whatever_the_global_one() -> None:
    models = [Toy(), Toy(), Toy()]
    states = []
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(len(states))
        states.append(train(model, replace(CONFIG, seed=seed)))
    assert states[0].losses == states[1].losses != states[2].losses
    assert torch.equal(models[0].delta, models[1].delta)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int) -> None:
    kept: list[TrainState] = []

    def keep(state: TrainState) -> None:
        if state.step == stop:
            kept.append(copy.deepcopy(state))

    whole, resumed = Toy(), Toy()
    full = train(whole, on_step=keep)
    again = train(resumed, state=kept[0])
    assert (again.step, again.losses) == (6, full.losses)
    assert torch.equal(whole.delta, resumed.delta)


@pytest.mark.parametrize("calls", [0, 7])
def test_a_run_cancelled_on_the_way_to_a_latent_resumes_to_the_same_result(calls: int) -> None:
    class Cancelled(Exception):
        pass

    state, seen = TrainState(), []

    def on_denoise(done: int, total: int) -> None:
        assert 0 <= done < total <= 4
        seen.append(done)
        if len(seen) > calls:
            raise Cancelled

    whole, stopped, resumed = Toy(), Toy(), Toy()
    full = train(whole)
    with pytest.raises(Cancelled):
        train(stopped, state=state, on_denoise=on_denoise)
    assert state.step == len(state.losses) < 6
    assert stopped.mode == "none"
    assert train(resumed, state=state).losses == full.losses
    assert torch.equal(whole.delta, resumed.delta)


def test_what_on_step_raises_comes_through() -> None:
    def on_step(state: TrainState) -> None:
        if state.step == 3:
            raise KeyboardInterrupt

    model, state = Toy(), TrainState()
    with pytest.raises(KeyboardInterrupt):
        train(model, on_step=on_step, state=state)
    assert (state.step, model.mode) == (3, "none")


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    calm = Toy()
    train(calm, replace(CONFIG, steps=1))
    model, state = Toy(spoil_after=len(calm.calls)), TrainState()
    with pytest.raises(ErasureError, match=r"^the loss is not finite at step 2: lower lr \(now 0\.01\) or eta \(now 1\)\.$"):
        train(model, state=state)
    assert (state.step, model.mode) == (1, "none")
    assert torch.equal(model.delta, calm.delta)


def test_a_damaged_model_is_named_before_anything_is_trained() -> None:
    model, state = Toy(spoil_after=0), TrainState()
    with pytest.raises(ErasureError, match="the model predicts NaN or infinite noise: its weights are damaged"):
        train(model, state=state)
    assert (state.step, model.mode) == (0, "none")
    assert torch.equal(model.delta, torch.zeros_like(model.delta))


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_the_losss_scale_changes_no_step(clip: float) -> None:
    plain, scaled = Toy(), Toy(loss_scale=2.0**13)
    a, b = (train(model, replace(CONFIG, clip=clip)) for model in (plain, scaled))
    assert torch.equal(plain.delta, scaled.delta)
    assert a.losses == b.losses


def test_gradients_that_overflow_are_named() -> None:
    model = Toy(loss_scale=math.inf)
    with pytest.raises(ErasureError, match="gradients overflow half precision"):
        train(model)
    assert torch.equal(model.delta, torch.zeros_like(model.delta))


def test_the_whole_way_ends_without_noise() -> None:
    """A model that knows the noise is led to the clean latent in any number of steps."""
    clean, noise = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(5))

    class Knows:
        def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
            return noise.expand(len(z), *SHAPE)

    for steps in (1, 5):
        timesteps, alphas = Toy().schedule(steps)
        start = alphas[0].sqrt() * clean + (1 - alphas[0]).sqrt() * noise
        found = denoised(Knows(), start, CONCEPTS[0], EMPTY, timesteps, alphas, 3.0)
        torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_clipped() -> None:
    """After one Adam step exp_avg is a tenth of the gradient."""
    loose, tight = (train(Toy(), replace(CONFIG, steps=1, clip=c)) for c in (0.0, 1e-3))
    norms = [float(s.first[0].norm()) * 10 for s in (loose, tight)]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_a_schedule_without_signal_is_refused() -> None:
    class Zero(Toy):
        def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
            t, a = super().schedule(steps)
            return t, torch.cat([torch.zeros(1), a[1:]])

    with pytest.raises(ErasureError, match="zero terminal SNR"):
        train(Zero())
