"""Train Suppression LoRA: pictures of a concept stop looking at its words (MACE Eq. 3)."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..core.errors import ErasureError
from ..core.suppression import SuppressionConfig
from ..mass_config import MassConfig
from .inputs import CATEGORY, CLIP, MODEL, Concepts, seed, size
from .mass_inputs import PAPER, PROMPTS, SUPPRESSION, Loras, suppression_config, suppression_refusal
from .train import PREVIEW, previews

LIST = "LoRAs so far; this one is put after them, so that several of these nodes make one list for Fuse Erasure LoRAs."


class TrainSuppression(io.ComfyNode):
    """MACE's second step: a LoRA of one concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_TrainSuppression",
            display_name="Train Suppression LoRA",
            category=CATEGORY,
            description="Trains one concept's LoRA, which keeps its pictures from attending to its words (MACE Eq. 3).",
            inputs=[
                io.Model.Input("model", tooltip=MODEL + " After MACE Refinement, training starts from the refined weights."),
                io.Clip.Input("clip", tooltip=CLIP),
                Concepts.Input("concept", tooltip="One concept, from Erasure Concept, with pictures and masks if you have them."),
                io.Vae.Input("vae", optional=True, tooltip="Needed where the concept brings pictures; sharpens previews."),
                Loras.Input("loras", optional=True, tooltip=LIST),
                PAPER, *SUPPRESSION,
                seed(SuppressionConfig, "Seed of the LoRA's first weights, of the pictures and of every draw."),
                size(),
                PREVIEW,
                PROMPTS,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with this LoRA; what was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The LoRA alone, for Save Erasure LoRA or Load LoRA Model."),
                Loras.Output(display_name="loras", tooltip="The list with this LoRA, for Fuse Erasure LoRAs."),
                io.LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, targets, t1, t2):
        return suppression_refusal(targets, t1, t2)

    @classmethod
    def execute(
        cls, model, clip, concept, paper_settings, seed, picture_size, preview_every, vae=None, loras=(), **settings
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, record_of, records_of, split, with_lora
        from ..backends.comfy_output import NodeProgress, guarded
        from .mass_stages import SUPPRESSED, lora_of, suppress
        from .words import training

        if len(concept) != 1:
            raise ErasureError(f"{len(concept)} concepts are connected: connect one to each node, or use Erase Many Concepts.")
        if any(r.method == SUPPRESSED for r in records_of(model)):
            raise ErasureError("the model carries another concept's LoRA: connect the one from MACE Refinement.")
        (one,) = concept
        own = suppression_config(one.kind, paper_settings, seed, settings)
        with guarded():
            base, deltas = split(model)
            backend = ComfyBackend(base, clip, vae, picture_size or None)
            progress = NodeProgress(cls.hidden.unique_id)
            show = previews(backend, one.prompts[0].format(one.phrase), progress, preview_every, own.steps)
            erasure = suppress(backend, one, MassConfig("mace", suppression=own), deltas, progress, show)
            lora = ErasureLora(erasure.factors, record_of(erasure, SUPPRESSED, own), backend.kind, backend.prediction)
            trained = with_lora(model, lora)
        losses = erasure.losses[one.phrase]
        shown = {"text": (f"{one.phrase}: {training(losses)}",), "realera_loss": losses}
        return io.NodeOutput(trained, lora, (*loras, lora_of(lora, one)), {"loss": losses}, ui=shown)
