"""The tab "RealEra" in AUTOMATIC1111's WebUI and in Forge. Only what Gradio 3.41 and 4.40 both have is used here."""

from __future__ import annotations

import atexit
from html import escape
from pathlib import Path

import gradio as gr
from modules import paths, script_callbacks, sd_models, shared

from realera_nodes.studio.doorway import PATH, STUDIO, add_doorway
from realera_nodes.studio.environment import Environment
from realera_nodes.studio.opening import opening_of
from realera_nodes.studio.sidecar import Sidecar

EXTENSION = Path(__file__).resolve().parents[1]
MODELS = Path(paths.models_path)
#: everybody who reaches the WebUI reaches the studio, no more and no less
OPEN_TO_ALL = ("Others can reach this WebUI, and it asks for no name and password: so they can open the studio as well. Set "
               "<code>--gradio-auth NAME:PASSWORD</code>, or a name and password for the studio alone in Settings, "
               "RealEra.")  # fmt: skip


def option(name: str):
    """Of the WebUI's command line, where this WebUI has it."""
    return getattr(shared.cmd_opts, name, None)


def folders(*names: str, default: Path) -> list[Path]:
    return [*(Path(option(name)) for name in names if option(name)), default]


def loaded() -> str | None:
    """The file of the checkpoint that the WebUI has chosen; asking for the model itself would load it."""
    info = sd_models.get_closet_checkpoint_match(shared.opts.sd_model_checkpoint)
    return info.filename if info else None


def prepare() -> None:
    """Before the studio starts: what it offers first, and the login of its own."""
    opening.sidecar.tell(loaded())
    opening.sidecar.login = str(getattr(shared.opts, "realera_login", "") or "").strip()


def on_model_loaded(model) -> None:
    info = getattr(model, "sd_checkpoint_info", None)
    if info:
        opening.sidecar.tell(info.filename)


checkpoints, loras = folders("ckpt_dir", default=MODELS / "Stable-diffusion"), folders("lora_dir", default=MODELS / "Lora")
subpath = f"/{option('subpath').strip('/')}" if option("subpath") else ""
made = Environment.of_host(EXTENSION)
opening = opening_of(
    EXTENSION,
    Sidecar(
        EXTENSION, Path(paths.data_path) / "outputs" / "realera", checkpoints,
        {"this WebUI's LoRAs": loras[0], "this WebUI's checkpoints": checkpoints[0]}, made.python,
        root=f"{subpath}{PATH}{STUDIO}",
    ),
    made, not option("skip_install"), prepare,
)  # fmt: skip


def on_app_started(demo, app) -> None:
    """Below the WebUI's own address; a WebUI without a page (--nowebui) has no tab either."""
    if demo is None:
        return
    others = any(option(name) for name in ("listen", "share", "ngrok", "server_name"))
    warning = (
        OPEN_TO_ALL if others and getattr(app, "auth", None) is None and not getattr(shared.opts, "realera_login", "") else ""
    )
    add_doorway(app, opening, warning, lambda: bool(getattr(getattr(demo, "server", None), "should_exit", False)))


def on_ui_tabs():
    # relative where no path is known: a proxy may have one that nobody told
    place = escape(f"{subpath}{PATH}/" if subpath else f"{PATH[1:]}/", quote=True)
    with gr.Blocks(analytics_enabled=False) as tab:
        gr.HTML(
            f'<iframe src="{place}" title="RealEra studio" loading="lazy" '
            'style="width:100%; height:85vh; min-height:480px; border:0"></iframe>'
            f'<p style="text-align:right"><a href="{place}" target="_blank">Open it in a tab of its own</a></p>',
            elem_id="realera_frame",
        )
    return [(tab, "RealEra", "realera")]


def on_ui_settings() -> None:
    section = ("realera", "RealEra")
    words = "Name and password that the studio asks for, beside the WebUI's own; NAME:PASSWORD, empty for none"
    shared.opts.add_option("realera_login", shared.OptionInfo("", words, section=section))


script_callbacks.on_app_started(on_app_started)
script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_ui_settings(on_ui_settings)
script_callbacks.on_model_loaded(on_model_loaded)
script_callbacks.on_script_unloaded(opening.release)
atexit.register(opening.close)
