"""Save Erasure LoRA and Save Erased Checkpoint: whole files under the output folder, with their provenance."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..core.errors import ErasureError
from .inputs import CATEGORY

DTYPES = ["float16", "bfloat16", "float32"]
HIDDEN = (io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id)
PREFIX = "Folder and name under ComfyUI's output folder; a number is added. {} is where the loaders look."


class SaveLora(io.ComfyNode):
    """A LoRA file that ComfyUI, WebUIs and diffusers read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_SaveLora",
            display_name="Save Erasure LoRA",
            category=CATEGORY,
            description="Writes the LoRA of an erasure, in the naming that ComfyUI, WebUIs and diffusers all read.",
            inputs=[
                io.LoraModel.Input("lora", tooltip="The lora output of this pack's nodes."),
                io.String.Input("filename_prefix", default="loras/erased", tooltip=PREFIX.format("loras/")),
                io.Combo.Input("precision", options=DTYPES, default=DTYPES[0], tooltip="Type of the stored numbers."),
            ],
            outputs=[],
            hidden=list(HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, filename_prefix, precision) -> io.NodeOutput:
        from ..backends.comfy_edits import ErasureLora
        from ..backends.comfy_output import file_metadata, output_path, write_factors

        if not isinstance(lora, ErasureLora):
            raise ErasureError("this LoRA was not made by an erasure node: save it with ComfyUI's own Save LoRA node.")
        path, result = output_path(filename_prefix)
        ranks = {name: down.shape[0] for name, (down, _) in lora.factors.items()}
        text = file_metadata([lora.record], lora.kind, cls.hidden, ranks, lora.prediction)
        write_factors(path, lora.factors, text, precision)
        return io.NodeOutput(ui={"lora": [result], "text": (f"{result['subfolder']}/{result['filename']}",)})


class SaveCheckpoint(io.ComfyNode):
    """A checkpoint with the erasure baked in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_SaveCheckpoint",
            display_name="Save Erased Checkpoint",
            category=CATEGORY,
            description="Writes the whole model with its erasures and LoRAs baked in, as one file that any host loads.",
            inputs=[
                io.Model.Input("model", tooltip="The erased model."),
                io.Clip.Input("clip", tooltip="The text encoder to store with it."),
                io.Vae.Input("vae", tooltip="The VAE to store with it."),
                io.String.Input("filename_prefix", default="checkpoints/erased", tooltip=PREFIX.format("checkpoints/")),
            ],
            outputs=[],
            hidden=list(HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, filename_prefix) -> io.NodeOutput:
        from ..backends.comfy import prediction_of
        from ..backends.comfy_edits import kind_of, records_of, save_checkpoint
        from ..backends.comfy_output import file_metadata, guarded, output_path, whole_file

        records = records_of(model)
        if not records:
            raise ErasureError("nothing was erased from this model: connect the model output of an erasure node.")
        path, result = output_path(filename_prefix)
        size = sum(part.patcher.model_size() for part in (clip, vae)) + model.model_size()
        with guarded(), whole_file(path, size) as partial:
            text = file_metadata(records, kind_of(model), cls.hidden, prediction=prediction_of(model))
            save_checkpoint(partial, model, clip, vae, text)
        return io.NodeOutput(ui={"checkpoint": [result], "text": (f"{result['subfolder']}/{result['filename']}",)})
