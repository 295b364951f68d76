"""Attention suppression on a toy network with one layer of text attention: the loss, masks, schedule and resumption."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from realera_nodes.core.adapters import Factors, HookAdapters, initial_factors
from realera_nodes.core.attention import AttentionMaps, AttentionProbe
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.spans import TextStates
from realera_nodes.core.suppression import (
    ConceptPictures,
    ConceptPrompts,
    SuppressionConfig,
    attention_masks,
    concept_pictures,
    concept_prompts,
    noised,
    suppress,
    suppression_loss,
    with_masks,
)
from realera_nodes.core.training import TrainState

WIDTH, LENGTH, SIZE, HEADS = 10, 8, 4, 2
ALPHAS = torch.linspace(0.999, 0.01, 1000)


class Layer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.heads, self.pool = HEADS, seed
        self.to_q, self.to_k = nn.Linear(4, 6, bias=False), nn.Linear(WIDTH, 6, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        self.requires_grad_(False)


@dataclass
class Call:
    mode: str
    z: Tensor
    t: Tensor
    text: TextStates
    columns: list[int]
    masses: float


@dataclass
class Toy:
    """Two layers, at 4x4 and at 2x2 pixels, that look at the text; adapters are on their keys."""

    mode: str = "none"
    calls: list[Call] = field(default_factory=list)
    spoil_after: int = 10**9

    def __post_init__(self) -> None:
        self.layers = {f"{i}.attn2": Layer(i) for i in (1, 2)}
        keys = {f"{n}.to_k": layer.to_k for n, layer in self.layers.items()}
        start = initial_factors(dict.fromkeys(keys, (6, WIDTH)), 1, torch.Generator().manual_seed(5))
        self.adapters = HookAdapters(keys, start)
        self.adapters.attach()

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        for layer in self.layers.values():
            x = nn.functional.avg_pool2d(z, layer.pool).flatten(2).transpose(1, 2)
            layer.to_q(x)
            layer.to_k(text.states)
        return z

    def attention(self, z: Tensor, t: Tensor, text: TextStates, columns: Tensor | None = None) -> AttentionMaps:
        with AttentionProbe(self.layers) as probe:
            self.predict_noise(z, t, text)
            maps = probe.probabilities(columns)
        if len(self.calls) >= self.spoil_after:
            maps = {n: p * float("nan") for n, p in maps.items()}
        mass = float(sum(p.detach().sum() for p in maps.values()))
        self.calls.append(Call(self.mode, z, t, text, columns.tolist(), mass))
        return maps

    @contextmanager
    def _as(self, mode: str, on: bool) -> Iterator[None]:
        self.mode, self.adapters.on = mode, on
        try:
            yield
        finally:
            self.mode, self.adapters.on = "none", False

    def teacher(self):
        return self._as("teacher", False)

    def student(self):
        return self._as("student", True)

    def parameters(self) -> list[nn.Parameter]:
        return self.adapters.parameters()

    def factors(self) -> Factors:
        return self.adapters.factors()


def pictures(masks: Tensor | None = None, count: int = 3) -> ConceptPictures:
    """Tokens 2 and 3 are the phrase, 5 to 7 the end and padding."""
    g = torch.Generator().manual_seed(0)
    phrase, tail = torch.zeros(2, count, LENGTH, dtype=torch.bool)
    phrase[:, 2:4], tail[:, 5:] = True, True
    text = TextStates(torch.randn(count, LENGTH, WIDTH, generator=g), [[0] * LENGTH] * count)
    return ConceptPictures(torch.randn(count, 4, SIZE, SIZE, generator=g), text, phrase, tail, masks)


CONFIG = SuppressionConfig(steps=6, lr=1e-2, batch=2, mask="none")


def test_the_loss_is_equation_3_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    maps = {"a": torch.rand(2, 3, 16, 2, generator=g), "b": torch.rand(2, 3, 4, 2, generator=g)}
    masks, tokens = torch.zeros(2, 4, 4), torch.tensor([[True, True], [False, True]])
    masks[0, :2, :2], masks[1, 0, :] = 1, 1
    first = [maps["a"][0].reshape(3, 4, 4, 2)[:, :2, :2], maps["b"][0].reshape(3, 2, 2, 2)[:, :1, :1]]
    second = [maps["a"][1].reshape(3, 4, 4, 2)[:, 0, :, 1], 0.5 * maps["b"][1].reshape(3, 2, 2, 2)[:, 0, :, 1]]
    for squared in (False, True):
        norms = [[float(x.square().sum()) ** (1.0 if squared else 0.5) for x in part] for part in (first, second)]
        found = suppression_loss(maps, tokens, masks, (4, 4), squared)
        assert float(found) == pytest.approx((sum(norms[0]) + sum(norms[1])) / 2, rel=1e-6)
    whole = suppression_loss(maps, torch.ones(2, 2), None, (4, 4), True)
    assert float(whole) == pytest.approx(sum(float(p.square().sum()) for p in maps.values()) / 2, rel=1e-6)


def test_pixels_outside_of_the_mask_get_no_gradient() -> None:
    p = torch.rand(1, 2, 16, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 1] = 1
    suppression_loss({"a": p}, torch.tensor([[1, 0, 1]]), mask, (4, 4)).backward()
    touched = p.grad.abs() > 0
    assert touched[:, :, 5, [0, 2]].all()
    assert int(touched.sum()) == 4


@pytest.mark.parametrize("tail", [True, False])
def test_steps_look_at_the_concept_s_tokens_in_noised_pictures(tail: bool) -> None:
    model, data = Toy(), pictures()
    state = suppress(model, data, ALPHAS, replace(CONFIG, tail=tail))
    assert state.step == len(state.losses) == len(model.calls) == 6
    for call in model.calls:
        assert call.mode == "student"
        assert call.columns == ([2, 3, 5, 6, 7] if tail else [2, 3])
        for z, t, e in zip(call.z, call.t, call.text.states, strict=True):
            i = next(i for i in range(3) if torch.equal(e, data.text.states[i]))
            noise = (z - ALPHAS[t].sqrt() * data.latents[i]) / (1 - ALPHAS[t]).sqrt()
            assert 0.6 < float(noise.std()) < 1.4


def asked(count: int) -> ConceptPrompts:
    """Prompts whose phrase stands elsewhere in each, and whose tail begins after it."""
    phrase, tail = torch.zeros(2, count, LENGTH, dtype=torch.bool)
    for k in range(count):
        phrase[k, 1 + k % 4], tail[k, 2 + k % 4 :] = True, True
    states = torch.randn(count, LENGTH, WIDTH, generator=torch.Generator().manual_seed(77))
    return ConceptPrompts(TextStates(states, [[k] * LENGTH for k in range(count)]), phrase, tail)


@pytest.mark.parametrize("tail", [True, False])
def test_each_sample_draws_one_of_the_prompts_whatever_its_picture_is(tail: bool) -> None:
    model, data, prompts = Toy(), replace(pictures(), asked=asked(4)), asked(4)
    suppress(model, data, ALPHAS, replace(CONFIG, steps=200, tail=tail))
    drawn = torch.zeros(3, 4)
    for call in model.calls:
        tokens = torch.zeros(LENGTH, dtype=torch.bool)
        for z, t, e in zip(call.z, call.t, call.text.states, strict=True):
            k = next(k for k in range(4) if torch.equal(e, prompts.text.states[k]))
            noise = [(z - ALPHAS[t].sqrt() * x) / (1 - ALPHAS[t]).sqrt() for x in data.latents]
            i = min(range(3), key=lambda i: abs(float(noise[i].std()) - 1))
            drawn[i, k] += 1
            tokens |= prompts.phrase[k] | (prompts.tail[k] & tail)
        assert call.columns == tokens.nonzero()[:, 0].tolist()
    assert drawn.sum() == 400
    assert float(drawn.sum(0).min()) > 60, "each prompt is drawn as often as the others"
    assert float(drawn.min()) > 5, "and with every picture"


def test_a_prompt_s_own_tokens_are_pressed_down_and_no_other_s() -> None:
    """Of a batch of two prompts each row counts its own phrase alone: the loss is the mean of the two alone."""
    data = replace(pictures(count=1), asked=asked(2))
    seen = []
    for batch in (1, 2):
        model = Toy()
        seen += suppress(model, data, ALPHAS, replace(CONFIG, steps=1, batch=batch, tail=False)).losses
        for z, t, text in ((c.z, c.t, c.text) for c in list(model.calls)):
            total = 0.0
            for i in range(len(z)):
                k = text.ids[i][0]
                columns = data.asked.phrase[k].nonzero()[:, 0]
                with torch.no_grad(), model.teacher():
                    maps = model.attention(z[i : i + 1], t[i : i + 1], text[i], columns)
                total += float(suppression_loss(maps, torch.ones(1, len(columns)), None, (SIZE, SIZE))) / len(z)
            assert seen[-1] == pytest.approx(total, rel=1e-5)


def test_without_prompts_to_ask_each_picture_is_asked_by_its_own() -> None:
    model, data = Toy(), pictures()
    own = ConceptPrompts(data.text, data.phrase, data.tail)
    plain = suppress(model, data, ALPHAS, CONFIG).losses
    assert all(any(torch.equal(e, x) for x in own.text.states) for c in model.calls for e in c.text.states)
    assert suppress(Toy(), replace(data, asked=own), ALPHAS, CONFIG).losses != plain


def test_masks_are_looked_for_with_the_picture_s_own_prompt() -> None:
    model, data = Toy(), replace(pictures(), asked=asked(4))
    attention_masks(model, data, ALPHAS, CONFIG)
    assert [torch.equal(c.text.states[0], data.text.states[i // 3]) for i, c in enumerate(model.calls)] == [True] * 9
    assert all(c.columns == [2, 3] for c in model.calls)


def test_timesteps_are_focal_or_uniform() -> None:
    seen = {}
    for cfis in (True, False):
        model = Toy()
        suppress(model, pictures(), ALPHAS, replace(CONFIG, steps=60, batch=4, cfis=cfis))
        seen[cfis] = torch.cat([c.t for c in model.calls]).float()
    assert 280 < float(seen[True].mean()) < 320
    assert float(((seen[True] >= 200) & (seen[True] <= 400)).float().mean()) > 0.75
    assert 420 < float(seen[False].mean()) < 580
    assert float(seen[False].max()) > 900


def test_attention_to_the_concept_falls_under_the_mask() -> None:
    mask = torch.zeros(3, SIZE, SIZE)
    mask[:, :2] = 1
    model, data = Toy(), pictures(mask)
    config = replace(CONFIG, steps=150, lr=5e-2, mask="given", tail=False, cfis=False)
    suppress(model, data, ALPHAS, config)
    t, columns = torch.tensor([300] * 3), torch.tensor([2, 3])
    with torch.no_grad():
        with model.teacher():
            before = model.attention(data.latents, t, data.text, columns)
        with model.student():
            after = model.attention(data.latents, t, data.text, columns)
    tokens = data.phrase[:, columns]
    values = [float(suppression_loss(m, tokens, mask, (SIZE, SIZE))) for m in (before, after)]
    assert values[1] < 0.4 * values[0]


def test_the_model_s_own_mask_is_where_attention_passes_the_threshold() -> None:
    """A picture whose second column alone has the direction of the concept's tokens, which alone say anything."""
    model, data = Toy(), pictures(count=1)
    data.text.states[0, 3] = data.text.states[0, 2]
    data.text.states[0, ~data.phrase[0]] = 0
    key = model.layers["1.attn2"].to_k(data.text.states[0, 2:4]).mean(0)
    toward = torch.linalg.lstsq(model.layers["1.attn2"].to_q.weight, key[:, None]).solution[:, 0]
    z = torch.zeros(1, 4, SIZE, SIZE)
    z[0, :, :, 1] = 30 * toward[:, None]
    del model.layers["2.attn2"]
    masks = attention_masks(model, replace(data, latents=z), torch.full((1000,), 0.9999), CONFIG)
    assert masks.shape == (1, SIZE, SIZE)
    assert masks[0].mean(0).tolist() == [0, 1, 0, 0]
    assert [c.mode for c in model.calls] == ["teacher"] * 3
    assert [int(c.t) for c in model.calls] == [150, 300, 450]
    assert all(c.columns == [2, 3] for c in model.calls)  # the phrase's own tokens, whatever tail says


