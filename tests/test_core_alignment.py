"""Noise alignment on a linear toy network: schedule, weights, resumption and what stops it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from realera_nodes.core.alignment import (
    AlignmentConfig,
    TrainState,
    align_noise,
    concept_loss,
    join,
    neighbor_loss,
    noise_alignment_loss,
)
from realera_nodes.core.errors import ErasureError
from tests.toy_student import CONFIG, LENGTH, MINING, PAIRS, RUNS, SIZE, START, WIDTH, Toy, pair, run, text, train


def owner(states: torch.Tensor, what: str) -> int | None:
    """Which pair's concept or anchor a row is."""
    return next((i for i, p in enumerate(PAIRS) if torch.equal(states, getattr(p, what).states[0])), None)


def test_odd_steps_are_equation_8_and_even_steps_equation_9() -> None:
    model = Toy()
    state = train(model)
    assert state.step == len(state.losses) == 6
    assert [c.mode for c in model.calls] == ["teacher", "student"] * 6
    seen = []
    for step in range(1, 7):
        teacher, student = model.calls[2 * step - 2 : 2 * step]
        assert torch.equal(teacher.z, student.z)
        assert torch.equal(teacher.t, student.t)
        if step % 2:  # the concept itself, batch 2
            assert student.text.states.shape == (2, LENGTH, WIDTH)
            chosen = [owner(x, "text") for x in student.text.states]
            assert None not in chosen
            assert chosen == [owner(x, "anchor") for x in teacher.text.states]
            assert noise_alignment_loss(student.noise, teacher.noise).item() == state.losses[step - 1]
        else:  # neighbors to the unperturbed anchor, and as many beyond-concept samples to themselves
            chosen = [owner(x, "anchor") for x in teacher.text.states[:2]]
            assert None not in chosen
            assert torch.equal(teacher.z[:2], teacher.z[2:])
            assert torch.equal(teacher.text.states[2:], student.text.states[2:])
            for i, near, far in zip(chosen, student.text.states[:2], student.text.states[2:], strict=True):
                e = PAIRS[i].rows[0]
                assert torch.equal(near[:START], PAIRS[i].text.states[0, :START])
                assert torch.equal(far[:START], PAIRS[i].text.states[0, :START])
                cos = [float(torch.nn.functional.cosine_similarity(x[START:].flatten(), e.flatten(), dim=0)) for x in (near, far)]
                assert MINING.s2 - 1e-4 <= cos[0] <= MINING.s1 + 1e-4
                assert cos[1] < MINING.s2 + 1e-4
            seen.append(student.text.states[:2])
        for i, z, t in zip(chosen, teacher.z, teacher.t, strict=False):  # z_t comes from this pair's anchor
            at = int(t) // 100
            assert int(t) == int(RUNS[i].timesteps[at])
            assert any(torch.equal(z, RUNS[i].latents[k, at]) for k in range(3))
    assert not torch.equal(seen[0], seen[1])  # sampled anew at every even step


def test_without_neighbors_every_step_is_equation_8() -> None:
    model = Toy()
    train(model, replace(CONFIG, neighbors=False))
    assert len(model.calls) == 12
    assert all(owner(x, "text") is not None for c in model.calls[1::2] for x in c.text.states)


def test_equation_9_weighs_its_terms() -> None:
    model, config = Toy(), replace(CONFIG, gamma_1=0.3, gamma_2=0.7)
    model.adapters.load({"attn2.to_k": (torch.ones(2, WIDTH), torch.ones(4 * SIZE * SIZE, 2))})
    loss = neighbor_loss(model, PAIRS, RUNS, replace(MINING, m=1, n=1), config, torch.Generator().manual_seed(1), None, (), ())
    teacher, student = model.calls
    erase = (student.noise[:2] - teacher.noise[:2]).square().mean()
    keep = (student.noise[2:] - teacher.noise[2:]).square().mean()
    assert float(keep) > 0
    assert float(loss.detach()) == pytest.approx(0.3 * float(erase) + 0.7 * float(keep), rel=1e-6)


