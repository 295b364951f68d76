"""MACE Refinement: the words around concepts forget them (MACE Eq. 1, 2, 19)."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.refinement import RefinementConfig
from ..mass_config import MassConfig
from .inputs import CATEGORY, CLIP, MODEL, Concepts, setting
from .mass_inputs import PAPER, PRIOR, RETAINED, PriorSocket, priors, refinement_config
from .parsing import preserved


class Refinement(io.ComfyNode):
    """MACE's first step, for all concepts at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_Refinement",
            display_name="MACE Refinement",
            category=CATEGORY,
            description="Takes the concepts out of the words that stand around them, in closed form (MACE Eq. 2). Takes seconds.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Clip.Input("clip", tooltip=CLIP),
                Concepts.Input("concepts", tooltip="All that will be erased together, from Erasure Concept."),
                PriorSocket.Input("prior", optional=True, tooltip=PRIOR),
                RETAINED, PAPER, *priors("lambda_1"),
                setting(RefinementConfig, "head", "Keep the words before the phrase as they are, which cannot know of it."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The refined model; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The refinement as a LoRA."),
                io.String.Output(display_name="report", tooltip="What the refinement changes, and what moves how much."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, concepts, retained, paper_settings, head, prior=None, **settings
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, effective, record_of
        from ..backends.comfy_output import NodeProgress, guarded
        from .mass_stages import REFINED, refine
        from .stages import applied

        own = replace(refinement_config(concepts[0].kind, paper_settings, "lambda_1", settings), head=head)
        config = MassConfig("mace", fusion="none", refinement=own)
        with guarded():
            backend = ComfyBackend(model, clip)
            weights = effective(backend)  # damaged ones are named before the work
            progress = NodeProgress(cls.hidden.unique_id)
            erasure = refine(backend, concepts, preserved(retained), config, prior, progress)
            record = record_of(erasure, REFINED, own)
            refined, small, text = applied(model, backend, erasure, weights, replace(record, transform=erasure.transform))
        return io.NodeOutput(
            refined, ErasureLora(small.factors, record, backend.kind, backend.prediction), text, ui={"text": (text,)}
        )
