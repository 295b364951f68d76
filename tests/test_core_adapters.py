"""Adapters as hooks: on they are the merged weights, off and removed they are nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from realera_nodes.core.adapters import HookAdapters, initial_factors, merged

SHAPES = {"b.to_k": (6, 5), "a.to_v": (4, 5), "c.to_k": (3, 7)}


def modules(dtype: torch.dtype = torch.float32) -> dict[str, nn.Linear]:
    torch.manual_seed(3)
    return {name: nn.Linear(n_in, n_out, bias=name.startswith("a"), dtype=dtype) for name, (n_out, n_in) in SHAPES.items()}


def factors(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return {n: (torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g)) for n, (o, i) in SHAPES.items()}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 9, SHAPES[name][1], generator=torch.Generator().manual_seed(2), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_on_is_the_merged_weight_and_off_the_base(name: str) -> None:
    layers, parts = modules(), factors()
    module, x = layers[name], inputs(name)
    base, weight = module(x), module.weight.detach().clone()
    adapters = HookAdapters(layers, parts)
    adapters.attach()
    assert torch.equal(module(x), base)
    with adapters.enabled():
        on = module(x)
    torch.testing.assert_close(on, nn.functional.linear(x, weight + merged(parts, name), module.bias), rtol=1e-5, atol=1e-5)
    assert not torch.equal(on, base)
    assert torch.equal(module(x), base)
    assert torch.equal(module.weight, weight)


def test_merged_is_up_times_down() -> None:
    down, up = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-1.0]])
    assert merged({"x": (down, up)}, "x").tolist() == [[1, 2, 3], [-1, -2, -3]]


def test_removed_hooks_leave_the_modules_as_they_were() -> None:
    layers = modules()
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in layers.items()}
    keys = {n: set(vars(m)) for n, m in layers.items()}
    adapters = HookAdapters(layers, factors())
    adapters.attach()
    assert all(len(m._forward_hooks) == 1 for m in layers.values())
    adapters.remove()
    for name, module in layers.items():
        assert not module._forward_hooks
        assert set(vars(module)) == keys[name]
        assert module.state_dict().keys() == before[name].keys()
        assert all(torch.equal(v, before[name][k]) for k, v in module.state_dict().items())
        with adapters.enabled():
            x = inputs(name)
            assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_attached_twice_adds_once() -> None:
    layers = modules()
    adapters = HookAdapters(layers, factors())
    adapters.attach()
    adapters.attach()
    assert all(len(m._forward_hooks) == 1 for m in layers.values())


def test_off_again_after_an_error_and_as_before_when_nested() -> None:
    adapters = HookAdapters(modules(), factors())

    def failing() -> None:
        with adapters.enabled():
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        failing()
    assert not adapters.on
    with adapters.enabled():
        with adapters.enabled():
            assert adapters.on
        assert adapters.on
    assert not adapters.on


def test_half_modules_keep_their_type_and_float_factors() -> None:
    layers = modules(torch.bfloat16)
    adapters = HookAdapters(layers, factors())
    adapters.attach()
    with adapters.enabled():
        out = layers["b.to_k"](inputs("b.to_k", torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in adapters.parameters())


def test_gradients_reach_the_adapters_alone() -> None:
    layers = modules()
    for m in layers.values():
        m.requires_grad_(False)
    adapters = HookAdapters(layers, factors())
    adapters.attach()
    with adapters.enabled():
        sum(layers[n](inputs(n)).square().sum() for n in SHAPES).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    assert all(p.grad is None for m in layers.values() for p in m.parameters())


def test_parameters_are_in_the_order_of_names_and_copies() -> None:
    parts = factors()
    adapters = HookAdapters(modules(), parts)
    expected = [parts[n][k] for n in sorted(SHAPES) for k in (0, 1)]
    assert all(torch.equal(p, x) and p.data_ptr() != x.data_ptr() for p, x in zip(adapters.parameters(), expected, strict=True))


def test_factors_and_load_round_trip() -> None:
    adapters, parts = HookAdapters(modules(), initial_factors(SHAPES, 2, torch.Generator().manual_seed(0))), factors()
    kept = adapters.parameters()
    adapters.load(parts)
    assert all(a is b for a, b in zip(adapters.parameters(), kept, strict=True))  # an optimizer still holds them
    found = adapters.factors()
    for name, (down, up) in parts.items():
        assert torch.equal(found[name][0], down)
        assert torch.equal(found[name][1], up)
        assert not found[name][0].requires_grad
    found["a.to_v"][0].zero_()
    assert torch.equal(adapters.factors()["a.to_v"][0], parts["a.to_v"][0])


def test_initial_factors_do_not_depend_on_the_order_of_names() -> None:
    first = initial_factors(SHAPES, 3, torch.Generator().manual_seed(7))
    again = initial_factors(dict(reversed(SHAPES.items())), 3, torch.Generator().manual_seed(7))
    other = initial_factors(SHAPES, 3, torch.Generator().manual_seed(8))
    assert first.keys() == again.keys() == SHAPES.keys()
    for name, (n_out, n_in) in SHAPES.items():
        down, up = first[name]
        assert torch.equal(down, again[name][0])
        assert not torch.equal(down, other[name][0])
        assert down.shape == (3, n_in)
        assert torch.equal(up, torch.zeros(n_out, 3))


@pytest.mark.parametrize("rank", [1, 4])
def test_initial_down_has_deviation_one_over_rank(rank: int) -> None:
    down, _ = initial_factors({"x": (2, 40_000)}, rank, torch.Generator().manual_seed(0))["x"]
    assert float(down.std()) * rank == pytest.approx(1, abs=0.02)
    assert float(down.mean()) * rank == pytest.approx(0, abs=0.02)
