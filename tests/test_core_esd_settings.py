"""ESD's settings: the two published sets, what each variant trains, and what is refused."""

from __future__ import annotations

import pytest

from realera_nodes.core.concepts import Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.esd import ESD_NEWER, ESD_ORIGINAL, EsdConfig, esd_prompts


def test_the_two_codes() -> None:
    assert EsdConfig("x", 1.0, "empty", 1000, 1e-5, 1, 50, 3.0, "tuned") == ESD_ORIGINAL
    assert EsdConfig("x", 2.0, "concept", 200, 5e-5, 1, 50, 3.0, "frozen", left_out="norms") == ESD_NEWER


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
CROSS = [BLOCK + n for n in ("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_out.0.bias")]
#: by part: what every code trains, what the first one leaves out, what the later one does
REST = {
    "layers": ["conv_in.weight", BLOCK + "attn1.to_k.weight", "mid_block.resnets.0.time_emb_proj.bias",
               "up_blocks.1.attentions.0.proj_out.weight", "add_embedding.linear_1.weight"],
    "ends": ["time_embedding.linear_1.bias", "time_embedding.linear_2.weight", "conv_out.weight"],
    "both": ["conv_norm_out.weight", "conv_norm_out.bias"],
    "norms": [BLOCK + "norm2.weight", "down_blocks.0.attentions.0.norm.bias", "mid_block.resnets.1.norm1.weight"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("left_out", "parts"),
    [("ends", ["layers", "norms"]), ("norms", ["layers", "ends"]), ("nothing", ["layers", "ends", "both", "norms"])],
)
def test_u_trains_what_its_code_trains_and_x_is_cross_attention_in_both(left_out: str, parts: list[str]) -> None:
    every = [*CROSS, *(n for names in REST.values() for n in names)]
    u, x = (EsdConfig(variant=v, left_out=left_out) for v in "ux")
    assert [n for n in every if u.trains(n)] == [n for p in parts for n in REST[p]]
    assert [n for n in every if x.trains(n)] == CROSS


def test_prompts_are_all_phrases_in_all_templates() -> None:
    concepts = [Concept("dog", "cat", aliases=("hound",)), Concept("van", "bus")]
    config = EsdConfig(templates=("{}", "a {}"))
    assert esd_prompts(concepts, config) == ["dog", "a dog", "hound", "a hound", "van", "a van"]
    with pytest.raises(ErasureError, match="on the list twice"):
        esd_prompts([*concepts, Concept("Van", "sky")], config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"variant": "y"}, 'variant is "y": choose one of x, u'),
        ({"origin": "anchor"}, 'origin is "anchor"'),
        ({"drawn_by": "me"}, 'drawn_by is "me"'),
        ({"left_out": "bias"}, 'left_out is "bias": choose one of ends, norms, nothing'),
        ({"eta": float("nan")}, "eta is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"batch": 0}, "batch is 0"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
        ({"sampling_steps": 1000}, "sampling_steps is 1000"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"templates": ("a photo",)}, "each of templates must hold"),
        ({"templates": ("{} by {x}",)}, "each of templates must hold"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ErasureError, match=sentence):
        EsdConfig(**change)
