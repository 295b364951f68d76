"""What a phrase is: its spelling, and what is none, wherever it comes from."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realera_nodes.core.concepts import Concept, Preserved, check_together
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.phrases import folded, phrase_of, same, spelled, template_of, told
from realera_nodes.core.prior import captions
from realera_nodes.core.uce import UceConfig
from realera_nodes.settings import concepts_from, retained_from
from realera_nodes.studio.request import Request, from_table, words_of
from tests.tiny import tiny_backend

SPELLED = [
    ("tracer \\(overwatch\\)", "tracer (overwatch)"),
    (r"\[x\] \{y\}", "[x] {y}"),
    ("a\nb", "a b"),
    ("a\r\n\tb\u2028c\u00a0\u3000d\x0be", "a b c d e"),
    ("  air   plane ", "air plane"),
    ("\ufeffairplane\u200b", "airplane"),
    ("air\u00adplane\u2060", "airplane"),
    ("air\x00plane\x1b\x7f", "airplane"),
    ("Zoe\u0308", "Zo\u00eb"),
    ("e\u200b\u0301", "\u00e9"),  # what stood apart composes
    ("air\u200dplane", "airplane"),
    ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),  # a joiner that joins
    ("\u202eairplane\u202c", "airplane"),
    ("a\\b", "a\\b"),  # no bracket
    ("\\\u200b(x\\)", "(x)"),
    ("(airplane:1.2)", "(airplane:1.2)"),
]
EMPTY = [
    "",
    " ",
    "\n\t",
    "\u200b",
    "\ufeff",
    "\u200d",
    "\u2060\u00ad",
    "\x00",
    "\u3164",
    "\u2800",
    "\ufe0f",
    "\u0301",
    "\u200b \u200b",
]
NO_TEXT = ["\ud800", "air\udcffplane", "x\ufffd"]


@pytest.mark.parametrize(("written", "read"), SPELLED)
def test_a_phrase_is_spelled_as_tokenizers_read_it(written: str, read: str) -> None:
    assert spelled(written) == read
    concept = Concept(written, f"the {written}", aliases=(f"{written} too",), preserve=(Preserved(f"no {written}"),))
    assert (concept.phrase, concept.anchor, concept.aliases) == (read, f"the {read}", (f"{read} too",))
    assert concept.preserve == (Preserved(f"no {read}"),)


@given(st.text(max_size=40) | st.text("\\()[]{} \u200d\u0301a", max_size=10))
@example("tracer \\\\(overwatch\\\\)")
def test_spelling_is_done_once(text: str) -> None:
    found = spelled(text)
    assert found == found.strip()
    assert "  " not in found
    assert unicodedata.is_normalized("NFC", found)
    assert spelled(found) == found  # hosts spell prompts again that hold a phrase
    assert same(text, found)


@pytest.mark.parametrize("text", EMPTY)
def test_what_cannot_be_seen_is_no_phrase(text: str) -> None:
    for make, words in (
        (lambda: Concept(text, "sky"), "the concept to erase is empty"),
        (lambda: Concept("airplane", text), 'the anchor of "airplane" is empty'),
        (lambda: Concept("airplane", "sky", aliases=(text,)), 'an alias of "airplane" is empty'),
        (lambda: Preserved(text), "a preserved phrase is empty"),
        (lambda: concepts_from([{"phrase": text, "anchor": "sky"}]), "the concept to erase is empty"),
        (lambda: retained_from([text]), "a preserved phrase is empty"),
    ):
        with pytest.raises(ErasureError, match=words):
            make()


@pytest.mark.parametrize("text", NO_TEXT)
def test_what_is_no_text_is_refused_with_a_sentence_that_can_be_printed(text: str) -> None:
    for make in (lambda: Concept(text, "sky"), lambda: Preserved(text), lambda: Concept("a", "b", templates=(f"{text} {{}}",))):
        with pytest.raises(ErasureError, match="no text") as refused:
            make()
        str(refused.value).encode()


@pytest.mark.parametrize("text", ["x" * 1001, "very " * 300, "\u200b" * 5000, "a" * 1_000_000])
def test_an_endless_phrase_is_refused_before_a_tokenizer_sees_it(text: str) -> None:
    with pytest.raises(ErasureError, match="shorten it") as refused:
        Concept(text, "sky")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|startoftext|> b", "x<|ENDOFTEXT|>"])
def test_marks_of_the_tokenizer_are_no_words(text: str) -> None:
    with pytest.raises(ErasureError, match="ends a text for the tokenizer"):
        phrase_of(text, "")


@pytest.mark.parametrize("text", [3, None, ["a"], b"a"])
def test_other_things_are_no_phrase(text) -> None:
    with pytest.raises(ErasureError, match="must be words"):
        Concept(text, "sky")


@pytest.mark.parametrize("value", [16**5000, [16**5000], {"a": [1, 16**5000]}], ids=["number", "list", "table"])
def test_numbers_that_python_refuses_to_write_are_told_all_the_same(value) -> None:
    assert "digits" in told(value)
    with pytest.raises(ErasureError, match="digits"):
        phrase_of(value, "empty")


def test_templates_keep_their_braces() -> None:
    assert template_of("a  photo\nof {} \\(outdoors\\)") == "a photo of {} (outdoors)"
    assert Concept("a", "b", templates=("one {}\u200b",)).templates == ("one {}",)
    for bad in ("a photo", "{} {}", "{0}", "{x}", "{", r"\{\}"):
        with pytest.raises(ErasureError, match="once, where the phrase goes"):
            template_of(bad)


@pytest.mark.parametrize(
    ("a", "b"), [("Zoe\u0308", "zo\u00eb"), (r"Tracer \(Overwatch\)", "tracer (overwatch)"), ("a\nb", "A  b"), ("x\u200b", "X")]
)
def test_one_phrase_in_two_spellings_is_one(a: str, b: str) -> None:
    assert folded(a) == folded(b)
    with pytest.raises(ErasureError, match="both erased and the anchor"):
        Concept(a, b)
    with pytest.raises(ErasureError, match="both erased and preserved"):
        Concept(a, "sky", preserve=(Preserved(b),))
    with pytest.raises(ErasureError, match="twice"):
        check_together((Concept(a, "sky"), Concept(b, "sea")))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 10**400, True, "2", None])
def test_a_weight_has_a_range(weight) -> None:
    with pytest.raises(ErasureError, match='the weight of preserved "bird" is'):
        Preserved("bird", weight)
    assert Preserved("bird", 2).weight == 2.0


def test_a_guide_and_templates_of_methods_are_spelled() -> None:
    config = UceConfig(to_anchor=False, guide=r"art \(old\)", templates=("a\nphoto of {}",))
    assert (config.guide, config.templates) == ("art (old)", ("a photo of {}",))
    assert UceConfig(guide=" \u200b").guide == ""


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_backend_finds_an_escaped_phrase_in_its_prompt(kind: str) -> None:
    backend = tiny_backend(kind)
    assert backend.phrase_ids(r"tracer \(overwatch\)") == backend.phrase_ids("tracer (overwatch)")
    assert backend.phrase_ids("jumbo\njet\u200b") == backend.phrase_ids("jumbo jet")


def test_captions_of_a_phrase_in_brackets_are_left_out() -> None:
    lines = ["tracer (overwatch) runs", "a tracer runs", "tracer (overwatch)", "the airplanes fly", "airplaneish"]
    assert captions([r"Tracer \(overwatch\)"], lines) == ["a tracer runs", "the airplanes fly", "airplaneish"]
    assert captions(["airplane"], lines) == [*lines[:3], "airplaneish"]


def test_the_studio_reads_phrases_as_the_shell_does() -> None:
    assert words_of("airplane\u200b, tracer \\(overwatch\\);\u200b; airplane") == ("airplane", "tracer (overwatch)")
    asked = from_table({"concepts": ["air\nplane"], "anchors": ["the\u00a0sky"]})
    assert asked == Request(concepts=("air plane",), anchors=("the sky",))
