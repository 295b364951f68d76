"""The tab of AUTOMATIC1111 and Forge, against a STAND-IN of their callback API: no real WebUI runs here.

The stand-in has the names that the tab uses, as both WebUIs have them. What is real: the tab's script, the process that it
starts, the page that it frames, and install.py's environment.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from realera_nodes.studio.sidecar import Sidecar, SidecarError
from tests.studio_server import PATIENCE, ROOT, answers
from tests.tiny import tiny_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of ``modules`` the tab asks for: callbacks that are kept in lists, folders, options, the chosen checkpoint."""
    checkpoints = tmp_path / "models" / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    shutil.copyfile(tiny_files("sd1")[1], checkpoints / "first.safetensors")
    shutil.copyfile(tiny_files("sd1")[1], checkpoints / "second.safetensors")
    host = SimpleNamespace(callbacks={}, root=tmp_path, chosen=str(checkpoints / "second.safetensors"), checkpoints=checkpoints)
    parts: dict[str, Any] = {name: ModuleType(f"modules.{name}") for name in ("paths", "script_callbacks", "sd_models", "shared")}
    for name in ("on_ui_tabs", "on_model_loaded", "on_script_unloaded"):
        setattr(parts["script_callbacks"], name, lambda fn, name=name: host.callbacks.setdefault(name, []).append(fn))
    parts["paths"].models_path, parts["paths"].data_path = str(tmp_path / "models"), str(tmp_path)
    parts["shared"].cmd_opts = SimpleNamespace(ckpt_dir=None)  # lora_dir is an extension's, and may not be there
    parts["shared"].opts = SimpleNamespace(sd_model_checkpoint="second.safetensors [abc]")
    parts["sd_models"].get_closet_checkpoint_match = lambda title: SimpleNamespace(filename=host.chosen) if title else None
    package = ModuleType("modules")
    monkeypatch.setitem(sys.modules, "modules", package)
    for name, part in parts.items():
        setattr(package, name, part)
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)
    return host


