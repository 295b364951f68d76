"""A STAND-IN of AUTOMATIC1111's WebUI and of Forge, run as a program by any Python with any Gradio from 3.41 on.

It has the names of ``modules`` that the tab uses, loads the tab's script as the hosts do, serves a page with it, changes the
application's middleware as they do, calls back in their order, and reloads its page when it is told "reload" (their
webui.py: close, before-reload, script-unloaded, clear, load the scripts anew, launch). What it lacks: everything else.

    python webui_host.py DATA_FOLDER [options of the WebUI]

Standard input: "reload", "stop", or its end. Standard output: "ready URL" after every launch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import types
from pathlib import Path

ROOT = Path(os.environ.get("REALERA_EXTENSION", Path(__file__).resolve().parents[1]))
CALLBACKS = ("app_started", "ui_tabs", "ui_settings", "model_loaded", "before_reload", "script_unloaded")


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, section=None):
        self.default, self.label, self.section = default, label, section


class Options:
    sd_model_checkpoint = "second.safetensors [abc]"

    def __init__(self):
        self.data_labels = {}

    def add_option(self, key, info):
        self.data_labels[key] = info

    def __getattr__(self, name):
        if name in self.__dict__.get("data_labels", {}):
            return os.environ.get(f"STAND_IN_{name.upper()}", self.data_labels[name].default)
        raise AttributeError(name)


def modules(data: Path, given: argparse.Namespace) -> dict[str, list]:
    """Puts the stand-in of ``modules`` among the imported; returns the lists that callbacks are kept in."""
    kept: dict[str, list] = {name: [] for name in CALLBACKS}
    parts = {name: types.ModuleType(f"modules.{name}") for name in ("paths", "script_callbacks", "sd_models", "shared")}
    for name, functions in kept.items():
        setattr(parts["script_callbacks"], f"on_{name}", functions.append)
    parts["paths"].models_path, parts["paths"].data_path = str(data / "models"), str(data)
    parts["shared"].cmd_opts, parts["shared"].opts, parts["shared"].OptionInfo = given, Options(), OptionInfo
    chosen = types.SimpleNamespace(filename=str(data / "models" / "Stable-diffusion" / "second.safetensors"))
    parts["sd_models"].get_closet_checkpoint_match = lambda title: chosen if title else None
    package = types.ModuleType("modules")
    sys.modules["modules"] = package
    for name, part in parts.items():
        setattr(package, name, part)
        sys.modules[f"modules.{name}"] = part
    return kept


def load_scripts() -> types.ModuleType:
    """As modules.scripts and modules.script_loading do: the extension's folder is on the path while its scripts are loaded."""
    before = sys.path
    try:
        sys.path = [str(ROOT), *sys.path]
        path = ROOT / "scripts" / "realera_tab.py"
        spec = importlib.util.spec_from_file_location(path.name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path = before


def setup_middleware(app) -> None:
    """initialize_util.setup_middleware, and the line before it in webui.py."""
    from starlette.middleware.cors import CORSMiddleware
    from starlette.middleware.gzip import GZipMiddleware

    app.user_middleware = [x for x in app.user_middleware if x.cls.__name__ != "CORSMiddleware"]
    app.middleware_stack = None
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    app.add_middleware(CORSMiddleware, allow_methods=["*"], allow_headers=["*"], allow_credentials=True)
    app.build_middleware_stack()


def main() -> None:
    reader = argparse.ArgumentParser()
    reader.add_argument("data", type=Path)
    for name in ("listen", "share", "skip-install"):
        reader.add_argument(f"--{name}", action="store_true")
    for name in ("subpath", "gradio-auth", "ckpt-dir", "theme", "server-name"):
        reader.add_argument(f"--{name}")
    reader.add_argument("--port", type=int, required=True)
    given = reader.parse_args()
    import gradio as gr

    kept = modules(given.data, given)
    python = os.environ.get("STAND_IN_STUDIO_PYTHON")
    while True:
        tab = load_scripts()
        if python:  # a studio that needs no installation
            tab.opening.environment, tab.opening.sidecar.python = None, Path(python)
        tab.opening.sidecar.options = os.environ.get("STAND_IN_OPTIONS", "").split()
        for callback in kept["ui_settings"]:
            callback()
        found = [t for callback in kept["ui_tabs"] for t in callback()]
        js = "() => { document.body.classList.add('dark') }" if given.theme == "dark" else None
        options = {"js": js} if js and int(gr.__version__.split(".")[0]) == 4 else {}
        with gr.Blocks(title="Stable Diffusion", analytics_enabled=False, **options) as demo, gr.Tabs(elem_id="tabs"):
            with gr.Tab("txt2img", id="txt2img"):
                gr.Textbox(label="Prompt", lines=3, value="a photo of an airplane")
                gr.Button("Generate", variant="primary")
            for blocks, title, name in found:
                with gr.Tab(title, id=name, elem_id=f"tab_{name}"):
                    blocks.render()
        demo.queue(64)
        app, *_ = demo.launch(
            server_name="0.0.0.0" if given.listen else given.server_name, server_port=given.port,
            prevent_thread_lock=True, quiet=True,
            auth=[tuple(given.gradio_auth.split(":"))] if given.gradio_auth else None,
            root_path=f"/{given.subpath}" if given.subpath else "",
        )  # fmt: skip
        setup_middleware(app)
        for callback in kept["app_started"]:
            callback(demo, app)
        print(f"ready http://127.0.0.1:{given.port}/", flush=True)
        command = sys.stdin.readline().strip()
        began = time.monotonic()
        demo.close()
        if command != "reload":
            print(f"stopped {time.monotonic() - began:.1f}", flush=True)
            return
        time.sleep(0.5)
        for name in ("before_reload", "script_unloaded"):
            for callback in reversed(kept[name]):
                callback()
        for functions in kept.values():
            functions.clear()
        print(f"reloading {time.monotonic() - began:.1f}", flush=True)


if __name__ == "__main__":
    main()