def test_masks_are_as_asked_for() -> None:
    given = torch.ones(3, 16, 16)
    model = Toy()
    assert with_masks(model, pictures(given), ALPHAS, replace(CONFIG, mask="none")).masks is None
    assert with_masks(model, pictures(given), ALPHAS, replace(CONFIG, mask="given")).masks is given
    own = with_masks(model, pictures(given), ALPHAS, replace(CONFIG, mask="attention")).masks
    assert own.shape == (3, SIZE, SIZE)
    assert set(own.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ErasureError, match='mask is "given", and the pictures have none'):
        suppress(model, pictures(), ALPHAS, replace(CONFIG, mask="given"))


def test_an_empty_mask_is_named() -> None:
    masks = torch.ones(3, 8, 8)
    masks[1] = 0
    with pytest.raises(ErasureError, match="the mask of picture 2 is empty"):
        pictures(masks)
    with pytest.raises(ErasureError, match="3 pictures of the concept for 3 prompts and 2 masks"):
        pictures(torch.ones(2, 8, 8))


@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize("mask", ["none", "attention"])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int, mask: str) -> None:
    config, kept = replace(CONFIG, steps=10, mask=mask), []

    def keep(state: TrainState) -> None:
        if state.step == stop:
            kept.append(copy.deepcopy(state))

    whole, resumed = Toy(), Toy()
    full = suppress(whole, pictures(), ALPHAS, config, keep)
    again = suppress(resumed, pictures(), ALPHAS, config, state=kept[0])
    assert again.losses == full.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_on_step_raises_ends_the_run_and_leaves_the_network() -> None:
    class Cancelled(Exception):
        pass

    def cancel(state: TrainState) -> None:
        if state.step == 3:
            raise Cancelled

    model, state = Toy(), TrainState()
    with pytest.raises(Cancelled):
        suppress(model, pictures(), ALPHAS, CONFIG, cancel, state)
    assert state.step == len(model.calls) == 3
    assert (model.mode, model.adapters.on) == ("none", False)
    assert not any(layer.to_q._forward_hooks for layer in model.layers.values())


