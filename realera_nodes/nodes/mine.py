"""Mine Neighbor Concepts: what goes with a concept in the loaded model, and what must not."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io, ui

from ..core.alignment import AlignmentConfig as A
from ..core.errors import ErasureError
from ..core.neighbors import NeighborConfig
from ..erasure import ErasureConfig
from .inputs import CATEGORY, CLIP, CONCEPTS, MODEL, Concepts, Neighbors, runs, seed, setting, size
from .parsing import words

N = NeighborConfig
SETTINGS = [
    setting(N, "words", "Words erased with the concept, at most. 0 is the paper's method: random samples only."),
    setting(N, "candidates", "How many words the model is asked about: two UNet calls for each."),
    setting(N, "vocabulary", "How many of the tokenizer's commonest words are looked at."),
    setting(N, "response", "A word goes with the concept from this likeness of the model's answers upwards."),
    setting(N, "response_beyond", "A word whose likeness is below this is kept."),
    setting(N, "words_beyond", "Words that draw something else and are kept, at most."),
    setting(N, "word_weight", "Weight of a named word in the closed form, beside the concept's 1."),
    setting(N, "m", "Random neighbor samples of each prompt (M)."),
    setting(N, "n", "Random beyond-concept samples of each prompt (N), which are kept."),
    setting(N, "d1", "Radius of the neighborhood (D1), in lengths of the concept's text state."),
    setting(N, "d2", "Outer radius of beyond-concept samples (D2)."),
    setting(N, "inner", "Inner radius of beyond-concept samples; 0 is D1, as in the paper."),
    setting(N, "s1", "Largest cosine of a neighbor to the concept (S1)."),
    setting(N, "s2", "Smallest cosine of a neighbor; beyond-concept samples lie below (S2)."),
    setting(N, "d1_anchor", "Tolerance around the anchor (D1')."),
    setting(N, "renormalize", "Scale samples back to the length of the concept's state."),
]  # fmt: skip
#: last, so that graphs which were saved without them keep their values' places
SHARES = [
    setting(N, "nearest", "Share of the candidates that are nearest in text space; 1 asks of no others."),
    setting(N, "learnt", "Share of the candidates that earlier answers suggest; the rest are random words."),
]  # fmt: skip
KEYS = [i.id for i in (*SETTINGS, *SHARES)]


class MineNeighbors(io.ComfyNode):
    """Asks the model which words go with each concept, and draws the neighborhood."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_MineNeighbors",
            display_name="Mine Neighbor Concepts",
            category=CATEGORY,
            description="Finds the words that evoke a concept in this model and those that must stay, and maps its neighborhood.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Clip.Input("clip", tooltip=CLIP),
                Concepts.Input("concepts", tooltip=CONCEPTS),
                *SETTINGS,
                io.String.Input("extra_words", default="", multiline=True, placeholder="jumbo jet",
                                tooltip="Your own words or phrases to judge as well, one a line."),
                *runs(),
                size(),
                seed(N, "Seed of the random samples and of the words drawn from the vocabulary."),
                *SHARES,
            ],
            outputs=[
                Neighbors.Output(display_name="neighbors", tooltip="For the closed form, the training and the report."),
                io.Image.Output(display_name="map", tooltip="The neighborhood in two dimensions, one picture a concept."),
                io.String.Output(display_name="words", tooltip="The words that go with each concept, strongest first."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, d1, d2, inner, s1, s2, response, response_beyond, nearest, learnt):
        given = {"d1": d1, "d2": d2, "inner": inner, "s1": s1, "s2": s2, "response": response,
                 "response_beyond": response_beyond, "nearest": nearest, "learnt": learnt}  # fmt: skip
        if None in given.values():
            return True
        try:
            N(**given)
        except ErasureError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, clip, concepts, extra_words, picture_size, seed, **settings) -> io.NodeOutput:
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_output import NodeProgress, as_image, guarded
        from ..neighborhood import survey
        from .map_image import draw, points
        from .stages import NeighborSet

        sampling = A(**{i.id: settings[i.id] for i in runs()})
        config = replace(ErasureConfig(), neighbors=N(seed=seed, **{k: settings[k] for k in KEYS}), alignment=sampling)
        with guarded():
            backend = ComfyBackend(model, clip, side=picture_size or None)
            extra, progress = words(extra_words), NodeProgress(cls.hidden.unique_id)
            judge = bool(config.neighbors.words or extra)
            mined, around = survey(backend, concepts, config, extra, progress, judge)
            found = NeighborSet(concepts, config.neighbors, mined, clip, backend.model_hash(), backend.encoder_hash())
        plain = [points(a) for a in around]
        image = as_image([draw(p) for p in plain])
        text = "\n".join(f"{c.phrase}: {', '.join(w.word for w in mined.near_of(c.phrase)) or 'no word found'}" for c in concepts)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | {"text": (text,), "realera_map": plain}
        return io.NodeOutput(found, image, text, ui=shown)