def test_without_beyond_equation_9_has_one_term_and_needs_no_bound_of_the_other() -> None:
    """s2 begins beyond d2 here: no beyond-concept sample exists, and none is asked for."""
    model, config = Toy(), replace(CONFIG, beyond=False, steps=2)
    mining = replace(MINING, s2=0.2, s1=0.98, d1=1.0, inner=0.0, d2=1.0001)
    state = align_noise(model, PAIRS, RUNS, mining, config)
    teacher, student = model.calls[2:]
    assert len(student.text) == len(teacher.text) == 2
    assert state.losses[1] == pytest.approx(0.3 * float((student.noise - teacher.noise).square().mean()), rel=1e-6)


def test_kept_prompts_take_turns_with_beyond_samples() -> None:
    model, kept = Toy(), join([text(50), text(51)])
    train(model, replace(CONFIG, steps=40, batch=1), kept=kept)
    away = [c.text.states[1] for c in model.calls[3::4]]
    hits = [next((i for i, k in enumerate(kept.states) if torch.equal(x, k)), None) for x in away]
    assert set(hits) == {0, 1, None}
    assert all(torch.equal(c.text.states[1], s.text.states[1]) for c, s in zip(model.calls[2::4], model.calls[3::4], strict=True))


def test_named_neighbors_take_turns_with_random_ones() -> None:
    model, near, near_run = Toy(), pair(7), run(7)
    train(model, replace(CONFIG, steps=40, batch=1), near=[near], near_trajectories=[near_run])
    named = [c for c in model.calls[3::4] if torch.equal(c.text.states[0], near.text.states[0])]
    assert 0 < len(named) < 20
    assert all(int(c.t[0]) % 100 == 7 for c in named)
    targets = [c for c in model.calls[2::4] if torch.equal(c.text.states[0], near.anchor.states[0])]
    assert len(targets) == len(named)


def test_the_loss_falls() -> None:
    model = Toy(rank=8)
    state = train(model, replace(CONFIG, steps=150, lr=2e-2, neighbors=False, weight_decay=0.0))
    assert sum(state.losses[-10:]) < 0.05 * sum(state.losses[:10])


def test_the_base_weights_and_the_inputs_stay() -> None:
    model = Toy()
    before = [model.layer.weight.clone(), *(x.text.states.clone() for x in PAIRS), *(r.latents.clone() for r in RUNS)]
    train(model)
    after = [model.layer.weight, *(x.text.states for x in PAIRS), *(r.latents for r in RUNS)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_same_seed_trains_the_same() -> None:
    models = [Toy(), Toy(), Toy()]
    states = [train(m, replace(CONFIG, seed=s)) for m, s in zip(models, (5, 5, 6), strict=True)]
    assert states[0].losses == states[1].losses != states[2].losses
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("stop", [1, 2, 5, 7, 12])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int, accumulate: int) -> None:
    config = replace(CONFIG, steps=12, accumulate=accumulate, patience=9, check_every=3)
    kept: list[TrainState] = []

    def keep(state: TrainState) -> None:
        if state.step == stop:
            kept.append(copy.deepcopy(state))

    whole, resumed = Toy(), Toy()
    full = train(whole, config, on_step=keep)
    again = train(resumed, config, state=kept[0])
    assert again.step == 12
    assert again.losses == full.losses
    assert again.held == full.held
    for name, (down, up) in whole.factors().items():
        assert torch.equal(down, resumed.factors()[name][0])
        assert torch.equal(up, resumed.factors()[name][1])


def test_a_cancelled_run_resumes_to_the_same_result() -> None:
    state = TrainState()

    def cancel(now: TrainState) -> None:
        if now.step == 4:
            raise KeyboardInterrupt

    whole, stopped, resumed = Toy(), Toy(), Toy()
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, state=state, on_step=cancel)
    assert state.step == 4
    train(resumed, state=state)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_accumulated_steps_sum_their_gradients() -> None:
    """Two halves make one loss: their mean."""
    model = Toy()
    state = train(model, replace(CONFIG, steps=1, accumulate=2))
    assert [c.mode for c in model.calls] == ["teacher", "student"] * 2
    halves = [noise_alignment_loss(model.calls[i + 1].noise, model.calls[i].noise).item() / 2 for i in (0, 2)]
    assert state.losses == [pytest.approx(sum(halves), rel=1e-6)]


