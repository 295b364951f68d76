"""What the page asks is what the command line would do: the same concepts, settings and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from realera_nodes.cli.erase import concepts_of
from realera_nodes.core.concepts import Preserved
from realera_nodes.core.errors import ErasureError
from realera_nodes.erasure import ErasureConfig
from realera_nodes.mass_config import MassConfig
from realera_nodes.methods import mass_config
from realera_nodes.presets import load_preset
from realera_nodes.presets.settings import preset_config
from realera_nodes.settings import concepts_from, config_from, read_toml, retained_from
from realera_nodes.studio.export import config_text, write_config
from realera_nodes.studio.request import METHOD_NAMES, Request, anchors_of, from_table, job, lines_of, to_table, words_of

PLANE = Request(concepts=("airplane",), anchors=("sky",), keep=("bird",))


def test_words_are_split_as_people_write_them() -> None:
    assert words_of(" airplane, ship;\n ship \n\n") == ("airplane", "ship")
    assert anchors_of("sky, sky") == ("sky", "sky")
    assert lines_of("neighbors.m=3 # few\n\n# none\nalignment.lr=1e-3") == ("neighbors.m=3", "alignment.lr=1e-3")


def test_concepts_are_the_command_lines(tmp_path: Path) -> None:
    made = job(replace(PLANE, concepts=("airplane", "owl"), anchors=("sky", "forest")), "demo", tmp_path)
    assert made.concepts == concepts_of(["airplane", "owl"], ["sky", "forest"], "object", ["bird"], {})


@pytest.mark.parametrize(("method", "parts"), [("realera", (True, True)), ("edit", (True, False)), ("lora", (False, True))])
def test_methods_are_parts_of_realera(method: str, parts: tuple[bool, bool], tmp_path: Path) -> None:
    made = job(replace(PLANE, method=method, strength=0.5, settings=("neighbors.m=3",)), "demo", tmp_path)
    assert (made.config.closed_form_on, made.config.alignment_on) == parts
    assert made.config.closed_form.strength == 0.5
    assert made.config.neighbors.m == 3
    base = ErasureConfig()
    assert made.config == replace(
        base, closed_form_on=parts[0], alignment_on=parts[1], closed_form=replace(base.closed_form, strength=0.5),
        neighbors=replace(base.neighbors, m=3),
    )  # fmt: skip


def test_mass_methods_take_their_papers_settings_or_the_presets(tmp_path: Path) -> None:
    made = job(replace(PLANE, method="mace", settings=("suppression.steps=7",)), "demo", tmp_path)
    assert isinstance(made.config, MassConfig)
    plain = mass_config("mace", made.concepts)
    assert made.config == replace(plain, suppression=replace(plain.suppression, steps=7))
    chosen = load_preset("mace-celebrities-1")
    asked = Request(concepts=tuple(c.phrase for c in chosen.concepts), anchors=("a person",), kind="person", method="mace",
                    preset="mace-celebrities-1")  # fmt: skip
    made = job(asked, "demo", tmp_path)
    assert made.config == preset_config(chosen, "mace")
    assert [p.phrase for p in made.retained] == list(chosen.retained)


def test_words_that_were_ticked_are_aliases_of_their_concept(tmp_path: Path) -> None:
    asked = replace(PLANE, concepts=("airplane", "owl"), anchors=("sky",), also=("1:jet", "2:eagle", "glider"))
    first, second = job(asked, "demo", tmp_path).concepts
    assert first.aliases == ("jet", "glider")
    assert second.aliases == ("eagle",)
    with pytest.raises(ErasureError, match="belongs to concept 3"):
        job(replace(asked, also=("3:x",)), "demo", tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"concepts": ()}, "nothing to erase"),
        ({"anchors": ()}, "anchor of"),
        ({"anchors": ("airplane",)}, "both erased and the anchor"),
        ({"keep": ("airplane",)}, "both erased and preserved"),
        ({"concepts": ("a", "b", "c"), "anchors": ("x", "y")}, "3 concepts and 2 anchors"),
        ({"kind": "thing"}, "unknown kind"),
        ({"settings": ("alignment.lr=7",)}, "lr is 7"),
        ({"settings": ("nonsense",)}, "not a setting"),
        ({"strength": 99.0}, "strength is 99"),
        ({"preset": "none", "method": "mace"}, "no preset"),
        ({"also": ("bird",)}, "both erased and preserved"),
    ],
)  # fmt: skip
def test_contradictions_are_one_sentence(change: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match=says):
        job(replace(PLANE, **change), "demo", tmp_path)


def test_a_request_survives_json() -> None:
    asked = replace(PLANE, also=("1:jet",), settings=("neighbors.m=3",), strength=0.5)
    assert from_table(to_table(asked)) == asked
    assert from_table({"strength": 1}) == Request(strength=1.0)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"concept": "x"}, 'no "concept"'),
        ({"concepts": "airplane"}, "list of words"),
        ({"concepts": [1]}, "list of words"),
        ({"strength": "1"}, "strength must be float"),
        ({"pictures": 1.5}, "pictures must be int"),
        ({"checkpoint": 1}, "checkpoint must be bool"),
        ({"method": "magic"}, "method is"),
        ({"pictures": 0}, "pictures is 0: it must lie between 1 and 64"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_requests_of_scripts_are_checked(table: dict, says: str) -> None:
    with pytest.raises(ErasureError, match=says):
        from_table(table)


@pytest.mark.parametrize("method", list(METHOD_NAMES))
def test_the_exported_settings_make_the_same_job(method: str, tmp_path: Path) -> None:
    asked = Request(
        concepts=('so "called"\\', "Zoë"), anchors=("sky", "a woman"), kind="person", keep=("bird",), also=("2:é\u2028 jet",),
        method=method, strength=0.35, settings=("neighbors.d1=0.55",) if method != "mace" else ("suppression.lr=3e-5",),
    )  # fmt: skip
    made = job(asked, "demo", tmp_path)
    path = tmp_path / "erase.toml"
    write_config(path, asked, made)
    table = read_toml(path)
    assert tuple(concepts_from(table["concepts"])) == made.concepts
    base: ErasureConfig | MassConfig = (
        mass_config(method, made.concepts) if isinstance(made.config, MassConfig) else ErasureConfig()
    )
    assert config_from(table, base) == made.config


def test_the_exported_settings_name_the_command_and_what_is_retained(tmp_path: Path) -> None:
    asked = Request(concepts=("Adam Driver",), anchors=("a person",), kind="person", method="mace", preset="mace-celebrities-1")
    made = replace(job(asked, "demo", tmp_path), retained=(Preserved("bird", 2.0),))
    text = config_text(asked, made)
    assert text.startswith("# python -m realera_nodes erase demo --config erase.toml --out DIR --method mace\n")
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    assert retained_from(read_toml(tmp_path / "x.toml")["retain"]) == made.retained
