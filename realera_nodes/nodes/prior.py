"""Build Prior, Save Prior, Load Prior: what mass erasures keep, built once and used again."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..core.errors import ErasureError
from ..core.refinement import RefinementConfig
from ..core.templates import CONTEXTS
from .inputs import CATEGORY, CLIP, Concepts, setting
from .mass_inputs import RETAINED, PriorSocket
from .parsing import lines, preserved
from .save import PREFIX


class BuildPrior(io.ComfyNode):
    """Encodes captions and retained phrases and sums them up."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_BuildPrior",
            display_name="Build Prior",
            category=CATEGORY,
            description="Sums up what mass erasures keep: general knowledge from captions, and your own list of phrases.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose text encoder it is for; only its width is read."),
                io.Clip.Input("clip", tooltip=CLIP),
                Concepts.Input("concepts", optional=True,
                               tooltip="What will be erased: captions that hold its words are left out."),
                RETAINED,
                io.Combo.Input("kind", options=["every kind", *CONTEXTS], default="every kind",
                               tooltip="Which prompts the retained phrases are kept under."),
                setting(RefinementConfig, "contexts", "Prompts in which each retained phrase is seen, at most."),
                io.String.Input("captions", default="", multiline=True, placeholder="a man rides a bike down the street",
                                tooltip="Captions of your own, one a line; empty: about a thousand that come with this pack."),
            ],
            outputs=[
                PriorSocket.Output(display_name="prior", tooltip="For refinement, fusion and Erase Many Concepts."),
                io.String.Output(display_name="report", tooltip="How many captions and phrases it holds."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, retained):
        try:
            preserved(retained or "")
        except ErasureError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, clip, retained, kind, contexts, captions, concepts=()) -> io.NodeOutput:
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_output import NodeProgress, guarded
        from ..priors import build_prior

        kept, without = preserved(retained), tuple(p for c in concepts for p in c.phrases)
        kinds = (kind,) if kind in CONTEXTS else tuple(CONTEXTS)
        with guarded():
            backend = ComfyBackend(model, clip)
            progress = NodeProgress(cls.hidden.unique_id)
            prior = build_prior(backend, kept, kinds, without, lines(captions) or None, contexts, progress)
        text = f"{prior.captions} captions, {len(kept)} retained phrases"
        if without:
            text += f"; no caption holds {', '.join(without)}"
        return io.NodeOutput(prior, text, ui={"text": (text,)})


class SavePrior(io.ComfyNode):
    """A prior as a safetensors file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_SavePrior",
            display_name="Save Prior",
            category=CATEGORY,
            description="Writes a prior as a safetensors file, which Load Prior reads for any model with the same text encoder.",
            inputs=[
                PriorSocket.Input("prior", tooltip="From Build Prior."),
                io.String.Input("filename_prefix", default="priors/general", tooltip=PREFIX.format("priors/")),
            ],
            outputs=[],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, prior, filename_prefix) -> io.NodeOutput:
        from ..backends.comfy_output import output_path
        from ..priors import write_prior

        path, result = output_path(filename_prefix)
        write_prior(path, prior)
        return io.NodeOutput(ui={"prior": [result], "text": (f"{result['subfolder']}/{result['filename']}",)})


class LoadPrior(io.ComfyNode):
    """Reads what Save Prior wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..backends.comfy_mass import prior_names

        return io.Schema(
            node_id="RealEra_LoadPrior",
            display_name="Load Prior",
            category=CATEGORY,
            description="Reads a prior that Save Prior wrote.",
            inputs=[io.Combo.Input("file", options=prior_names(), tooltip="A file in models/priors or output/priors.")],
            outputs=[PriorSocket.Output(display_name="prior", tooltip="The prior; it fits models with the same text encoder.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        from ..backends.comfy_mass import prior_path
        from ..formats.stream import known_sha256

        return known_sha256(prior_path(file))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        from ..backends.comfy_mass import prior_path
        from ..priors import read_prior

        return io.NodeOutput(read_prior(prior_path(file)))
