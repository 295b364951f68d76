"""The papers' lists and hyper-parameters: as many as printed, none on two lists, and the numbers of MACE's tables."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.resources import files

import pytest

from realera_nodes import presets
from realera_nodes.core.concepts import TEMPLATES, Concept
from realera_nodes.core.errors import ErasureError
from realera_nodes.presets import Evaluation, MethodTable, load_preset, preset_names, tomllib

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LISTS = [f"mace-celebrities-{n}" for n in (1, 5, 10, 100)] + ["mace-artists-100"]

# MACE Table 6: class -> (mapping concept, synonyms)
TABLE_6 = {
    "airplane": ("ground", ("aircraft", "plane", "jet")),
    "automobile": ("sky", ("car", "vehicle", "motorcar")),
    "bird": ("street", ("avian", "fowl", "winged creature")),
    "cat": ("forest", ("feline", "kitty", "housecat")),
    "deer": ("street", ("hart", "stag", "doe")),
    "dog": ("sky", ("canine", "pooch", "hound")),
    "frog": ("forest", ("amphibian", "anuran", "tadpole")),
    "horse": ("forest", ("equine", "steed", "mount")),
    "ship": ("ground", ("vessel", "boat", "watercraft")),
    "truck": ("sky", ("lorry", "rig", "hauler")),
}

# MACE Table 10: preset -> (steps, learning rate, lambda_1 = lambda_2, lambda_3, rank)
TABLE_10 = {
    "mace-cifar10-airplane": (50, 1.0e-5, 1000.0, None, 1),
    "mace-cifar10-automobile": (50, 1.0e-5, 100.0, None, 1),
    "mace-cifar10-bird": (50, 1.0e-5, 10.0, None, 1),
    "mace-cifar10-cat": (50, 1.0e-5, 1000.0, None, 1),
    "mace-cifar10-deer": (50, 1.0e-5, 10.0, None, 1),
    "mace-cifar10-dog": (50, 1.0e-5, 10.0, None, 1),
    "mace-cifar10-frog": (50, 1.0e-5, 0.4, None, 1),
    "mace-cifar10-horse": (50, 1.0e-5, 1.0, None, 1),
    "mace-cifar10-ship": (50, 1.0e-5, 1000.0, None, 1),
    "mace-cifar10-truck": (50, 1.0e-5, 0.1, None, 1),
    "mace-celebrities-1": (50, 1.0e-4, 1.0e-4, 0.8, 1),
    "mace-celebrities-5": (50, 1.0e-4, 1.0e-4, 5.0, 1),
    "mace-celebrities-10": (50, 1.0e-4, 1.0e-4, 8.0, 1),
    "mace-celebrities-100": (50, 1.0e-4, 1.0e-4, 20.0, 1),
    "mace-artists-100": (50, 1.0e-4, 1.0e-4, 8.0, 1),
    "mace-explicit": (120, 1.0e-5, 7.0e-7, None, 1),
}


def phrases(name: str) -> list[str]:
    return [c.phrase for c in load_preset(name).concepts]


def test_the_presets_are_the_rows_of_table_10() -> None:
    assert set(preset_names()) == set(TABLE_10)
    assert len(preset_names()) == len(TABLE_10)


@pytest.mark.parametrize("name", TABLE_10)
def test_hyper_parameters_are_those_of_table_10(name: str) -> None:
    steps, lr, lambda_1, lambda_3, rank = TABLE_10[name]
    prior = "weights" if "cifar10" in name else "captions"
    assert load_preset(name).method == MethodTable(steps, lr, rank, 8, 200, 400, 0.05, lambda_1, lambda_1, prior, lambda_3)


@pytest.mark.parametrize("name", TABLE_10)
def test_every_preset_is_whole(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset.description.endswith(".")
    assert "MACE" in preset.source
    assert all(c.anchor and c.kind in TEMPLATES for c in preset.concepts)
    assert len({c.anchor for c in preset.concepts}) == 1
    assert bool(preset.evaluate.prompts) == (name != "mace-explicit"), "I2P's prompts are not in the paper"


@pytest.mark.parametrize("name", TABLE_10)
def test_an_eraser_is_told_no_synonym(name: str) -> None:
    """Nothing that a concept carries is a word that it is measured by."""
    preset = load_preset(name)
    told = {w.casefold() for c in preset.concepts for w in (*c.phrases, c.anchor, *(p.phrase for p in c.preserve))}
    told |= {p.casefold() for p in preset.retained}
    assert all(c.aliases == () and c.preserve == () and c.templates is None for c in preset.concepts)
    for synonyms in preset.evaluate.synonyms.values():
        assert not told & set(synonyms)
    assert not told & set(preset.evaluate.others)


@pytest.mark.parametrize("name", LISTS)
def test_lists_hold_a_hundred_to_keep_and_as_many_to_erase_as_they_say(name: str) -> None:
    preset, count = load_preset(name), int(name.rsplit("-", 1)[1])
    assert (len(preset.concepts), len(preset.retained)) == (count, 100)
    erased, kept = {p.casefold() for p in phrases(name)}, {p.casefold() for p in preset.retained}
    assert (len(erased), len(kept)) == (count, 100)
    assert not erased & kept


@pytest.mark.parametrize("name", LISTS)
def test_no_name_is_left_torn_by_the_print(name: str) -> None:
    """Hyphens inside a word followed by a small letter, doubled or outer spaces, quotes, list separators."""
    for phrase in [*phrases(name), *load_preset(name).retained]:
        assert phrase == " ".join(phrase.split())
        assert not set(phrase) & set("',\"\t[](){}")
        assert all(part[:1].isupper() for word in phrase.split() for part in word.split("-")[1:])


def test_smaller_sets_of_celebrities_come_from_the_hundred() -> None:
    hundred = phrases("mace-celebrities-100")
    assert (hundred[0], hundred[-1]) == ("Adam Driver", "Zayn Malik")
    assert phrases("mace-celebrities-5") == ["Adam Driver", "Adriana Lima", "Amber Heard", "Amy Adams", "Andrew Garfield"]
    assert phrases("mace-celebrities-10") == hundred[:10]
    assert hundred[9] == "Anne Hathaway"
    assert phrases("mace-celebrities-1") == ["Melania Trump"]
    assert "Melania Trump" in hundred
    anchors = {n: load_preset(f"mace-celebrities-{n}").concepts[0].anchor for n in (1, 5, 10, 100)}
    assert anchors == {1: "a woman", 5: "a person", 10: "a person", 100: "a person"}


def test_ends_of_the_other_lists() -> None:
    people, artists = load_preset("mace-celebrities-100"), load_preset("mace-artists-100")
    assert (people.retained[0], people.retained[-1]) == ("Aaron Paul", "Robert De Niro")
    assert (phrases(artists.name)[0], phrases(artists.name)[-1]) == ("Brent Heighton", "Clemens Ascher")
    assert (artists.retained[0], artists.retained[-1]) == ("A.J.Casson", "Alex Garant")
    assert artists.concepts[0].anchor == "art"
    assert {"Cassius Marcellus Coolidge", "Catrin Welz-Stein", "Briton Rivière"} <= set(phrases(artists.name))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_cifar_10(name: str) -> None:
    preset = load_preset(f"mace-cifar10-{name}")
    assert preset.concepts == (Concept(name, TABLE_6[name][0]),)
    assert preset.retained == ()
    assert preset.evaluate.synonyms == {name: TABLE_6[name][1]}
    assert preset.evaluate.others == tuple(c for c in CLASSES if c != name)
    assert preset.evaluate.prompts == ("a photo of the {}",)


def test_the_four_explicit_phrases() -> None:
    preset = load_preset("mace-explicit")
    assert phrases("mace-explicit") == ["nudity", "naked", "erotic", "sexual"]
    assert {c.anchor for c in preset.concepts} == {"a person wearing clothes"}
    assert preset.retained == ()


@pytest.mark.parametrize(
    ("name", "concepts", "synonyms", "others", "retained"),
    [
        ("mace-cifar10-dog", 200, 600, 1800, 0),
        *((f"mace-celebrities-{n}", 2500 if n == 100 else 250, 0, 0, 2500) for n in (1, 5, 10, 100)),
        ("mace-artists-100", 2500, 0, 0, 2500),
    ],
)
def test_pictures_are_as_many_as_in_the_paper(name: str, concepts: int, synonyms: int, others: int, retained: int) -> None:
    """MACE appendix C.1 and Table 8, its column of totals."""
    preset = load_preset(name)
    e = preset.evaluate
    assert len(preset.concepts) * e.images_per_concept == concepts
    assert sum(map(len, e.synonyms.values())) * e.images_per_synonym == synonyms
    assert len(e.others) * e.images_per_other == others
    assert len(preset.retained) * e.images_per_retained == retained
    if name in LISTS:
        assert len(e.prompts) == 5


def test_an_unknown_name_is_answered_with_the_names() -> None:
    with pytest.raises(ErasureError, match=r'no preset "mace-cats": choose one of .*mace-cifar10-cat'):
        load_preset("mace-cats")


def test_every_file_is_read() -> None:
    names = [f.name for f in files(presets).iterdir() if f.name.endswith(".toml")]
    tables = [tomllib.loads((files(presets) / n).read_text(encoding="utf-8")) for n in names]
    assert sorted(names) == sorted(f"{t['family']}.toml" for t in tables)
    assert sum(len(t["sets"]) for t in tables) == len(preset_names())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"retained": ("Ben Affleck", "adam  driver")}, '"adam  driver" of preset .* both erased and retained'),
        ({"retained": ("Ben Affleck", "ben affleck")}, '"ben affleck" of preset .* retained twice'),
        ({"evaluate": Evaluation(others=("Adam Driver",))}, "both erased and measured"),
        ({"concepts": ()}, "no concept to erase"),
    ],
)
def test_contradictory_lists_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ErasureError, match=sentence):
        replace(load_preset("mace-celebrities-5"), **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps of a preset is 0"),
        ({"lr": float("nan")}, "lr of a preset is nan"),
        ({"lambda_3": 0.0}, "lambda_3 of a preset is 0"),
        ({"t1": 400}, "t1 and t2 of a preset are 400 and 400"),
        ({"prior": "none"}, 'prior of a preset is "none"'),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ErasureError, match=sentence):
        MethodTable(**(asdict(load_preset("mace-artists-100").method) | change))


def test_an_evaluation_prompt_needs_its_place() -> None:
    with pytest.raises(ErasureError, match=r"must hold \{\} once"):
        Evaluation(prompts=("a photo",))
