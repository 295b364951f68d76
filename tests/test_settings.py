"""Settings from TOML and from section.key=value."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.closed_form import ClosedFormConfig
from realera_nodes.core.concepts import Concept, Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.erasure import ErasureConfig
from realera_nodes.mass_config import MassConfig
from realera_nodes.settings import as_table, concepts_from, config_from, read_toml, retained_from, sections, with_settings


def toml(table: dict[str, Any]) -> str:
    """A table as TOML: numbers, words, booleans and lists look like JSON."""
    plain = [f"{k} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, dict)]
    parts = [f"[{k}]\n{toml(v)}" for k, v in table.items() if isinstance(v, dict)]
    return "\n".join([*plain, *parts])


CHANGED = ErasureConfig(
    alignment_on=False,
    beyond_on=False,
    neighbors=NeighborConfig(d1=0.7, s1=0.9, s2=0.5, m=3, renormalize=True),
    closed_form=ClosedFormConfig(lambda_1=0.25, ridge=1e-5, keys=False, max_condition=1e15),
    alignment=AlignmentConfig(steps=7, lr=1e-7, targets=("attn2.to_k", "attn1.to_v"), seed=2**60),
)


@pytest.mark.parametrize("config", [ErasureConfig(), CHANGED])
def test_a_config_survives_toml_and_tables(config: ErasureConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(toml(as_table(config)), encoding="utf-8")
    assert config_from(read_toml(path), ErasureConfig()) == config
    assert config_from(as_table(config), ErasureConfig()) == config
    assert config_from(json.loads(json.dumps(as_table(config))), ErasureConfig()) == config


@given(st.integers(0, 500), st.floats(0.01, 1), st.booleans(), st.lists(st.sampled_from(["a", "b c", 'd"e\\', "ü"]), min_size=1))
def test_any_setting_survives(m: int, lr: float, keys: bool, targets: list[str]) -> None:
    settings = [f"neighbors.m={m}", f"alignment.lr={lr!r}", f"closed_form.keys={str(keys).lower()}"]
    config = with_settings(ErasureConfig(), [*settings, f"alignment.targets={json.dumps(targets, ensure_ascii=False)}"])
    assert (config.neighbors.m, config.alignment.lr, config.closed_form.keys) == (m, lr, keys)
    assert config.alignment.targets == tuple(targets)
    assert config_from(as_table(config), ErasureConfig()) == config


def test_a_table_changes_only_what_it_names() -> None:
    config = config_from({"neighbors": {"m": 4}, "beyond_on": False, "concepts": [{"phrase": "x"}]}, CHANGED)
    assert config == dataclasses.replace(CHANGED, neighbors=dataclasses.replace(CHANGED.neighbors, m=4), beyond_on=False)
    assert config_from({}, ErasureConfig()) == ErasureConfig()


def test_settings_are_parsed_by_their_section_and_key() -> None:
    config = with_settings(
        CHANGED,
        [
            "neighbors.m=20",
            " alignment.lr = 1e-4 ",
            "closed_form.lambda_1=1",
            "beyond_on=true",
            'alignment.targets=["attn2.to_v"]',
        ],
    )
    assert config.neighbors.m == 20
    assert config.alignment.lr == 1e-4
    assert type(config.closed_form.lambda_1) is float
    assert config.closed_form.lambda_1 == 1
    assert config.beyond_on is True
    assert config.alignment.targets == ("attn2.to_v",)
    assert (config.neighbors.d1, config.alignment.steps) == (0.7, 7)
    assert with_settings(CHANGED, []) is CHANGED


def test_the_last_of_two_settings_holds() -> None:
    assert with_settings(ErasureConfig(), ["neighbors.m=1", "neighbors.n=2", "neighbors.m=3"]).neighbors.m == 3
    both = with_settings(ErasureConfig(), ["neighbors.m=1", "neighbors={n = 2}"]).neighbors
    assert (both.m, both.n) == (1, 2)


@pytest.mark.parametrize("settings", [["neighbors.s1=0.7", "neighbors.s2=0.5"], ["neighbors.d1=2.0", "neighbors.d2=3.0"]])
def test_settings_that_only_hold_together_may_come_in_any_order(settings: list[str]) -> None:
    assert with_settings(ErasureConfig(), settings) == with_settings(ErasureConfig(), settings[::-1])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("neighbors.m", '"neighbors.m" is not a setting: write section.key=value, such as neighbors.m=20.'),
        ("neighbors.x=1", 'there is no setting "neighbors.x": choose from neighbors.d1, neighbors.d2'),
        ("neighbors.m.x=1", 'there is no setting "neighbors.m.x": choose from'),
        ("neighbours.m=1", 'there is no setting "neighbours": choose from closed_form_on'),
        ("m=1", 'there is no setting "m": choose from closed_form_on'),
        ("concepts=1", 'there is no setting "concepts": choose from'),
        ("concepts.phrase=dog", 'there is no setting "concepts": choose from'),
        ("neighbors=1", '"neighbors" is a section: write [neighbors] and its settings below.'),
        ("neighbors.m=2.0", "neighbors.m must be int, not 2.0"),
        ("neighbors.m=true", "neighbors.m must be int, not True"),
        ("neighbors.m=many", "neighbors.m must be int, not 'many'"),
        ("neighbors.m=", "neighbors.m must be int, not ''"),
        ("neighbors.m=1\nx = 2", "neighbors.m must be int, not '1\\nx = 2'"),
        ("neighbors.d1=true", "neighbors.d1 must be float, not True"),
        ("neighbors.d1='0.5'", "neighbors.d1 must be float, not '0.5'"),
        ("neighbors.d1=2020-01-01", "neighbors.d1 must be float"),
        ("neighbors.d1=1" + 400 * "0", "neighbors.d1 must be float"),
        ("neighbors.renormalize=1", "neighbors.renormalize must be bool, not 1"),
        ("beyond_on=yes", "beyond_on must be bool, not 'yes'"),
        ("closed_form_on.x=1", "closed_form_on must be bool, not {'x': 1}"),
        ("alignment.targets=attn2.to_v", "alignment.targets must be a list of words, not 'attn2.to_v'"),
        ("alignment.targets=[1]", "alignment.targets must be a list of words, not [1]"),
        ("alignment.targets=[]", "targets is empty"),
        ("neighbors.m=-1", "m is -1: it must lie between 0 and 10000"),
        ("alignment.lr=0", "lr is 0.0"),
        ("alignment.lr=nan", "lr is nan"),
        ("closed_form.ridge=inf", "ridge is inf"),
        ("neighbors.s1=0.5", "s2 = 0.8 and s1 = 0.5"),
        ("alignment.seed=-99999999999999999999", "seed is -99999999999999999999"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting: str, words: str) -> None:
    with pytest.raises(ErasureError, match=re.escape(words)):
        with_settings(ErasureConfig(), ["neighbors.n=4", setting])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"neighbors": 3}, '"neighbors" is a section'),
        ({"neighbors": [{"m": 3}]}, '"neighbors" is a section'),
        ({"neighbours": {"m": 3}}, 'there is no setting "neighbours"'),
        ({"closed_form": {"m": 3}}, 'there is no setting "closed_form.m": choose from closed_form.lambda_1'),
        ({"alignment": {"steps": "many"}}, "alignment.steps must be int, not 'many'"),
        ({"alignment": {"steps": 0}}, "steps is 0"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table: dict, words: str) -> None:
    with pytest.raises(ErasureError, match=re.escape(words)):
        config_from(table, ErasureConfig())


def test_every_section_is_a_part_of_the_config() -> None:
    parts = {f.name for f in dataclasses.fields(ErasureConfig) if not f.name.endswith("_on")}
    assert parts == set(sections(ErasureConfig()))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match=r"none\.toml does not exist: give --config a TOML file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ErasureError, match="leave --config out"):
        read_toml(tmp_path)
    for name, content in (("a.toml", b"[neighbors"), ("b.toml", b"x = \xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ErasureError, match=rf"{name} is not TOML \(.+\): mend it"):
            read_toml(tmp_path / name)
    with pytest.raises(ErasureError, match="leave --config out"):
        read_toml(tmp_path / "a.toml" / "below")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes("[neighbors]\r\nm = 5\r\n".encode("utf-8-sig"))
    assert read_toml(path) == {"neighbors": {"m": 5}}


def test_concepts_from_tables(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        """
        [[concepts]]
        phrase = "airplane"
        anchor = "sky"
        aliases = ["jet"]
        templates = ["a photo of the {}"]
        preserve = ["bird", { phrase = "kite", weight = 2 }]
        [[concepts]]
        phrase = "Tom Cruise"
        anchor = "a man"
        kind = "person"
        """
    )
    assert concepts_from(read_toml(path)["concepts"]) == [
        Concept(
            "airplane",
            "sky",
            aliases=("jet",),
            templates=("a photo of the {}",),
            preserve=(Preserved("bird"), Preserved("kite", 2.0)),
        ),
        Concept("Tom Cruise", "a man", kind="person"),
    ]
    assert concepts_from([]) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"phrase": "dog"}, "concepts must be tables: write [[concepts]]"),
        (["dog"], "concepts must be tables: write [[concepts]]"),
        ([{"phrase": "dog", "ancor": "sky"}], 'a concept has no setting "ancor": choose from aliases, anchor, kind, phrase'),
        ([{"anchor": "sky"}], 'a concept in the config lacks its phrase: write phrase = "..."'),
        ([{"phrase": "dog"}], 'a concept in the config lacks its anchor: write anchor = "..."'),
        ([{"phrase": "dog", "anchor": 3}], "a concept in the config lacks its anchor"),
        ([{"phrase": "dog", "anchor": "Dog"}], "both erased and the anchor"),
        ([{"phrase": "dog", "anchor": "sky", "kind": ["person"]}], "kind of \"dog\" must be a word, not ['person']"),
        ([{"phrase": "dog", "anchor": "sky", "kind": "place"}], 'unknown kind "place"'),
        ([{"phrase": "dog", "anchor": "sky", "aliases": "jet"}], "aliases of \"dog\" must be a list of words, not 'jet'"),
        ([{"phrase": "dog", "anchor": "sky", "aliases": [1]}], 'aliases of "dog" must be a list of words, not [1]'),
        ([{"phrase": "dog", "anchor": "sky", "templates": "{}"}], "templates of \"dog\" must be a list of words, not '{}'"),
        ([{"phrase": "dog", "anchor": "sky", "preserve": "bird"}], 'preserve of "dog" must be a list'),
        ([{"phrase": "dog", "anchor": "sky", "preserve": {"phrase": "bird"}}], 'preserve of "dog" must be a list'),
        ([{"phrase": "dog", "anchor": "sky", "preserve": [3]}], 'preserve of "dog" must be a list'),
        ([{"phrase": "dog", "anchor": "sky", "preserve": [{"weight": 1}]}], 'preserve of "dog" must be a list'),
        ([{"phrase": "dog", "anchor": "sky", "preserve": [{"phrase": "cat", "w": 1}]}], 'preserve of "dog" must be a list'),
        (
            [{"phrase": "dog", "anchor": "sky", "preserve": [{"phrase": "cat", "weight": "x"}]}],
            'preserve of "dog" must be a list',
        ),
        (
            [{"phrase": "dog", "anchor": "sky", "preserve": [{"phrase": "cat", "weight": True}]}],
            'preserve of "dog" must be a list',
        ),
        (
            [{"phrase": "dog", "anchor": "sky", "preserve": [{"phrase": "cat", "weight": 0}]}],
            'the weight of preserved "cat" is 0',
        ),
    ],
)
def test_concepts_that_do_not_fit_are_refused(rows: Any, words: str) -> None:
    with pytest.raises(ErasureError, match=re.escape(words)):
        concepts_from(rows)


def test_a_mass_config_has_sections_of_its_own() -> None:
    config = with_settings(MassConfig(), ["method=realera-mass", "refinement.contexts=4", "suppression.steps=7"])
    assert (config.method, config.refinement.contexts, config.suppression.steps) == ("realera-mass", 4, 7)
    assert config_from(json.loads(json.dumps(as_table(config))), MassConfig()) == config
    with pytest.raises(ErasureError, match="closed_form"):
        with_settings(MassConfig(), ["closed_form.lambda_1=1"])


def test_a_retain_list_takes_words_and_weights() -> None:
    assert retained_from(["bird", {"phrase": "ship", "weight": 2}]) == (Preserved("bird"), Preserved("ship", 2))
    with pytest.raises(ErasureError, match="retain must be a list"):
        retained_from("bird")
