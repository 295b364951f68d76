"""Every number of every config has a range, in one place: configs, jobs, studio and benchmark refuse what lies outside."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from realera_nodes.bench.erasure.protocols import Sizes
from realera_nodes.bench.erasure.run import Bench
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.closed_form import ClosedFormConfig
from realera_nodes.core.concepts import Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.esd import EsdConfig
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.suppression import SuppressionConfig
from realera_nodes.core.uce import UceConfig
from realera_nodes.erasure import ErasureConfig
from realera_nodes.job import Job
from realera_nodes.mass_config import MassConfig
from realera_nodes.settings import config_from, with_settings
from realera_nodes.studio.request import Request

CONFIGS = (NeighborConfig, ClosedFormConfig, AlignmentConfig, RefinementConfig, SuppressionConfig, UceConfig, EsdConfig)
WITHOUT = {
    Job: {"checkpoint": "demo", "concepts": (Concept("a", "b"),), "out": Path("out")},
    Bench: {"protocol": "objects", "methods": ("original",), "out": Path("out")},
}


def numbers(config: type) -> list[tuple[str, type]]:
    """Fields that are an int or a float, or one of them or None."""
    found = []
    for name, hint in get_type_hints(config).items():
        kinds = {int, float} & {hint, *getattr(hint, "__args__", ())}
        if kinds and hint is not bool:
            found.append((name, kinds.pop()))
    return found


EVERY = [(c, name, kind) for c in (*CONFIGS, Job, Request, Sizes, Bench) for name, kind in numbers(c)]


def test_there_are_numbers_to_look_at() -> None:
    assert len(EVERY) > 70


@pytest.mark.parametrize(("config", "name", "kind"), EVERY, ids=lambda v: getattr(v, "__name__", v))
def test_every_number_has_a_range_and_a_type(config: type, name: str, kind: type) -> None:
    field = next(f for f in dataclasses.fields(config) if f.name == name)
    bounds = field.metadata["range"]
    assert math.isfinite(bounds.low)
    assert math.isfinite(bounds.high)
    assert field.default is None or bounds.low <= field.default <= bounds.high
    above = bounds.high + 1 if kind is int else math.nextafter(bounds.high, math.inf)
    below = bounds.low - 1 if kind is int else math.nextafter(bounds.low, -math.inf)
    bad: list[Any] = [above, below, 10**400, -(10**400), True, "1", [1]]
    bad += [math.nan, math.inf, -math.inf] if kind is float else [1.5]
    bad += [] if field.default is None else [None]
    for value in bad:
        with pytest.raises(ErasureError, match=f"{name} (is|must be) ") as refused:
            config(**WITHOUT.get(config, {}), **{name: value})
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize("config", [*CONFIGS, MassConfig, Request, Sizes])
def test_defaults_are_fine(config: type) -> None:
    config()


def test_words_of_a_few_are_checked() -> None:
    for config, name in ((UceConfig, "tokens"), (EsdConfig, "variant"), (EsdConfig, "origin"), (EsdConfig, "drawn_by"),
                         (SuppressionConfig, "mask"), (Request, "method"), (Sizes, "setup")):  # fmt: skip
        for value in ("", "nonsense", "x" * 10_000, 3, None):
            with pytest.raises(ErasureError, match=name) as refused:
                config(**{name: value})
            assert len(str(refused.value)) < 300


@pytest.mark.parametrize("value", ["attn2.to_k", ["attn2.to_k", 3], 3, None, {"a": 1}])
def test_a_list_of_words_is_one(value: Any) -> None:
    with pytest.raises(ErasureError, match="targets must be a list of words"):
        AlignmentConfig(targets=value)
    assert AlignmentConfig(targets=["attn2.to_k"]).targets == ("attn2.to_k",)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("neighbors.m=100000000", "neighbors.m is 100000000: it must lie between 0 and 10000"),
        ("closed_form.ridge=1e308", "closed_form.ridge is 1e+308: it must lie between 0 and 1"),
        ("closed_form.strength=1e9", "closed_form.strength is 1000000000.0: it must lie between -10 and 10"),
        ("alignment.steps=99999999999", "alignment.steps is 99999999999"),
        ("alignment.rank=1e400", "alignment.rank must be int"),
        ("alignment.lr=1e-300", "alignment.lr is 1e-300: it must lie between 1e-07 and 1"),
        ("alignment.trajectories=65", "alignment.trajectories is 65"),
        ("neighbors.seed=99999999999999999999", "neighbors.seed is 99999999999999999999: it must lie between -2^63 and 2^64 - 1"),
        ("neighbors.m=" + 5000 * "9", "neighbors.m must be int, not"),
        ("neighbors.m=" + 1000 * "[" + 1000 * "]", "neighbors.m must be int, not"),
        ("neighbors.d1=0x1p3", "neighbors.d1 must be float"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_section(setting: str, words: str) -> None:
    with pytest.raises(ErasureError, match=words.replace("+", r"\+").replace("^", r"\^")) as refused:
        with_settings(ErasureConfig(), [setting])
    assert len(str(refused.value)) < 300


def test_sections_with_a_setting_of_one_name_are_told_apart() -> None:
    with pytest.raises(ErasureError, match=r"^suppression\.steps is 0"):
        config_from({"suppression": {"steps": 0}}, MassConfig())
    with pytest.raises(ErasureError, match=r"^alignment\.steps is 0"):
        config_from({"alignment": {"steps": 0}}, MassConfig())


def test_favoured_timesteps_hold_one() -> None:
    with pytest.raises(ErasureError, match="t2 is 1500"):
        SuppressionConfig(t2=1500)
    with pytest.raises(ErasureError, match=r"0 <= t1 < t2 <= 1000"):
        SuppressionConfig(t1=500, t2=400)
