"""Unified concept editing (UCE): a few tokens of each concept become those of a guide phrase, in one closed form.

For every W_K and W_V of cross-attention, with v* the guide's states and p the preserved ones,

    W' = (sum s_e W v* c^T + sum s_p W p p^T + mu W) (sum s_e c c^T + sum s_p p p^T + mu I)^-1 = W T,

which is the closed form of this project without its general prior: the same Grams, the same transform for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .closed_form import Grams, Transform, solve
from .concepts import Concept, check_together
from .errors import ErasureError
from .phrases import phrase_of, same, spelled
from .settings import check_settings, choice, number, prompts
from .spans import Encode, PhraseIds, template_span

TOKENS = ("last-subject", "aligned")
KEPT_TOKENS = ("edited", "all")


@dataclass(frozen=True)
class UceConfig:
    """Settings of UCE. The defaults are those of its current code but for the guide, which is each concept's own anchor;
    ``UCE_NEW`` are all of the current code's, ``UCE_OLD`` those of its first script for erasing, as that script runs.

    Attributes:
        tokens: which rows of a phrase are edited: "last-subject", the last token of the phrase alone, or "aligned", it
            and all that follow (end and padding), put beside the guide's from its own last token on
        to_anchor: each concept becomes its own anchor
        guide: phrase that every concept becomes without ``to_anchor``: the empty prompt (of which the start token is what is
            left), or "art"
        erase_scale: s_e
        preserve_scale: s_p; 0 means max(0.1, 1 / number of what is kept), the empty prompt counted with ``keep_empty``
        mu: weight of ||W' - W||^2 (the code's lambda)
        templates: prompts of concepts, guides and preserved phrases; {} is the phrase
        keys, values, strength, max_condition: as in ClosedFormConfig
        kept_tokens: which rows of a preserved phrase are kept: "edited", those that ``tokens`` would edit, or "all", from the
            start token to the last padding
        keep_empty: keep all rows of the empty prompt too, which is what every picture is guided away from
    """

    tokens: str = choice("last-subject", TOKENS)
    to_anchor: bool = True
    guide: str = ""
    erase_scale: float = number(1.0, 0.01, 100)
    preserve_scale: float = number(1.0, 0, 100)
    mu: float = number(0.5, 1e-12, 1e12)
    templates: tuple[str, ...] = prompts(("{}",))
    keys: bool = True
    values: bool = True
    strength: float = number(1.0, -10, 10, 0.05)
    max_condition: float = number(1e13, 1, 1e30)
    kept_tokens: str = choice("edited", KEPT_TOKENS)
    keep_empty: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "guide", phrase_of(self.guide, "", "guide") if spelled(self.guide) else "")
        if self.to_anchor and self.guide:
            raise ErasureError(
                f'guide is "{self.guide}", but concepts become their anchors: leave it empty, or set to_anchor off.'
            )
        if not (self.keys or self.values):
            raise ErasureError("neither W_K nor W_V is selected: edit at least one of them.")

    def edits(self, name: str) -> bool:
        """Whether a projection of this name is edited."""
        return self.keys if name.endswith("to_k") else self.values

    def kept_scale(self, count: int) -> float:
        """s_p for ``count`` preserved phrases."""
        return self.preserve_scale or max(0.1, 1 / max(count + self.keep_empty, 1))


UCE_NEW = UceConfig(to_anchor=False)
UCE_OLD = UceConfig(tokens="aligned", to_anchor=False, preserve_scale=0.0, kept_tokens="all", keep_empty=True)


def uce(encode: Encode, phrase_ids: PhraseIds, concepts: Sequence[Concept], config: UceConfig, width: int) -> Transform:
    """The edit as one transform for all projections of ``width`` inputs; ``config.edits`` says which it is for.

    Args:
        encode: prompts -> their states; phrase_ids: phrase -> its token ids, as a backend has them
    """
    return solve(uce_grams(encode, phrase_ids, concepts, config, width), 1.0, max_condition=config.max_condition, mu=config.mu)


def uce_grams(encode: Encode, phrase_ids: PhraseIds, concepts: Sequence[Concept], config: UceConfig, width: int) -> Grams:
    """The sums of UCE, scales inside, so that lambda_1 is 1: each phrase of each concept, and every preserved phrase once.

    Raises:
        ErasureError: contradictory concepts, a phrase that is the guide, or text states of another width.
    """
    check_together(tuple(concepts))
    grams = Grams(width)
    for concept in concepts:
        guide = concept.anchor if config.to_anchor else config.guide
        for phrase in concept.phrases:
            if same(phrase, guide):
                raise ErasureError(f'"{phrase}" is both erased and the guide: choose another guide.')
            for rows, targets in _rows(encode, phrase_ids, phrase, guide, config):
                grams.erase(rows, targets, config.erase_scale)
    kept: dict[str, float] = {}
    for concept in concepts:
        for preserved in concept.preserve:
            kept[preserved.phrase] = max(preserved.weight, kept.get(preserved.phrase, 0.0))
    scale = config.kept_scale(len(kept))
    if config.keep_empty:
        grams.preserve(encode([""]).states, scale)
    for phrase, weight in kept.items():
        for rows in _kept_rows(encode, phrase_ids, phrase, config):
            grams.preserve(rows, weight * scale)
    return grams


def _kept_rows(encode: Encode, phrase_ids: PhraseIds, phrase: str, config: UceConfig) -> Iterator[Tensor]:
    """For each template, the states (n, d) of a preserved phrase that are kept."""
    if config.kept_tokens == "edited":
        yield from (rows for rows, _ in _rows(encode, phrase_ids, phrase, phrase, config))
    else:
        yield from encode([template.format(phrase) for template in config.templates]).states


def _rows(
    encode: Encode, phrase_ids: PhraseIds, phrase: str, guide: str, config: UceConfig
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """For each template, states of a phrase (n, d) and of its guide (n, d), token beside token."""
    for template in config.templates:
        text = encode([template.format(phrase), template.format(guide)])
        # the last token of a phrase; of an empty one, the token before it (the start token, if nothing is)
        i, j = (template_span(text.ids[k], template, words, phrase_ids)[1] - 1 for k, words in enumerate((phrase, guide)))
        # the tail is as long as the shorter of the two
        n = 1 if config.tokens == "last-subject" else text.states.shape[1] - max(i, j)
        yield text.states[0, i : i + n], text.states[1, j : j + n]
