"""The tab "RealEra" in AUTOMATIC1111's WebUI and in Forge. Only what Gradio 3.41 and 4.40 both have is used here."""

from __future__ import annotations

import atexit
from html import escape
from pathlib import Path

import gradio as gr
from modules import paths, script_callbacks, sd_models, shared

from realera_nodes.studio.sidecar import Sidecar, SidecarError

EXTENSION = Path(__file__).resolve().parents[1]
MODELS = Path(paths.models_path)
WELCOME = "<p>Make a model forget a person, a style or a thing. Opens with the checkpoint that is loaded here.</p>"


def option(name: str) -> list[Path]:
    """A folder of the WebUI's command line, if it was given."""
    value = getattr(shared.cmd_opts, name, None)
    return [Path(value)] if value else []


sidecar = Sidecar(
    EXTENSION,
    Path(paths.data_path) / "outputs" / "realera",
    [*option("ckpt_dir"), MODELS / "Stable-diffusion"],
    {"this WebUI's LoRAs": [*option("lora_dir"), MODELS / "Lora"][0],
     "this WebUI's checkpoints": [*option("ckpt_dir"), MODELS / "Stable-diffusion"][0]},
)  # fmt: skip


def loaded() -> str | None:
    """The file of the checkpoint that the WebUI has chosen; asking for the model itself would load it."""
    info = sd_models.get_closet_checkpoint_match(shared.opts.sd_model_checkpoint)
    return info.filename if info else None


def on_model_loaded(model) -> None:
    info = getattr(model, "sd_checkpoint_info", None)
    if info:
        sidecar.tell(info.filename)


def open_studio() -> str:
    """The page in a frame, or one sentence."""
    try:
        sidecar.tell(loaded())
        url = sidecar.open()
    except (SidecarError, OSError) as error:
        return f'<p role="alert">{escape(str(error))}</p>'
    return (f'<iframe src="{url}" title="RealEra studio" style="width:100%; height:85vh; border:0"></iframe>'
            f'<p><a href="{url}" target="_blank">Open it in a tab of its own</a></p>')  # fmt: skip


def on_ui_tabs():
    with gr.Blocks(analytics_enabled=False) as tab:
        button = gr.Button("Open the studio", variant="primary", elem_id="realera_open")
        frame = gr.HTML(WELCOME, elem_id="realera_frame")
        button.click(fn=open_studio, inputs=[], outputs=[frame])
    return [(tab, "RealEra", "realera")]


script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_model_loaded(on_model_loaded)
script_callbacks.on_script_unloaded(sidecar.close)
atexit.register(sidecar.close)
