"""UCE Edit: unified concept editing on the loaded model, as a patch and as a LoRA."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..core.uce import KEPT_TOKENS, TOKENS, UceConfig
from .inputs import CATEGORY, CLIP, CONCEPTS, MODEL, Concepts, added, choice, prompts, setting
from .parsing import lines, refusal

U = UceConfig
SETTINGS = [
    choice(U, "tokens", TOKENS,
           "What of a phrase is edited: its last token alone, or all from there on with end and padding (first code)."),
    setting(U, "to_anchor", "Each concept becomes its own anchor; off, all become the guide."),
    io.String.Input("guide", default=U.guide, placeholder="art",
                    tooltip="What all concepts become with to_anchor off; empty is the empty prompt."),
    setting(U, "erase_scale", "Weight of what is erased."),
    setting(U, "preserve_scale", "Weight of each preserved phrase; 0 is 1 / the number kept, 0.1 at least (first code)."),
    setting(U, "mu", "Pull towards the original weights; raise it if the edit is refused as ill-conditioned."),
    prompts(U),
    setting(U, "keys", "Edit W_K: where attention looks."),
    setting(U, "values", "Edit W_V: what attention brings."),
    setting(U, "strength", "0 is the original model, 1 the edit."),
    added(choice(U, "kept_tokens", KEPT_TOKENS,
                 "What of a preserved phrase is kept: what would be edited of it, or all of its prompt (first code).")),
    added(setting(U, "keep_empty", "Keep the empty prompt too, which every picture is guided away from (first code).")),
]  # fmt: skip


class UceEdit(io.ComfyNode):
    """Edits all cross-attention projections at once, by a few tokens of each concept: seconds, no training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_Uce",
            display_name="UCE Edit",
            category=CATEGORY,
            description="Erases by unified concept editing (UCE): W_K and W_V solved for the concepts' tokens. Takes seconds.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Clip.Input("clip", tooltip=CLIP),
                Concepts.Input("concepts", tooltip=CONCEPTS),
                *SETTINGS,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The edited model; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The edit as a LoRA."),
                io.String.Output(display_name="report", tooltip="What the edit changes, and how much it moves what should stay."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tokens, to_anchor, guide, templates, keys, values, kept_tokens=None):
        given = {"tokens": tokens, "to_anchor": to_anchor, "guide": guide, "templates": templates, "keys": keys, "values": values}
        return refusal(U, **given, kept_tokens=kept_tokens)

    @classmethod
    def execute(cls, model, clip, concepts, **settings) -> io.NodeOutput:
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, effective, record_of
        from ..backends.comfy_output import NodeProgress, guarded
        from ..uce import erase_uce
        from .stages import applied

        config = U(**(settings | {"templates": lines(settings["templates"])}))
        with guarded():
            backend = ComfyBackend(model, clip)
            weights = effective(backend)  # damaged ones are named before the work
            erasure = erase_uce(backend, concepts, config, progress=NodeProgress(cls.hidden.unique_id))
            record = record_of(erasure)
            edited, lora, text = applied(model, backend, erasure, weights, record)
        text = "\n".join([text, *erasure.notes])
        return io.NodeOutput(
            edited, ErasureLora(lora.factors, record, backend.kind, backend.prediction), text, ui={"text": (text,)}
        )
