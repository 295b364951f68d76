"""The page's layout: six steps on one page, top to bottom, and the history."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from ..core.alignment import AlignmentConfig
from ..core.concepts import TEMPLATES
from ..presets import load_preset, preset_names
from . import words
from .request import METHOD_NAMES

#: (concept, anchor, kind, keep) beside the form: the first ones are known to the embedded model
EXAMPLES = (
    ("airplane", "sky", "object", "bird, ship"),
    ("apple", "table", "object", "strawberry"),
    ("Mira Voss", "a woman", "person", "astronaut"),
    ("Van Gogh", "a painting", "style", "Claude Monet"),
)
#: nothing on the page is fetched from elsewhere
THEME = gr.themes.Soft(
    primary_hue="teal", neutral_hue="slate", font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(  # contrasts of at least 4.5 to 1
    block_title_background_fill="transparent", block_title_background_fill_dark="transparent", block_title_padding="0",
    block_title_text_color="*neutral_800", block_title_text_color_dark="*neutral_100", block_title_text_weight="600",
    block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200", block_label_background_fill="*neutral_100",
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white", button_primary_text_color_dark="white",
    checkbox_label_background_fill_selected="*primary_700", checkbox_label_background_fill_selected_dark="*primary_700",
    checkbox_label_text_color_selected="white", checkbox_label_text_color_selected_dark="white",
    slider_color="*primary_700", slider_color_dark="*primary_500", color_accent="*primary_700",
    link_text_color="*primary_700", link_text_color_dark="*primary_300",
)  # fmt: skip
LEAD = "Make a Stable Diffusion model forget a person, a style or a thing. Your model's file is only read; results are new files."


def layout(models: list[str], model: str, exports: list[str]) -> SimpleNamespace:
    """Draws the page inside a gr.Blocks; returns its components by name."""
    ui = SimpleNamespace(examples=[])
    ui.ids = gr.BrowserState({"look": "", "preview": "", "erase": ""}, storage_key="realera-studio", secret="not-secret")
    ui.seen = gr.State({})
    ui.looked, ui.finished = gr.State([]), gr.State([])  # [run, version] of what the map and the comparison show
    ui.uploaded = gr.State("")
    ui.timer = gr.Timer(1.0)
    gr.HTML(f'<h1>RealEra studio</h1><p class="lead">{LEAD}</p>')
    ui.queue = gr.HTML(words.queue([], []), elem_id="queue")
    with gr.Tabs():
        with gr.Tab("Erase", id="erase"):
            _what(ui, models, model)
            _around(ui)
            _preview(ui)
            _train(ui)
            _compare(ui)
            _export(ui, exports)
        with gr.Tab("History", id="history"):
            ui.history = gr.HTML(words.history([], str), elem_id="history")
    return ui


def _what(ui: SimpleNamespace, models: list[str], model: str) -> None:
    gr.HTML("<h2>1. What should it forget?</h2>")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            ui.model = gr.Dropdown(
                models,
                value=model,
                label="Model",
                info="“demo” comes with this program: try it first.",
                elem_id="model",
                filterable=True,
            )
            with gr.Row():
                ui.concept = gr.Textbox(
                    label="Concept", info="What to forget; several with commas.", placeholder="airplane",
                    elem_id="concept", lines=1, max_lines=6, min_width=220,
                )  # fmt: skip
                ui.anchor = gr.Textbox(
                    label="Anchor", info="What it becomes; one for all, or one each.", placeholder="sky", elem_id="anchor",
                    lines=1,
                    max_lines=6, min_width=220,
                )  # fmt: skip
            ui.keep = gr.Textbox(
                label="Keep", info="What must not suffer, separated with commas. May be empty.", placeholder="bird, ship",
                elem_id="keep",
                lines=1, max_lines=6,
            )  # fmt: skip
            ui.kind = gr.Radio(
                list(TEMPLATES), value="object", label="Kind", info="Decides the prompts it is erased under.", elem_id="kind"
            )
        with gr.Column(scale=2, min_width=260):
            gr.HTML('<p class="hint">Examples. The first three are for the demo model.</p>')
            for concept, anchor, *_ in EXAMPLES:
                ui.examples.append(gr.Button(f"{concept} → {anchor}", size="sm", variant="secondary"))
            ui.preset = gr.Dropdown(
                [("none", ""), *((f"{n} ({len(load_preset(n).concepts)} to erase)", n) for n in preset_names())], value="",
                label="Or one of the papers' lists", info="Fills in the form; use MACE for long lists.", elem_id="preset",
            )  # fmt: skip
            with gr.Accordion("Add a model", open=False):
                gr.HTML(
                    '<p class="hint">Only .safetensors: a .ckpt can run code. Put large files into a model folder instead.</p>'
                )
                ui.upload = gr.UploadButton(
                    "Upload a .safetensors checkpoint", file_types=[".safetensors"], size="sm", elem_id="upload"
                )
                ui.refresh = gr.Button("Look again into the model folders", size="sm")
            ui.form_note = gr.HTML("", elem_id="form-note")


def _around(ui: SimpleNamespace) -> None:
    gr.HTML(
        '<h2>2. What goes with it?</h2><p class="hint">Shows which words the model draws like it, before anything is changed.</p>'
    )
    with gr.Row():
        ui.look = gr.Button("Look around", variant="primary", elem_id="look", scale=0, min_width=180)
        ui.look_cancel = gr.Button("Cancel", visible=False, elem_id="look-cancel", scale=0, min_width=120)
    ui.look_problem = gr.HTML("", elem_id="look-problem")  # of the form: the clock does not write here
    ui.look_status = gr.HTML("", elem_id="look-status")
    with gr.Row(visible=False, elem_id="around") as ui.around:
        with gr.Column(scale=3, min_width=320):
            ui.which = gr.Dropdown([], label="Around", visible=False, elem_id="which")
            ui.map = gr.Plot(show_label=False, elem_id="map")
        with gr.Column(scale=2, min_width=280):
            ui.around_note = gr.HTML("")
            ui.also = gr.CheckboxGroup([], label="Erase this one too", elem_id="also")
            ui.spare = gr.CheckboxGroup([], label="Keep this one", elem_id="spare")


def _preview(ui: SimpleNamespace) -> None:
    gr.HTML(
        '<h2>3. How does it look?</h2><p class="hint">The closed-form edit takes a second: see it before anything is trained.</p>'
    )
    with gr.Row():
        ui.method = gr.Radio(
            [(v, k) for k, v in METHOD_NAMES.items()], value="realera", label="Method", elem_id="method", scale=3
        )
        ui.strength = gr.Slider(
            0, 1.5, 1.0, step=0.05, label="Strength", info="0 is your model, 1 the edit. Draws anew when let go.",
            elem_id="strength",
            scale=2, min_width=260,
        )  # fmt: skip
    with gr.Row():
        ui.preview = gr.Button("Draw preview", variant="primary", elem_id="preview", scale=0, min_width=180)
        ui.preview_cancel = gr.Button("Cancel", visible=False, elem_id="preview-cancel", scale=0, min_width=120)
    ui.preview_problem = gr.HTML("", elem_id="preview-problem")
    ui.preview_status = gr.HTML("", elem_id="preview-status")
    ui.cards = gr.HTML("", elem_id="cards")


def _train(ui: SimpleNamespace) -> None:
    gr.HTML(
        '<h2>4. Erase</h2><p class="hint">Trains, draws before and after, writes files. It goes on when you close this tab.</p>'
    )
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            ui.steps = gr.Number(
                0, label="Training steps", info=f"0: the method's own ({AlignmentConfig().steps} for RealEra).", precision=0,
                elem_id="steps", min_width=180,
            )  # fmt: skip
            ui.pictures = gr.Number(2, label="Pictures of each prompt", info="In the report.", precision=0, min_width=180)
            ui.sampling = gr.Number(20, label="Denoising steps", info="Of the report's pictures.", precision=0, min_width=180)
            ui.seed = gr.Number(0, label="First seed", precision=0, min_width=180)
        ui.checkpoint = gr.Checkbox(True, label="Write the whole erased checkpoint, not only LoRAs", elem_id="checkpoint")
        ui.settings = gr.Textbox(
            "",
            label="More settings",
            info="One a line, as the command line takes them, such as neighbors.m=20",
            lines=2,
            elem_id="settings",
        )
    with gr.Row():
        ui.erase = gr.Button("Erase", variant="primary", elem_id="erase-button", scale=0, min_width=180)
        ui.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel", scale=0, min_width=120)
        ui.resume = gr.Button("Continue", visible=False, elem_id="resume", scale=0, min_width=120)
    ui.erase_problem = gr.HTML("", elem_id="erase-problem")
    ui.status = gr.HTML("", elem_id="status")
    with gr.Row(visible=False) as ui.training:
        ui.loss = gr.LinePlot(
            x="step", y="loss", color="line", color_map={"each step": "#8fb3ad", "running mean": "#0f766e"}, height=260,
            label="Loss (pale: each step, dark: running mean)", color_title=" ", elem_id="loss", min_width=300, scale=3,
        )  # fmt: skip
        with gr.Column(scale=2, min_width=280):
            ui.live = gr.HTML("", elem_id="live")


def _compare(ui: SimpleNamespace) -> None:
    gr.HTML("<h2>5. Compare</h2>")
    ui.compare_note = gr.HTML(
        words.hint("Pictures before and after, and what else was damaged, appear here when step 4 is done.")
    )
    with gr.Row(visible=False, elem_id="compare") as ui.compare:
        with gr.Column(scale=3, min_width=300):
            ui.prompt = gr.Dropdown([], label="Prompt", elem_id="prompt", interactive=True)
            ui.slider = gr.HTML("", elem_id="slider")
        with gr.Column(scale=2, min_width=280):
            ui.damage = gr.HTML("", elem_id="damage")


def _export(ui: SimpleNamespace, exports: list[str]) -> None:
    gr.HTML("<h2>6. Take it with you</h2>")
    ui.files = gr.HTML(words.hint("The files appear here when step 4 is done."), elem_id="files")
    with gr.Row(visible=False, equal_height=True) as ui.copying:
        ui.copy_file = gr.Dropdown([], label="Copy", elem_id="copy-file", min_width=260)
        ui.copy_place = gr.Dropdown(
            exports, value=exports[0] if exports else None, label="to", elem_id="copy-place", min_width=200
        )
        ui.copy = gr.Button("Copy", elem_id="copy", scale=0, min_width=120)
    ui.copied = gr.HTML("", elem_id="copied")
