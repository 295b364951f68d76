"""Add Erasure LoRA and Fuse Erasure LoRAs: any number of concepts' LoRAs become one edit (MACE Eq. 7)."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.errors import ErasureError
from ..mass_config import MassConfig
from .inputs import CATEGORY, CLIP, Concepts
from .mass_inputs import PAPER, PRIOR, RETAINED, Loras, PriorSocket, priors, refinement_config
from .parsing import preserved
from .suppression import LIST

NONE = "none"
FUSIONS = ["closed form", "sum"]


class AddLora(io.ComfyNode):
    """Puts a LoRA on the list that is fused."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..backends.comfy_mass import lora_names

        return io.Schema(
            node_id="RealEra_AddLora",
            display_name="Add Erasure LoRA",
            category=CATEGORY,
            description="Puts one concept's LoRA, from a node or a file, on the list for Fuse Erasure LoRAs.",
            inputs=[
                io.LoraModel.Input("lora", optional=True, tooltip="From a training node; leave it open to take a file."),
                io.Combo.Input("file", options=[NONE, *lora_names()], default=NONE,
                               tooltip="A LoRA file, where no lora is connected."),
                Concepts.Input("concept", optional=True, tooltip="What it erases, where the file does not say so itself."),
                Loras.Input("loras", optional=True, tooltip=LIST),
            ],
            outputs=[Loras.Output(display_name="loras", tooltip="The list with this LoRA.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file, lora=None, concept=None, loras=()) -> io.NodeOutput:
        from ..backends.comfy_edits import ErasureLora
        from ..backends.comfy_mass import lora_path
        from .mass_stages import lora_of

        if (lora is None) == (file == NONE):
            raise ErasureError("give one LoRA: connect lora, or choose a file, and not both.")
        if lora is not None and not isinstance(lora, ErasureLora):
            raise ErasureError("this LoRA was not made by an erasure node: save it, and choose its file here.")
        if concept is not None and len(concept) != 1:
            raise ErasureError(f"{len(concept)} concepts are connected: a LoRA that is fused erases one.")
        source = lora if lora is not None else lora_path(file)
        return io.NodeOutput((*loras, lora_of(source, concept[0] if concept else None)))


class FuseLoras(io.ComfyNode):
    """MACE's third step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_FuseLoras",
            display_name="Fuse Erasure LoRAs",
            category=CATEGORY,
            description="Makes one edit of any number of concepts' LoRAs, each at work on its own concept only (MACE Eq. 7).",
            inputs=[
                io.Model.Input("model", tooltip="As MACE Refinement gave it, where the LoRAs started; or the original."),
                io.Clip.Input("clip", tooltip=CLIP),
                Loras.Input("loras", optional=True, tooltip="From Train Suppression LoRA or Add Erasure LoRA."),
                io.String.Input("folder", default="", placeholder="concepts",
                                tooltip="A folder below models/loras or output/loras: all LoRA files in it are fused too."),
                PriorSocket.Input("prior", optional=True, tooltip=PRIOR),
                RETAINED,
                io.Combo.Input("fusion", options=FUSIONS, default=FUSIONS[0],
                               tooltip="closed form is MACE's; sum just adds the LoRAs up (Eq. 6), to compare with."),
                PAPER, *priors("lambda_2"),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The erased model; the one that was put in stays as it is."),
                io.LoraModel.Output(display_name="lora", tooltip="Refinement and fused LoRAs as one LoRA on the original model."),
                io.String.Output(display_name="report", tooltip="What was fused, and how much moves what should stay."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, folder, retained, fusion, paper_settings, loras=(), prior=None, **settings
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import ErasureLora, effective, record_of, records_of, split
        from ..backends.comfy_mass import lora_folder
        from ..backends.comfy_output import NodeProgress, guarded
        from .mass_stages import FUSED, REFINED, fuse_loras, lora_of
        from .stages import applied

        files = lora_folder(folder.strip()) if folder.strip() else []
        together = [*loras, *map(lora_of, files)]
        if not together:
            raise ErasureError("no LoRA to fuse was given: connect loras, or name a folder.")
        edits = records_of(model)
        if len(edits) > 1 or any(r.method != REFINED for r in edits):
            raise ErasureError("the model carries other edits than a refinement: connect MACE Refinement's, or the original.")
        refinement = edits[0].transform if edits else None
        own = refinement_config(together[0].concept.kind, paper_settings, "lambda_2", settings)
        config = MassConfig("mace", fusion="closed-form" if fusion == FUSIONS[0] else "sum", refinement=own)
        with guarded():
            base, _ = split(model)
            backend = ComfyBackend(base, clip)
            weights = effective(backend)
            progress = NodeProgress(cls.hidden.unique_id)
            erasure = fuse_loras(backend, together, preserved(retained), config, prior, refinement, progress)
            record = record_of(erasure, FUSED, config)
            fused, small, text = applied(base, backend, erasure, weights, record)
        text = f"{len(together)} LoRAs fused by {fusion}\n{text}"
        lora = ErasureLora(small.factors, replace(record, method="mace"), backend.kind, backend.prediction)
        return io.NodeOutput(fused, lora, text, ui={"text": (text,)})
