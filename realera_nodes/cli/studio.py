"""studio: the panel."""

from __future__ import annotations

import signal
import sys
import threading
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ErasureError
from ..core.settings import Range, require
from .common import friendly


class Share(str, Enum):
    never = "never"
    public = "public"


def studio(
    model: Annotated[list[str], typer.Option("--model", help='"demo" or a checkpoint, offered first; repeat.')] = ["demo"],  # noqa: B006 typer reads it
    models: Annotated[list[Path], typer.Option("--models", help="A folder of checkpoints to choose from; repeat.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and their files; made if missing.")] = Path(
        "realera-studio"
    ),
    export: Annotated[list[str], typer.Option("--export", help="NAME=FOLDER that files may be copied to; repeat.")] = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="Address to serve on; others than this machine's own need --login.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; a free one from 7860 on if not given.")] = None,
    share: Annotated[Share, typer.Option(help="never, or public: a link through Gradio's servers; needs --login.")] = Share.never,
    login: Annotated[
        str | None, typer.Option(envvar="REALERA_STUDIO_LOGIN", help="NAME:PASSWORD that the page asks for.")
    ] = None,
    root_path: Annotated[
        str | None, typer.Option("--root-path", help="Behind a proxy: the path, or the whole address, at which it has the page.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if torch sees one.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the model's own if not given.")] = None,
    prediction: Annotated[str | None, typer.Option(help="epsilon or v_prediction, where a file does not say.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    host_model: Annotated[
        Path | None, typer.Option(hidden=True, help="File with the path of a WebUI's loaded checkpoint.")
    ] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True, help="End when standard input does.")] = False,
) -> None:
    """Open the panel in a browser: choose, look around, preview, erase, compare, export."""
    with friendly():
        from ..backends.loading import torch_device
        from ..formats.atomic import check_target
        from ..job import DEMO, Job
        from ..studio.app import build
        from ..studio.desk import Desk
        from ..studio.safety import Places

        Job(DEMO, (), out, size=size, prediction=prediction)  # refuses what no run could be made with
        torch_device(device)
        if port is not None:
            require("port", port, Range(1, 65535))
        if out.exists() and not out.is_dir():
            raise ErasureError(f"{out} is a file: give --out a folder.")
        check_target(out / ".studio.lock", overwrite=True)
        given = tuple(Path(m) for m in model if m != DEMO)
        for path in (*given, *models):
            if not path.exists():
                raise ErasureError(f"{path} does not exist: give --model a checkpoint and --models a folder.")
        folders = {}
        for entry in export:
            name, sign, folder = entry.partition("=")
            if not sign or not name or not Path(folder).is_dir():
                raise ErasureError(f'"{entry}" is no export folder: write NAME=FOLDER, and the folder must exist.')
            folders[name] = Path(folder)
        if login is not None and (":" not in login or login.startswith(":") or login.endswith(":")):
            raise ErasureError("--login must be NAME:PASSWORD.")
        if root_path is not None and not root_path.startswith(("/", "http://", "https://")):
            raise ErasureError(
                f'--root-path is "{root_path}": write a path such as /studio, or an address such as https://a.b/studio.'
            )
        pair = tuple(login.split(":", 1)) if login else None
        made = build(Places(out, tuple(models), given, folders, host_model), Desk(device, size, prediction))
        if with_parent:
            # a host in the background of a shell hands down that interrupts are ignored: this one must not be
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=_end_with_parent, daemon=True).start()
        made.serve(host, port, share is Share.public, pair, browser, root_path=root_path and root_path.rstrip("/"))  # type: ignore[arg-type]


def _end_with_parent() -> None:
    """A WebUI holds the other end of standard input: however it ends, this does."""
    import _thread

    sys.stdin.read()
    _thread.interrupt_main()


def register(app: typer.Typer) -> None:
    app.command("studio")(studio)
