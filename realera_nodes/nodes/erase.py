"""Erase Concept (RealEra): everything in one node, for a graph of three."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.alignment import AlignmentConfig
from ..core.closed_form import ClosedFormConfig
from ..core.concepts import check_together
from ..core.neighbors import NeighborConfig
from ..erasure import ErasureConfig, erase
from .concept import problem
from .inputs import CATEGORY, CLIP, MODEL, SEEDS, Concepts, concept_fields, default_of, setting, size
from .parsing import concept
from .train import PREVIEW, previews

PARTS = [
    setting(ErasureConfig, "closed_form_on", "Edit W_K and W_V in closed form (component A of the paper's Table 3)."),
    setting(ErasureConfig, "alignment_on", "Train the noise-alignment LoRA (component B)."),
    setting(ErasureConfig, "neighbors_on", "Erase neighbors too (component C)."),
    setting(ErasureConfig, "beyond_on", "Keep beyond-concept samples (component D)."),
]
MINING = [
    setting(NeighborConfig, "words", "Named words that are erased with the concept, at most; 0 mines none."),
    setting(NeighborConfig, "candidates", "How many words the model is asked about: two UNet calls for each."),
    setting(NeighborConfig, "vocabulary", "How many of the tokenizer's commonest words are looked at."),
]
EDIT = [
    setting(ClosedFormConfig, "lambda_1", "Weight of what is kept against what is erased in the closed form."),
    setting(ClosedFormConfig, "prior", "Weight of general knowledge, over shipped captions, among what is kept."),
    setting(ClosedFormConfig, "strength", "Strength of the closed-form edit."),
]
TRAINING = [
    setting(AlignmentConfig, "steps", "Training steps of the LoRA."),
    setting(AlignmentConfig, "lr", "Learning rate of the LoRA."),
    setting(AlignmentConfig, "rank", "Rank of the LoRA."),
]


class EraseConcept(io.ComfyNode):
    """Mines, edits in closed form and trains with the settings that matter most; the other nodes have all of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_Erase",
            display_name="Erase Concept (RealEra)",
            category=CATEGORY,
            description="Mines neighbors, edits the cross-attention in closed form and trains the LoRA, in one node.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Clip.Input("clip", tooltip=CLIP),
                io.Vae.Input("vae", optional=True, tooltip="For sharp previews while training; without it they are coarse."),
                Concepts.Input("concepts", optional=True, tooltip="Further concepts that are erased together with this one."),
                *concept_fields(), *PARTS, *MINING, *EDIT, *TRAINING,
                io.Int.Input("seed", default=default_of(AlignmentConfig, "seed"), min=0, max=SEEDS, control_after_generate=False,
                             tooltip="Seed of all random draws."),
                size(),
                PREVIEW,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The erased model; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The whole erasure as one LoRA."),
                io.LossMap.Output(display_name="loss", tooltip="The loss of every training step."),
                io.String.Output(display_name="report", tooltip="What was erased with it, and what moved how much."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, phrase, anchor, kind, aliases, preserve, closed_form_on, alignment_on):
        if closed_form_on is False and alignment_on is False:
            return "neither the closed form nor the training is on: switch on at least one of them."
        return problem(phrase, anchor, kind, aliases, preserve)

    @classmethod
    def execute(
        cls, model, clip, phrase, anchor, kind, aliases, preserve, seed, picture_size, preview_every,
        vae=None, concepts=(), **settings,
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, effective, joined, record_of, with_deltas
        from ..backends.comfy_output import NodeProgress, guarded
        from ..exports import edit_lora
        from .words import damage, training

        together = (*concepts, concept(phrase, anchor, kind, aliases, preserve))
        check_together(together)

        def part(base, inputs, **more):
            return replace(base, **{i.id: settings[i.id] for i in inputs}, **more)

        config = ErasureConfig(
            **{i.id: settings[i.id] for i in PARTS},
            neighbors=part(NeighborConfig(), MINING, seed=seed),
            closed_form=part(ClosedFormConfig(), EDIT),
            alignment=part(AlignmentConfig(), TRAINING, seed=seed),
        )
        with guarded():
            backend = ComfyBackend(model, clip, vae, picture_size or None)
            progress = NodeProgress(cls.hidden.unique_id)
            show = previews(backend, together[-1].prompts[0].format(phrase), progress, preview_every, config.alignment.steps)
            erasure = erase(backend, together, config, progress, on_state=show)
            weights = effective(backend)
            deltas = erasure.deltas(weights)
            small = edit_lora(erasure, weights, weights.__getitem__) if erasure.transform else None
            factors = joined(small.factors if small else {}, erasure.factors)
            record = record_of(erasure)
            erased = with_deltas(model, deltas, record)
            text = damage(backend, erasure, deltas, small)
        losses = erasure.state.losses if erasure.state else []
        words = [f"{c.phrase} went with: {', '.join(w.word for w in erasure.mined.near_of(c.phrase)) or '-'}" for c in together]
        text = "\n".join([text, *words, *([training(losses)] if losses else [])])
        lora = ErasureLora(factors, record, backend.kind, backend.prediction)
        return io.NodeOutput(erased, lora, {"loss": losses}, text, ui={"text": (text,), "realera_loss": losses})
