"""Settings of the three methods that are out of range are refused by name."""

from __future__ import annotations

import pytest

from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.closed_form import ClosedFormConfig
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.neighbors import NeighborConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lambda_1": -0.1}, "lambda_1 is -0.1"),
        ({"prior": float("nan")}, "prior is nan"),
        ({"ridge": float("inf")}, "ridge is inf"),
        ({"strength": 10.5}, "strength is 10.5"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"keys": False, "values": False}, "neither W_K nor W_V"),
        ({"max_condition": 0.5}, "max_condition is 0.5"),
        ({"max_condition": float("nan")}, "max_condition is nan"),
    ],
)
def test_closed_form_settings_out_of_range_are_named(values: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        ClosedFormConfig(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d1": 0}, "d1 is 0"),
        ({"d1": float("nan")}, "d1 is nan"),
        ({"d1": 2.0}, "d2 is 1.5"),
        ({"inner": 1.5}, "d2 is 1.5"),
        ({"d2": float("inf")}, "d2 is inf"),
        ({"inner": -0.1}, "inner is -0.1"),
        ({"s1": 0.8}, "s2 = 0.8 and s1 = 0.8"),
        ({"s1": 1.01}, "s1 is 1.01"),
        ({"s2": -1.01}, "s2 is -1.01"),
        ({"d1_anchor": -1}, "d1_anchor is -1"),
        ({"d1_anchor": float("inf")}, "d1_anchor is inf"),
        ({"m": -1}, "m is -1"),
        ({"n": -1}, "n is -1"),
        ({"tries": 0}, "tries is 0"),
        ({"words": -1}, "words is -1"),
        ({"vocabulary": -1}, "vocabulary is -1"),
        ({"word_weight": 0}, "word_weight is 0"),
        ({"word_weight": float("inf")}, "word_weight is inf"),
        ({"response": 0.2}, "response_beyond = 0.3 and response = 0.2"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"response": 1.1}, "response is 1.1"),
        ({"seed": 2**64}, f"seed is {2**64}"),
    ],
)
def test_neighbors_settings_out_of_range_are_named(values: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        NeighborConfig(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1.1}, "lr is 1.1"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 321}, "rank is 321"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"targets": ()}, "targets is empty"),
        ({"batch": 0}, "batch is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"gamma_1": -0.1}, "gamma_1 is -0.1"),
        ({"gamma_2": float("inf")}, "gamma_2 is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"patience": -1}, "patience is -1"),
        ({"check_every": 0}, "check_every is 0: it must lie between 1 and 1000"),
        ({"trajectories": 0}, "trajectories is 0"),
        ({"trajectory_steps": 0}, "trajectory_steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": 2**64}, f"seed is {2**64}"),
    ],
)
def test_alignment_settings_out_of_range_are_named(values: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        AlignmentConfig(**values)
