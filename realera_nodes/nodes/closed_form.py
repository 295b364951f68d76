"""Closed-Form Edit W_K/W_V: RealEra's Eq. 7 on the loaded model, as a patch and as a LoRA."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.closed_form import ClosedFormConfig
from ..core.errors import ErasureError
from ..core.neighbors import NeighborConfig
from ..erasure import ErasureConfig
from .inputs import CATEGORY, CLIP, CONCEPTS, MODEL, NEIGHBORS, Concepts, Neighbors, added, setting

C = ClosedFormConfig
SETTINGS = [
    setting(C, "lambda_1", "Weight of what is kept against what is erased (lambda_1 of Eq. 7)."),
    setting(C, "prior", "Weight of general knowledge, over shipped captions, among what is kept."),
    setting(C, "ridge", "Pull towards the original weights; raise it if the edit is refused as badly conditioned."),
    setting(C, "keys", "Edit W_K: where attention looks."),
    setting(C, "values", "Edit W_V: what attention brings."),
    setting(C, "strength", "0 is the original model, 1 the edit."),
]
PARTS = [
    setting(ErasureConfig, "neighbors_on", "Erase neighbors too (component C of the paper's Table 3)."),
    setting(ErasureConfig, "beyond_on", "Keep beyond-concept samples (component D)."),
]
#: last, so that graphs which were saved without it keep their values' places
BEYOND = setting(C, "beyond", "Weight of the mined words that draw something else, among what is kept.")
HEAD = added(setting(
    C, "head", "Weight of the start token and the words before each erased phrase, which stay; 1 is that of an erased row."
))  # fmt: skip
KEYS = [i.id for i in (*SETTINGS, BEYOND, HEAD)]


class ClosedForm(io.ComfyNode):
    """Edits all cross-attention projections at once: seconds, no training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_ClosedForm",
            display_name="Closed-Form Edit W_K/W_V",
            category=CATEGORY,
            description="Erases by solving for the cross-attention's key and value weights (RealEra Eq. 7). Takes seconds.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                Neighbors.Input("neighbors", optional=True, tooltip=NEIGHBORS),
                Concepts.Input("concepts", optional=True, tooltip=CONCEPTS + " Not needed with neighbors; alone, mines none."),
                io.Clip.Input("clip", optional=True, tooltip=CLIP + " Not needed with neighbors."),
                *SETTINGS,
                *PARTS,
                BEYOND,
                HEAD,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The edited model; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The edit as a LoRA."),
                io.String.Output(display_name="report", tooltip="What the edit changes, and how much it moves what should stay."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, keys, values):
        return "neither W_K nor W_V is selected: edit at least one of them." if keys is False and values is False else True

    @classmethod
    def execute(
        cls, model, neighbors_on, beyond_on, neighbors=None, concepts=None, clip=None, **settings
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, effective, record_of, with_deltas
        from ..backends.comfy_output import NodeProgress, guarded
        from ..exports import edit_lora
        from ..mining import Mined
        from .stages import chosen, edit, require_same
        from .words import damage

        clip = clip if clip is not None else (neighbors.clip if neighbors else None)
        together = chosen(concepts, neighbors)
        if clip is None:
            raise ErasureError("concepts alone need a text encoder: connect CLIP, or connect neighbors instead.")
        config = replace(
            ErasureConfig(alignment_on=False), neighbors_on=neighbors_on, beyond_on=beyond_on,
            neighbors=neighbors.config if neighbors else NeighborConfig(words=0),
            closed_form=C(**{k: settings[k] for k in KEYS if k in settings}),
        )  # fmt: skip
        with guarded():
            backend = ComfyBackend(model, clip)
            if neighbors:
                require_same(neighbors, backend)
            mined = neighbors.mined if neighbors else Mined()
            weights = effective(backend)  # damaged ones are named before the work
            erasure = edit(backend, together, mined, config, NodeProgress(cls.hidden.unique_id))
            deltas = erasure.deltas(weights)
            lora = edit_lora(erasure, weights, weights.__getitem__)
            record = record_of(erasure)
            edited = with_deltas(model, deltas, record)
            text = damage(backend, erasure, deltas, lora)
        return io.NodeOutput(
            edited, ErasureLora(lora.factors, record, backend.kind, backend.prediction), text, ui={"text": (text,)}
        )
