"""Builds and serves the panel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..core.errors import ErasureError
from .desk import Desk
from .runs import Runs, lock
from .safety import Places
from .tasks import Tasks
from .worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Studio:
    """A panel with its queue. ``page`` is a gr.Blocks."""

    places: Places
    runs: Runs
    worker: Worker
    page: Any
    _lock: Any

    def serve(
        self, host: str = "127.0.0.1", port: int | None = None, share: bool = False, login: tuple[str, str] | None = None,
        browser: bool = False, wait: bool = True, root_path: str | None = None,
    ) -> str:  # fmt: skip
        """Serves the page and returns its address; with ``wait``, when it was stopped. ``root_path``: where a proxy has it.

        Raises:
            ErasureError: others could reach the page, and there is no login.
        """
        from .guard import UploadGuard
        from .panel import THEME

        if (share or host not in LOOPBACK) and login is None:
            raise ErasureError("others could reach this page: set a name and password with --login NAME:PASSWORD, "
                               "or leave out --share and --host.")  # fmt: skip
        css = (files(__package__) / "style.css").read_text(encoding="utf-8")
        try:
            _, url, public = self.page.launch(
                server_name=host, server_port=port, share=share, auth=login, inbrowser=browser, prevent_thread_lock=True,
                quiet=True,
                allowed_paths=[str(self.places.runs.resolve())], theme=THEME, css=css, footer_links=["api", "settings"],
                show_error=True,
                ssr_mode=False, enable_monitoring=False, root_path=root_path, app_kwargs={"middleware": [UploadGuard.entry()]},
            )  # fmt: skip
        except OSError as error:
            raise ErasureError(f"the page cannot be served ({error}): choose another --port.") from error
        if wait:
            print(f"RealEra studio: {public or url}  (Ctrl-C ends it; runs are kept in {self.places.runs})", flush=True)
            try:
                self.page.block_thread()
            finally:
                self.close()
        return public or url

    def close(self) -> None:
        """Stops serving; what is at work ends at its next step and can be continued later."""
        self.page.close(verbose=False)
        self.worker.close()
        self._lock.close()


def build(places: Places, desk: Desk | None = None) -> Studio:
    """The panel over an output folder. ErasureError: another studio has that folder, or gradio is missing."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
        import plotly  # noqa: F401
    except ModuleNotFoundError as error:
        raise ErasureError(f'the studio needs {error.name}: run pip install "realera-nodes[studio]".') from error
    from .api import endpoints
    from .events import Events
    from .panel import layout

    held = lock(places.out)
    runs = Runs(places.runs)
    places.runs.mkdir(parents=True, exist_ok=True)
    runs.interrupt_left_overs()
    runs.forget_looks()
    worker = Worker(runs, Tasks(places, desk or Desk()))
    names = list(places.offered())
    with gr.Blocks(title="RealEra studio", analytics_enabled=False) as page:
        ui = layout(names, names[0], list(places.exports))
        endpoints(places, runs, worker)  # first: the page's own events would take their names
        Events(ui, places, runs, worker).wire(page)
    return Studio(places, runs, worker, page, held)
