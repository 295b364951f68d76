"""gradio is an extra: only the panel's own modules import it, and the command says what to install where it is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "realera_nodes"
#: the modules that may, and that nothing outside of studio imports
ALLOWED = {"studio/api.py", "studio/app.py", "studio/events.py", "studio/panel.py", "studio/views.py"}
#: runs inside a WebUI, on what its own Gradio brings: nothing else imports it
HOSTED = "studio/doorway.py"
PANEL = ("gradio", "gradio_client", "plotly", "pandas")
BLOCK = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("gradio", "gradio_client", "plotly", "pandas", "python_multipart"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def imported(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_the_panel_imports_gradio() -> None:
    users = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "gradio" in imported(p)}
    assert users == ALLOWED
    outside = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if imported(p) & set(PANEL)}
    assert all(name.startswith("studio/") for name in outside)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300
    )


def test_everything_else_works_without_it() -> None:
    modules = [
        ".".join(("realera_nodes", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for folder in ("core", "cli", "formats", "backends", "report", "presets", "studio")
        for p in sorted((PACKAGE / folder).rglob("*.py"))
        if p.relative_to(PACKAGE).as_posix() not in {*ALLOWED, HOSTED} and not p.name.startswith("comfy")
    ]
    assert "realera_nodes.cli.studio" in modules
    assert "realera_nodes.studio.tasks" in modules
    done = run("import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *modules)
    assert done.returncode == 0, done.stderr
    # and where it is installed, the command line does not load it
    code = "import sys, realera_nodes.cli, realera_nodes.job; print('gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300)
    assert done.stdout.strip() == "False", done.stderr


def test_the_command_says_what_to_install(tmp_path: Path) -> None:
    done = run(
        "sys.argv = ['realera', 'studio', '--out', sys.argv[1]]\nfrom realera_nodes.cli import app\napp()", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert 'pip install "realera-nodes[studio]"' in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
