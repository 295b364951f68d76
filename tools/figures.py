"""How the plots of the docs end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finish(figure: Any, panels: Sequence[Any], out: Path) -> None:
    """Legends and a pale grid in each panel, then the file."""
    for axes in panels:
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
