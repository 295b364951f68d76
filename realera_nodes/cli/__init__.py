"""``python -m realera_nodes ...``: the command line."""

from __future__ import annotations

import typer

from . import bench, demo, erase, many, mine, studio
from .common import Commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, cls=Commands,
                  help="Erase concepts from Stable Diffusion.")  # fmt: skip


@app.callback()
def main() -> None:
    """Erase concepts from Stable Diffusion."""


for module in (erase, many, mine, demo, bench, studio):
    module.register(app)
