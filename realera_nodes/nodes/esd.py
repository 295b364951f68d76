"""Train ESD: erased Stable Diffusion on the loaded model, as patches on its weights."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..core.esd import DRAWN_BY, LEFT_OUT, ORIGINS, VARIANTS, EsdConfig, esd_prompts
from .inputs import CATEGORY, CLIP, CONCEPTS, MODEL, Concepts, added, choice, prompts, seed, setting, size
from .parsing import lines, refusal
from .train import PREVIEW, previews

E = EsdConfig
SETTINGS = [
    choice(E, "variant", VARIANTS, "x trains cross-attention: for persons and styles; u all but cross-attention: for objects."),
    setting(E, "steps", "Optimiser steps (the paper's 1000)."),
    setting(E, "lr", "Adam's rate."),
    setting(E, "eta", "How far the target lies away from the concept."),
    choice(E, "origin", ORIGINS,
           "Where the target is measured from: the empty prompt's prediction (the paper), or the concept's (later code)."),
    setting(E, "batch", "Noisy latents of a step."),
    setting(E, "sampling_steps", "Denoising steps of a whole run, of which each step goes a random part."),
    setting(E, "guidance", "Classifier-free guidance of these runs."),
    choice(E, "drawn_by", DRAWN_BY, "Whose noisy latents are trained on: the model's in training, or the original's."),
    setting(E, "clip", "Largest norm of the gradient; 0 is off.", key="clip_norm"),
    prompts(E),
]  # fmt: skip
LATER = added(choice(
    E, "left_out", LEFT_OUT,
    "What u does not train: time embedding and output layers (ends, first code), normalisation (norms, later code), or nothing.",
))  # fmt: skip


class TrainEsd(io.ComfyNode):
    """Trains the network's own weights to steer away from the concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_TrainEsd",
            display_name="Train ESD",
            category=CATEGORY,
            description="Trains the model's own weights to steer away from the concept (ESD). No LoRA: save the checkpoint.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Clip.Input("clip", tooltip=CLIP),
                Concepts.Input("concepts", tooltip=CONCEPTS + " Their anchors and preserved phrases are not used."),
                io.Vae.Input("vae", optional=True, tooltip="For sharp previews while training; without it they are coarse."),
                *SETTINGS,
                seed(E, "Seed of every draw."),
                size(),
                PREVIEW,
                LATER,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The trained model; the one that was put in stays as it is."),
                io.LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, variant, origin, drawn_by, templates, left_out=None):
        return refusal(E, variant=variant, origin=origin, drawn_by=drawn_by, templates=templates, left_out=left_out)

    @classmethod
    def execute(
        cls, model, clip, concepts, seed, picture_size, preview_every, clip_norm, templates, vae=None, **settings
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import record_of, with_deltas
        from ..backends.comfy_output import NodeProgress, guarded
        from ..esd import erase_esd
        from .words import training

        config = E(**settings, clip=clip_norm, templates=lines(templates), seed=seed)
        with guarded():
            backend = ComfyBackend(model, clip, vae, picture_size or None)
            progress = NodeProgress(cls.hidden.unique_id)
            show = previews(backend, esd_prompts(concepts, config)[0], progress, preview_every, config.steps)
            erasure = erase_esd(backend, concepts, config, progress, on_state=show)
            trained = with_deltas(model, erasure.weights, record_of(erasure))
        text = "\n".join([training(erasure.losses), *erasure.notes])
        return io.NodeOutput(trained, {"loss": erasure.losses}, ui={"text": (text,), "realera_loss": erasure.losses})
