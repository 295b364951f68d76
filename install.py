"""Run by ComfyUI-Manager after it has installed requirements.txt: checks and advises, changes nothing."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = {"numpy": "numpy", "safetensors": "safetensors", "PIL": "pillow", "platformdirs": "platformdirs", "torch": "torch"}


def missing() -> list[str]:
    """PyPI names of the packages that the pack needs and this Python lacks."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script runs before anything checks requires-python
        print("RealEra nodes need Python 3.10 or newer.")
        return 1
    lacking = missing()
    if lacking:
        print(f"RealEra nodes lack {', '.join(lacking)}: install requirements.txt into ComfyUI's own Python.")
        return 1
    print("RealEra nodes: everything needed is installed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
