"""Train Erasure LoRA: RealEra's noise alignment (Eq. 8-9) on the loaded model."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.alignment import AlignmentConfig
from ..core.neighbors import NeighborConfig
from ..erasure import ErasureConfig
from .inputs import CATEGORY, CLIP, CONCEPTS, MODEL, NEIGHBORS, Concepts, Neighbors, adapter, runs, seed, setting, size
from .parsing import ends, targets_refusal

A = AlignmentConfig
SETTINGS = [
    setting(A, "steps", "Optimiser steps (the paper's 200)."),
    setting(A, "lr", "AdamW's rate."),
    *adapter(A),
    setting(A, "batch", "Noisy latents of a step."),
    setting(A, "accumulate", "Steps whose gradients are summed before an update."),
    setting(A, "neighbors", "Even steps train on neighbors (Eq. 9); without, every step is Eq. 8.", key="neighbor_steps"),
    setting(A, "beyond", "Even steps also keep beyond-concept samples (Eq. 9's second term)."),
    setting(A, "gamma_1", "Weight of Eq. 9's first term, which erases."),
    setting(A, "gamma_2", "Weight of Eq. 9's second term, which keeps."),
    setting(A, "weight_decay", "AdamW's weight decay."),
    setting(A, "clip", "Largest norm of the gradient; 0 is off.", key="clip_norm"),
    setting(A, "patience", "Stop when the held-out loss has not fallen for so many checks; 0 is off."),
    setting(A, "check_every", "Steps between checks."),
    *runs(),
]
#: inputs that other inputs' names kept from having their setting's
RENAMED = {"neighbor_steps": "neighbors", "clip_norm": "clip"}
PREVIEW = io.Int.Input("preview_every", default=25, min=0, max=10000, tooltip="Steps between preview pictures; 0 is off.")


class TrainLora(io.ComfyNode):
    """Trains a LoRA that draws the concept's noise predictions to the anchor's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_TrainLora",
            display_name="Train Erasure LoRA",
            category=CATEGORY,
            description="Trains a LoRA that predicts the anchor's noise where the concept is asked for (RealEra Eq. 8-9).",
            inputs=[
                io.Model.Input("model", tooltip=MODEL + " After a closed-form edit, its original is the teacher."),
                io.Clip.Input("clip", tooltip=CLIP),
                Neighbors.Input("neighbors", optional=True, tooltip=NEIGHBORS),
                Concepts.Input("concepts", optional=True, tooltip=CONCEPTS + " Not needed with neighbors."),
                io.Vae.Input("vae", optional=True, tooltip="For sharp previews while training; without it they are coarse."),
                *SETTINGS,
                seed(A, "Seed of the LoRA's first weights, of the trajectories and of every draw."),
                size(),
                PREVIEW,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="The LoRA alone, for Save Erasure LoRA or Load LoRA Model."),
                io.LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, targets):
        return targets_refusal(targets)

    @classmethod
    def execute(
        cls, model, clip, seed, picture_size, preview_every, neighbors=None, concepts=None, vae=None, **settings
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, record_of, split, with_lora
        from ..backends.comfy_output import NodeProgress, guarded
        from ..mining import Mined
        from .stages import chosen, require_same, train
        from .words import training

        together = chosen(concepts, neighbors)
        values = {RENAMED.get(i.id, i.id): settings[i.id] for i in SETTINGS}
        config = replace(
            ErasureConfig(closed_form_on=False), neighbors=neighbors.config if neighbors else NeighborConfig(words=0),
            alignment=A(seed=seed, **(values | {"targets": ends(values["targets"])})),
        )  # fmt: skip
        with guarded():
            base, deltas = split(model)
            backend = ComfyBackend(base, clip, vae, picture_size or None)
            if neighbors:
                require_same(neighbors, backend)
            progress = NodeProgress(cls.hidden.unique_id)
            prompt = together[0].prompts[0].format(together[0].phrase)
            show = previews(backend, prompt, progress, preview_every, config.alignment.steps)
            erasure = train(backend, together, neighbors.mined if neighbors else Mined(), config, deltas, progress, show)
            lora = ErasureLora(erasure.factors, record_of(erasure), backend.kind, backend.prediction)
            trained = with_lora(model, lora)
        losses = erasure.state.losses if erasure.state else []
        return io.NodeOutput(trained, lora, {"loss": losses}, ui={"text": (training(losses),), "realera_loss": losses})


def previews(backend, prompt: str, progress, every: int, steps: int):
    """A callback of the training's states that shows the losses, and what the student draws for ``prompt``."""

    def show(state) -> None:
        progress.losses(state.losses, steps)
        if every and (state.step % every == 0 or state.step == steps):
            progress.show(backend.preview(prompt), state.step, steps)

    return show
