"""Settings of the attention suppression: the paper's by kind, and what is out of range is refused by name."""

from __future__ import annotations

import pytest

from realera_nodes.core.errors import ErasureError
from realera_nodes.core.suppression import SuppressionConfig


def test_presets_are_the_papers() -> None:
    kinds = {k: SuppressionConfig.for_kind(k) for k in ("object", "person", "style", "explicit")}
    assert [c.steps for c in kinds.values()] == [50, 50, 50, 120]
    assert [c.lr for c in kinds.values()] == [1e-5, 1e-4, 1e-4, 1e-5]
    assert [c.cfis for c in kinds.values()] == [True, True, True, False]
    assert {c.rank for c in kinds.values()} == {1}
    assert {c.prompts for c in kinds.values()} == {30}
    assert SuppressionConfig.for_kind("object", steps=7).steps == 7
    with pytest.raises(ErasureError, match='unknown kind "thing"'):
        SuppressionConfig.for_kind("thing")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"targets": ()}, "targets is empty"),
        ({"batch": 0}, "batch is 0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"t1": 400.0}, "t1 is 400 and t2 is 400"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"images": 0}, "images is 0"),
        ({"prompts": 0}, "prompts is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"mask": "sam"}, 'mask is "sam"'),
        ({"mask_threshold": 1.0}, "mask_threshold is 1.0"),
        ({"seed": 2**64}, f"seed is {2**64}"),
    ],
)
def test_settings_out_of_range_are_named(values: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=words):
        SuppressionConfig(**values)
