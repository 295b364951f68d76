"""Erasure Concept: what to erase, what it becomes, what must stay."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..core.concepts import check_together
from ..core.errors import ErasureError
from .inputs import CATEGORY, Concepts, concept_fields
from .parsing import concept


class ErasureConcept(io.ComfyNode):
    """One concept; several are chained through ``concepts``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_Concept",
            display_name="Erasure Concept",
            category=CATEGORY,
            description="Names a concept to erase, what it becomes, and what must stay. Chain several by the concepts input.",
            inputs=[
                *concept_fields(),
                io.String.Input(
                    "templates", default="", multiline=True, placeholder="a photo of the {}\n{}",
                    tooltip="Prompts to erase under, one a line, with {} where the phrase goes. Empty: those of the kind.",
                ),
                Concepts.Input("concepts", optional=True, tooltip="Concepts that are erased together with this one."),
                io.Image.Input("images", optional=True,
                               tooltip="Pictures of the concept, for methods that train on pictures; RealEra needs none."),
                io.Mask.Input("masks", optional=True,
                              tooltip="Where the concept is in each picture, white on it; one mask for each picture."),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="The concept, after those that were put in.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, phrase, anchor, kind, aliases, preserve, templates):
        return problem(phrase, anchor, kind, aliases, preserve, templates)

    @classmethod
    def execute(
        cls, phrase, anchor, kind, aliases, preserve, templates, concepts=(), images=None, masks=None
    ) -> io.NodeOutput:  # fmt: skip
        made = concept(phrase, anchor, kind, aliases, preserve, templates)
        if images is not None or masks is not None:
            from ..backends.comfy_output import from_image, from_mask

            pictures = None if images is None else from_image(images)
            made = replace(made, images=pictures, masks=None if masks is None else from_mask(masks, pictures))
        together = (*concepts, made)
        check_together(together)
        return io.NodeOutput(together)


def problem(phrase, anchor, kind, aliases, preserve, templates="") -> bool | str:
    """True, or the sentence that says what to mend; widgets that are wired up are known later only."""
    if any(x is None for x in (phrase, anchor, kind, aliases, preserve, templates)):
        return True
    try:
        concept(phrase, anchor, kind, aliases, preserve, templates)
    except ErasureError as error:
        return str(error)
    return True
