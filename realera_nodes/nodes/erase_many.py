"""Erase Many Concepts: MACE, or RealEra in MACE's frame, over a list or one of the papers' sets."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.alignment import AlignmentConfig
from ..core.concepts import TEMPLATES, Preserved, check_lists
from ..core.errors import ErasureError
from ..core.neighbors import NeighborConfig
from ..mass_config import FUSIONS, METHODS, MassConfig
from ..presets import load_preset, preset_names
from .inputs import CATEGORY, CLIP, MODEL, Concepts, seed, setting, size
from .mass_inputs import (
    PRIOR,
    PROMPTS,
    RETAINED,
    SUPPRESSION,
    PriorSocket,
    concept_list,
    priors,
    refinement_config,
    suppression_config,
    suppression_refusal,
)
from .parsing import preserved
from .train import PREVIEW, previews

NONE = "none"
A, N = AlignmentConfig, NeighborConfig
PAPER = io.Boolean.Input(
    "paper_settings", default=True,
    tooltip="On: the paper's settings for the preset, or for the first concept's kind (Table 10). Off: the settings below.",
)  # fmt: skip
ALIGNMENT = [
    setting(A, "steps", "realera-mass: training steps of each LoRA.", key="alignment_steps"),
    setting(A, "lr", "realera-mass: learning rate of each LoRA.", key="alignment_lr"),
    setting(N, "words", "realera-mass: named words that are erased with each concept, at most; 0 mines none."),
    setting(N, "candidates", "realera-mass: how many words the model is asked about for each concept."),
    setting(N, "vocabulary", "How many of the tokenizer's commonest words are looked at."),
]


class EraseMany(io.ComfyNode):
    """Refinement, a LoRA for each concept and their fusion in one node; finished LoRAs are kept until they are needed again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_EraseMany",
            display_name="Erase Many Concepts",
            category=CATEGORY,
            description="Erases a list or a preset of concepts at once (MACE). A stopped run goes on where it was.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Clip.Input("clip", tooltip=CLIP),
                io.Vae.Input("vae", optional=True, tooltip="Needed where a concept brings pictures; sharpens previews."),
                Concepts.Input("concepts", optional=True, tooltip="Concepts from Erasure Concept, before those of the list."),
                PriorSocket.Input("prior", optional=True, tooltip=PRIOR),
                io.String.Input("list", default="", multiline=True, placeholder="airplane -> sky\napple -> table",
                                tooltip="Concepts, one a line, each with an arrow and its anchor."),
                io.Combo.Input("kind", options=list(TEMPLATES), default="object", tooltip="What the list's concepts are."),
                io.Combo.Input("preset", options=[NONE, *preset_names()], default=NONE,
                               tooltip="One of the MACE paper's sets: its concepts, its retained list, its settings."),
                RETAINED,
                io.Combo.Input("method", options=list(METHODS), default=METHODS[0],
                               tooltip="mace, or realera-mass: mined neighbors join in, and noise alignment trains the LoRAs."),
                io.Combo.Input("fusion", options=list(FUSIONS), default=FUSIONS[0],
                               tooltip="closed-form (Eq. 7), sum (Eq. 6, to compare with), or none: only the refinement."),
                PAPER, *priors("lambda_2"), *SUPPRESSION, *ALIGNMENT,
                seed(A, "Seed of all random draws."),
                size(),
                PREVIEW,
                PROMPTS,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The erased model; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The whole erasure as one LoRA."),
                io.String.Output(display_name="report", tooltip="What was erased or found finished, and what moved how much."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, list, kind, retained, preset, targets, t1, t2):
        try:
            named = concept_list(list or "", kind or "object")
            check_lists(named, preserved(retained or "")) if named else None
        except ErasureError as error:
            return str(error)
        return suppression_refusal(targets, t1, t2)

    @classmethod
    def execute(
        cls, model, clip, list, kind, preset, retained, method, fusion, paper_settings, seed, picture_size, preview_every,
        vae=None, concepts=(), prior=None, **settings,
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, effective, record_of
        from ..backends.comfy_mass import host_shelf
        from ..backends.comfy_output import NodeProgress, guarded
        from ..mass import erase_many
        from .stages import applied

        chosen = load_preset(preset) if preset != NONE else None
        together = (*concepts, *concept_list(list, kind), *(chosen.concepts if chosen else ()))
        kept = (*preserved(retained), *(Preserved(p) for p in (chosen.retained if chosen else ())))
        if not together:
            raise ErasureError("nothing to erase: write a list, choose a preset, or connect concepts.")
        config = _config(together[0].kind, chosen, method, fusion, paper_settings, seed, settings)
        with guarded():
            backend = ComfyBackend(model, clip, vae, picture_size or None)
            progress = NodeProgress(cls.hidden.unique_id)
            weights = effective(backend)
            shelf = host_shelf(backend, together, kept, config, prior)
            steps = config.training.steps

            def show(concept, state) -> None:
                previews(backend, concept.prompts[0].format(concept.phrase), progress, preview_every, steps)(state)

            erasure = erase_many(backend, together, config, kept, progress, shelf, prior, show)
            record = record_of(erasure)
            erased, small, text = applied(model, backend, erasure, weights, record)
        found = len(together) - len(erasure.trained) if fusion != "none" else 0
        text = f"{len(together)} concepts by {method}, {found} of their LoRAs found finished\n{text}"
        return io.NodeOutput(
            erased, ErasureLora(small.factors, record, backend.kind, backend.prediction), text, ui={"text": (text,)}
        )


def _config(kind, preset, method, fusion, paper_settings, seed, given) -> MassConfig:
    """Settings by the paper or by the widgets."""
    from ..presets.settings import preset_config

    if paper_settings and preset is not None:
        config = preset_config(preset, method)
        config = replace(config, suppression=replace(config.suppression, seed=seed))
    else:
        refinement = refinement_config(kind, paper_settings, "lambda_2", given)
        config = MassConfig(method, refinement=refinement, suppression=suppression_config(kind, paper_settings, seed, given))
    alignment = A(steps=given["alignment_steps"], lr=given["alignment_lr"], seed=seed)
    neighbors = N(words=given["words"], candidates=given["candidates"], vocabulary=given["vocabulary"], seed=seed)
    return replace(config, fusion=fusion, alignment=alignment, neighbors=neighbors)
