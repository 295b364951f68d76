"""Every shipped template with every word that the templates themselves hold, and every preset, read by CLIP's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from realera_nodes.core.concepts import TEMPLATES, Concept
from realera_nodes.core.refinement import context_rows, refine_pairs
from realera_nodes.core.spans import TextStates, make_pair
from realera_nodes.core.templates import CONTEXTS
from realera_nodes.demo.bpe import write_tokenizer
from realera_nodes.presets import load_preset, preset_names


class Reader:
    """CLIP's token ids; a state is (position, token)."""

    def __init__(self, folder: Path):
        from transformers import CLIPTokenizer

        write_tokenizer(folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    def phrase_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode(self, prompts: Sequence[str]) -> TextStates:
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=77).input_ids
        tokens = torch.tensor(ids, dtype=torch.float32)
        return TextStates(torch.stack([torch.arange(77.0).expand_as(tokens), tokens], -1), ids)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("tokenizer"))


ALL = sorted({(kind, t) for table in (TEMPLATES, CONTEXTS) for kind in table for t in table[kind]})


@pytest.mark.parametrize("kind", sorted(CONTEXTS))
def test_every_word_of_a_template_can_be_concept_or_anchor_in_it(reader: Reader, kind: str) -> None:
    for template in (t for k, t in ALL if k == kind):
        words = {w for w in template.replace("{}", " ").split() if w.isalpha()} | {"cat"}
        for word in sorted(words):
            other = "cat" if word != "cat" else "dog"
            for phrase, anchor in ((word, other), (other, word)):
                pair = make_pair(template, phrase, anchor, reader.encode, reader.phrase_ids)
                at = 1 + len(reader.phrase_ids(template.partition("{}")[0]))
                assert pair.start == at, (template, phrase, anchor)
                assert int(pair.targets[pair.start, 1]) == reader.phrase_ids(anchor)[0]
                rows, goals = context_rows(pair)  # refused where the words around are not the same
                assert torch.equal(rows[:, 1], goals[:, 1])  # end, padding and words beside their own kind


def test_every_pair_of_every_preset_maps_words_to_words(reader: Reader) -> None:
    for name in preset_names():
        concepts: Sequence[Concept] = load_preset(name).concepts
        for pair in refine_pairs(concepts[:12], reader.encode, reader.phrase_ids):
            rows, goals = context_rows(pair)
            assert torch.equal(rows[:, 1], goals[:, 1]), (name, pair.prompt)