@pytest.mark.parametrize("calls", [0, 4])
def test_a_loss_that_is_not_finite_ends_the_training(calls: int) -> None:
    model, state = Toy(spoil_after=calls), TrainState()
    with pytest.raises(ErasureError, match=rf"^the loss is not finite at step {calls // 2 + 1}: lower lr \(now 0\.01\)\.$"):
        train(model, state=state)
    assert state.step == len(state.losses) == calls // 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (model.mode, model.adapters.on) == ("none", False)


def test_what_on_step_raises_comes_through() -> None:
    class Cancelled(Exception):
        pass

    seen: list[int] = []

    def on_step(state: TrainState) -> None:
        seen.append(state.step)
        if state.step == 3:
            raise Cancelled("by the user")

    model = Toy()
    with pytest.raises(Cancelled, match="by the user"):
        train(model, on_step=on_step)
    assert seen == [1, 2, 3]
    assert (model.mode, model.adapters.on) == ("none", False)


def test_patience_stops_a_loss_that_does_not_fall() -> None:
    """A concept that already is its anchor has held loss 0 at every check: first best, then two without a fall."""
    same = replace(pair(0), anchor=pair(0).text)
    config = replace(CONFIG, steps=50, neighbors=False, patience=2, check_every=3)
    state = align_noise(Toy(), [same], [run(0)], MINING, config)
    assert state.step == 9
    assert state.held == [0, 0, 0]


def test_the_held_loss_does_not_change_the_training() -> None:
    models = Toy(), Toy()
    plain = train(models[0])
    checked = train(models[1], replace(CONFIG, patience=50, check_every=2))
    assert plain.losses == checked.losses
    assert (len(plain.held), len(checked.held)) == (0, 3)


def test_the_gradient_is_clipped() -> None:
    """After one AdamW step exp_avg is a tenth of the gradient."""
    loose, tight = (train(Toy(), replace(CONFIG, steps=1, clip=c)) for c in (0.0, 1e-3))
    norms = [float(torch.cat([m.flatten() for m in s.first]).norm()) * 10 for s in (loose, tight)]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_the_loss_is_the_mean_square() -> None:
    assert float(noise_alignment_loss(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))) == 4.5
    half = noise_alignment_loss(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.0], dtype=torch.bfloat16))
    assert half.dtype == torch.float32


def test_concept_loss_starts_at_the_distance_of_the_teachers_answers() -> None:
    """A new adapter is zero, so that the student is the teacher."""
    model = Toy()
    loss = concept_loss(model, PAIRS[:1], RUNS[:1], replace(CONFIG, batch=1), torch.Generator().manual_seed(0))
    call = model.calls[0]
    with model.teacher(), torch.no_grad():
        concept = model.predict_noise(call.z, call.t, PAIRS[0].text)
    assert float(loss.detach()) == pytest.approx(float((concept - call.noise).square().mean()), rel=1e-6)


def test_draws_come_from_the_trajectories() -> None:
    runs = run(3)
    z, t = runs.draw(50, torch.Generator().manual_seed(0))
    assert z.shape == (50, 4, SIZE, SIZE)
    assert {int(x) for x in t} == {3, 103, 203, 303, 403}
    assert all(any(torch.equal(a, runs.latents[k, int(b) // 100]) for k in range(3)) for a, b in zip(z, t, strict=True))


def test_join_keeps_pooled_states_only_where_all_have_them() -> None:
    plain, pooled = text(1), replace(text(2), pooled=torch.ones(1, 3))
    joined = join([pooled, pooled])
    assert len(joined) == 2
    assert joined.ids == [[2] * LENGTH] * 2
    assert torch.equal(joined.pooled, torch.ones(2, 3))
    assert join([plain, pooled]).pooled is None


def test_scale_is_alpha_over_rank() -> None:
    assert AlignmentConfig(rank=4).scale == 1
    assert AlignmentConfig(rank=4, alpha=2.0).scale == 0.5


def test_the_largest_seed_trains() -> None:
    train(Toy(), replace(CONFIG, seed=2**64 - 1, steps=2, patience=1, check_every=1))