def test_the_same_seed_trains_the_same_and_global_randomness_stays() -> None:
    models, before = [Toy() for _ in range(3)], torch.random.get_rng_state()
    seeds = (5, 5, 6)
    states = [
        suppress(m, pictures(), ALPHAS, replace(CONFIG, seed=s, mask="attention")) for m, s in zip(models, seeds, strict=True)
    ]
    assert states[0].losses == states[1].losses != states[2].losses
    assert torch.equal(before, torch.random.get_rng_state())


def test_base_weights_and_inputs_stay() -> None:
    model, data = Toy(), pictures()
    before = [layer.to_k.weight.clone() for layer in model.layers.values()] + [data.latents.clone(), data.text.states.clone()]
    suppress(model, data, ALPHAS, CONFIG)
    after = [layer.to_k.weight for layer in model.layers.values()] + [data.latents, data.text.states]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    model, state = Toy(spoil_after=2), TrainState()
    with pytest.raises(ErasureError, match=r"^the loss is not finite at step 3: lower lr \(now 0\.01\)\.$"):
        suppress(model, pictures(), ALPHAS, CONFIG, state=state)
    assert state.step == 2


def test_the_gradient_is_clipped() -> None:
    """After one AdamW step exp_avg is a tenth of the gradient."""
    norms = []
    for clip in (0.0, 1e-3):
        state = suppress(Toy(), pictures(), ALPHAS, replace(CONFIG, steps=1, clip=clip))
        norms.append(float(torch.cat([m.flatten() for m in state.first]).norm()) * 10)
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_token_positions_come_from_the_prompts() -> None:
    ids = {"a red dog runs": [90, 1, 2, 3, 4, 99, 99, 99], "dog": [90, 3, 99, 0, 0, 0, 0, 0]}  # paddings of two kinds
    own = {"a red ": [1, 2], "": [], "dog": [3]}

    def encode(prompts) -> TextStates:
        return TextStates(torch.zeros(len(prompts), LENGTH, WIDTH), [ids[p] for p in prompts])

    data = concept_pictures(torch.zeros(2, 4, 4, 4), ["a red {} runs", "{}"], "dog", encode, own.__getitem__)
    assert data.phrase.int().tolist() == [[0, 0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert data.tail.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert data.asked is None
    asked = concept_prompts(["{}", "a red {} runs"], "dog", encode, own.__getitem__)
    assert torch.equal(asked.phrase, data.phrase.flip(0))
    assert torch.equal(asked.tail, data.tail.flip(0))
    assert asked.text.ids == data.text.ids[::-1]


def test_every_word_of_the_phrase_is_its_own_wherever_it_stands() -> None:
    """A template may hold the phrase's words itself: "a {} in front of a wall" with the concept "wall"."""

    def encode(prompts) -> TextStates:
        return TextStates(torch.zeros(1, LENGTH, WIDTH), [[90, 5, 6, 1, 5, 6, 99, 99]])

    ids = {"": [], "brick wall": [5, 6], "owl": [7]}.__getitem__
    for made in (
        concept_pictures(torch.zeros(1, 4, 4, 4), ["{} by brick wall"], "brick wall", encode, ids),
        concept_prompts(["{} by brick wall"], "brick wall", encode, ids),
    ):
        assert made.phrase.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    with pytest.raises(ErasureError, match='tokens of "owl" do not stand at the place of'):
        concept_prompts(["{} by brick wall"], "owl", encode, ids)


def test_noised_is_the_forward_process() -> None:
    z, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 3.0)
    alphas = torch.tensor([1.0, 0.36, 0.0])
    assert noised(z, noise, torch.tensor([0, 2]), alphas).flatten().tolist() == [2, 3]
    assert float(noised(z, noise, torch.tensor([1, 1]), alphas)[0]) == pytest.approx(0.6 * 2 + 0.8 * 3)