@pytest.fixture
def tab(stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
    monkeypatch.setenv("XDG_CACHE_HOME", str(stand_in.root / "cache"))
    module = load("realera_tab", ROOT / "scripts" / "realera_tab.py")
    yield module
    module.sidecar.close()


def test_the_tab_frames_a_studio_with_the_hosts_checkpoint_first(stand_in: SimpleNamespace, tab: ModuleType) -> None:
    import gradio as gr

    ((blocks, title, name),) = stand_in.callbacks["on_ui_tabs"][0]()
    assert isinstance(blocks, gr.Blocks)
    assert (title, name) == ("RealEra", "realera")
    assert [type(b).__name__ for b in blocks.blocks.values() if not isinstance(b, gr.Blocks)] == ["Button", "HTML"]
    tab.sidecar.python = Path(sys.executable)
    (click,) = blocks.fns.values()
    page = click.fn()
    url = re.search(r'<iframe src="(http://127\.0\.0\.1:\d+/)"', page)
    assert url, page
    assert answers(url[1])
    from gradio_client import Client

    client = Client(url[1], verbose=False)
    assert client.predict(api_name="/models") == ["second.safetensors", "demo", "first.safetensors"]
    info = SimpleNamespace(filename=str(stand_in.checkpoints / "first.safetensors"))
    stand_in.callbacks["on_model_loaded"][0](SimpleNamespace(sd_checkpoint_info=info))
    assert client.predict(api_name="/models")[0] == "first.safetensors"
    assert click.fn().count(url[1]) == 2, "the same one again"
    stand_in.callbacks["on_script_unloaded"][0]()
    assert tab.sidecar.process.poll() is not None
    assert (stand_in.root / "outputs" / "realera" / "runs").is_dir()


def test_without_its_environment_the_tab_says_what_to_run(stand_in: SimpleNamespace, tab: ModuleType) -> None:
    tab.sidecar.python = stand_in.root / "none" / "python"
    assert "install.py" in tab.open_studio()
    assert "<iframe" not in tab.open_studio()


def test_the_last_words_of_a_studio_that_ended(tmp_path: Path) -> None:
    sidecar = Sidecar(ROOT, tmp_path / "out", [], {}, Path(sys.executable), ["--login", "nonsense"])
    with pytest.raises(SidecarError, match="NAME:PASSWORD"):
        sidecar.open(PATIENCE)


HOST = """
import sys
from pathlib import Path
from realera_nodes.studio.sidecar import Sidecar
sidecar = Sidecar(Path(sys.argv[1]), Path(sys.argv[2]), [], {}, Path(sys.executable))
print(sidecar.open(300), flush=True)
sys.stdin.read()
"""


def test_the_studio_ends_with_a_host_that_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOST, str(ROOT), str(tmp_path / "out")]
    # as "nohup webui.sh &" starts it, where interrupts are ignored
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    with subprocess.Popen(background, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout
        url = host.stdout.readline().strip()
        assert answers(url)
        host.kill()
    end = time.monotonic() + PATIENCE
    while answers(url):
        assert time.monotonic() < end, "it goes on alone"
        time.sleep(0.2)


# install.py


@pytest.fixture
def install() -> ModuleType:
    return load("realera_install", ROOT / "install.py")


def test_it_knows_its_host(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert install.webui() is None
    root = tmp_path / "webui"
    (root / "modules").mkdir(parents=True)
    (root / "modules" / "script_callbacks.py").write_text("")
    (root / "webui.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'extension'}{os.pathsep}{root}")
    assert install.webui() == root


def test_for_comfyui_it_checks_and_changes_nothing(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(install, "make_environment", lambda *a: pytest.fail("no environment for ComfyUI"))
    assert install.main() == 0
    assert "everything needed is installed" in capsys.readouterr().out
    monkeypatch.setattr(install, "NEEDED", {"no_such_module": "no-such-package"})
    assert install.main() == 1
    assert "lack no-such-package" in capsys.readouterr().out


def test_the_studio_gets_what_the_package_asks_for(install: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    own = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    wanted = {*filter(None, own), *project["headless"], *project["studio"]} - {"realera-nodes[headless]"}
    assert set(install.STUDIO) == wanted
    assert install.studio_requirements("2.7.1+cu128") == install.STUDIO
    assert set(install.studio_requirements("2.1.2")) > {"transformers<4.50", *install.STUDIO}


def test_the_environments_own_packages_come_before_the_hosts(install: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(install, "THEIR_OTHERS", [])  # nothing is downloaded here
    behind = tmp_path / "host"
    behind.mkdir()
    (behind / "only_of_the_host.py").write_text("place = 'host'")
    (behind / "pip.py").write_text("place = 'host'")
    python = install.make_environment(tmp_path / ".studio", ["pip"], [str(behind)])
    code = "import only_of_the_host, pip; print(only_of_the_host.place, pip.__file__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("host ")
    assert str(tmp_path / ".studio") in done.stdout
    before = python.stat().st_mtime_ns, (tmp_path / ".studio" / "requirements.txt").stat().st_mtime_ns
    install.make_environment(tmp_path / ".studio", ["pip"], [str(behind)])
    assert (python.stat().st_mtime_ns, (tmp_path / ".studio" / "requirements.txt").stat().st_mtime_ns) == before, "once"


def test_a_failed_installation_is_a_sentence_and_tried_again(install: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(install, "HERE", tmp_path)
    monkeypatch.setattr(install, "STUDIO", ["./no-such-folder"])
    monkeypatch.setattr(install, "THEIR_OTHERS", [])
    assert install.install_studio() == 1
    assert "could not be installed" in capsys.readouterr().out
    assert not (tmp_path / ".studio" / "requirements.txt").exists()
    monkeypatch.setenv("COMMANDLINE_ARGS", "--medvram --skip-install")
    assert install.install_studio() == 0
