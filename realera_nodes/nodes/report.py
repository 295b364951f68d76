"""Erasure Report: pictures before and after at the same seeds, and numbers."""

from __future__ import annotations

import json

from comfy_api.v0_0_2 import io, ui

from ..job import Job
from ..report.grid import before_after
from ..report.probes import general_probes, strongest_words
from ..report.report import draw, embedding_residue, markdown, picture_change, value_drift
from .inputs import CATEGORY, CLIP, CONCEPTS, NEIGHBORS, SEEDS, Concepts, Neighbors, default_of, setting, size
from .parsing import within, words


class ErasureReport(io.ComfyNode):
    """Draws the concept, what evokes it, what must stay and unrelated prompts with both models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RealEra_Report",
            display_name="Erasure Report",
            category=CATEGORY,
            description="Compares a model before and after an erasure: a grid of pictures at the same seeds, and numbers.",
            inputs=[
                io.Model.Input("model", tooltip="The erased model."),
                io.Clip.Input("clip", tooltip=CLIP),
                io.Vae.Input("vae", tooltip="Draws the pictures."),
                Neighbors.Input("neighbors", optional=True, tooltip=NEIGHBORS + " Their words are drawn too."),
                Concepts.Input("concepts", optional=True, tooltip=CONCEPTS + " Not needed with neighbors."),
                io.Model.Input("model_before", optional=True,
                               tooltip="The model to compare with; without it, the erased model without this pack's edits."),
                io.String.Input("residue", default="", multiline=True, placeholder="cockpit\nrunway",
                                tooltip="Phrases that might still evoke the concept, one a line."),
                setting(Job, "pictures", "Pictures of each prompt."),
                setting(Job, "sampling_steps", "Denoising steps."),
                setting(Job, "guidance", "Classifier-free guidance."),
                size(),
                io.Int.Input("seed", default=default_of(Job, "seed"), min=0, max=SEEDS, control_after_generate=False,
                             tooltip="Seed of the first picture of each prompt."),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="One row a prompt: before on the left, after on the right."),
                io.String.Output(display_name="report", tooltip="The numbers as Markdown."),
                io.String.Output(display_name="json", tooltip="The numbers as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, vae, residue, pictures, sampling_steps, guidance, picture_size, seed,
        neighbors=None, concepts=None, model_before=None,
    ) -> io.NodeOutput:  # fmt: skip
        from ..backends.comfy import ComfyBackend
        from ..backends.comfy_edits import difference, without_edits
        from ..backends.comfy_output import NodeProgress, as_image, guarded
        from .stages import chosen

        together = chosen(concepts, neighbors)
        within(Job, pictures=pictures, sampling_steps=sampling_steps, guidance=guidance, seed=seed)
        probes = general_probes(together, words(residue), strongest_words(together, neighbors.mined) if neighbors else None)
        progress, seeds = NodeProgress(cls.hidden.unique_id), [seed + i for i in range(pictures)]
        total, done = 2 * len(probes) * len(seeds), 0

        def drawn(n: int) -> None:
            nonlocal done
            done += n
            progress("pictures", done, total)

        with guarded():
            first = model_before if model_before is not None else without_edits(model)
            backends = [ComfyBackend(m, clip, vae, picture_size or None) for m in (first, model)]
            before, after = (draw(b, probes, seeds, sampling_steps, guidance, drawn) for b in backends)
            deltas = difference(*backends)
            drift, left = (measure(backends[0], probes, deltas) for measure in (value_drift, embedding_residue))
        table = {
            "before": {}, "after": {}, "picture_change": picture_change(probes, before, after), "value_drift": drift,
            "embedding_residue": left,
            "concepts": [{"concept": c.phrase, "anchor": c.anchor} for c in together],
            "probes": [{"group": p.group, "label": p.label, "prompt": p.prompt} for p in probes],
        }  # fmt: skip
        if neighbors:
            table["named_neighbors"] = {c.phrase: [w.word for w in neighbors.mined.near_of(c.phrase)] for c in together}
        rows = [(p.group, p.label, p.prompt, before.pictures[i], after.pictures[i]) for i, p in enumerate(probes)]
        image = as_image([before_after(rows)])
        text = markdown("Erased: " + ", ".join(c.phrase for c in together), table)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | {"text": (text,), "realera_report": [table]}
        return io.NodeOutput(image, text, json.dumps(table, indent=1), ui=shown)
