"""The tab of AUTOMATIC1111 and Forge in a STAND-IN of them (webui_host.py): no real WebUI runs here.

Real are: Gradio and its server with the tab in a page of it, as this Python has it (REALERA_WEBUI_PYTHONS names others, such as
environments with Gradio 3.41 and 4.40), the installer, pip and venv, the studio's process, and what is passed on to it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from realera_nodes.studio import environment
from realera_nodes.studio.opening import Opening
from realera_nodes.studio.sidecar import Sidecar, SidecarError
from tests import webui_host
from tests.studio_server import PATIENCE, ROOT, answers, free_port
from tests.tiny import SIDE, tiny_files
from tests.wheels import wheel

pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
PYTHONS = [sys.executable, *filter(None, os.environ.get("REALERA_WEBUI_PYTHONS", "").split(os.pathsep))]
START = {"X-RealEra": "1"}
#: as little as still trains
LONG = ["alignment.steps=4000", "neighbors.words=0", "alignment.trajectories=1", "alignment.trajectory_steps=4"]


def extension_in(folder: Path) -> Path:
    """The extension as a clone in a WebUI's folder, where it may make its environment."""
    extension = folder / "extensions" / "realera"
    (extension / "scripts").mkdir(parents=True)
    for name in ("install.py", "scripts/realera_tab.py"):
        shutil.copyfile(ROOT / name, extension / name)
    (extension / "realera_nodes").symlink_to(ROOT / "realera_nodes")
    return extension


def wheels_like_ours(folder: Path) -> Path:
    """What the studio asks for, in the versions that are here, with nothing in them: they are found behind."""
    for requirement in (*environment.STUDIO, *environment.THEIR_OTHERS):
        name = re.split(r"[<>=;]", requirement)[0]
        if not requirement.startswith("tomli") or sys.version_info < (3, 11):
            wheel(folder, name, importlib.metadata.version(name))
    return folder


class WebUI:
    """The stand-in as a process."""

    def __init__(self, python: str, folder: Path, *options: str, studio: str = "", variables: dict[str, str] | None = None):
        self.folder, self.port = folder, free_port()
        self.extension = folder / "extensions" / "realera" if (folder / "extensions").exists() else extension_in(folder)
        checkpoints = folder / "models" / "Stable-diffusion"
        checkpoints.mkdir(parents=True, exist_ok=True)
        for name in ("first", "second"):
            shutil.copyfile(tiny_files("sd1")[1], checkpoints / f"{name}.safetensors")
        given = {"REALERA_EXTENSION": str(self.extension), "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": "",
                 "GRADIO_ANALYTICS_ENABLED": "False", "STAND_IN_STUDIO_PYTHON": studio,
                 "STAND_IN_OPTIONS": f"--size {SIDE} --device cpu", **(variables or {})}  # fmt: skip
        self.log = folder / "webui.log"
        command = [python, str(ROOT / "tests" / "webui_host.py"), str(folder), "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=os.environ | given
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.wait_for("ready")

    def wait_for(self, word: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return line.strip()
        raise AssertionError(self.log.read_text())

    def say(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def state(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/realera-studio/state", timeout=PATIENCE).json()

    def open(self) -> list[str]:
        """Presses the button and waits; the phases on the way."""
        httpx.post(f"{self.url}/realera-studio/start", headers=START, timeout=PATIENCE).raise_for_status()
        phases: list[str] = []
        end = time.monotonic() + PATIENCE
        while not phases or phases[-1] not in ("ready", "failed"):
            assert time.monotonic() < end
            phases += [p for p in [self.state()["phase"]] if not phases or phases[-1] != p]
            time.sleep(0.2)
        assert phases[-1] == "ready", self.state()
        return phases

    def client(self) -> Any:
        from gradio_client import Client

        return Client(f"{self.url}/realera-studio/app/", verbose=False)

    def end(self) -> None:
        if self.process.poll() is None:
            self.say("stop")
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="module", params=PYTHONS, ids=lambda p: Path(p).parents[1].name)
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """With this Python it installs the studio; others, whose packages are of another time, are given this one's."""
    folder = tmp_path_factory.mktemp("webui")
    own = request.param == sys.executable
    index = wheels_like_ours(folder / "index")
    torch = folder / "torch" / "torch-2.1.2.dist-info"
    torch.mkdir(parents=True)
    (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.2\n")
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    made = WebUI(
        request.param, folder, studio="" if own else sys.executable,
        variables=variables if own else {"PYTHONPATH": str(torch.parent)},
    )  # fmt: skip
    yield made
    made.end()


def test_from_nothing_to_a_studio_under_the_webuis_address(webui: WebUI) -> None:
    page = httpx.get(f"{webui.url}/", timeout=PATIENCE).text
    assert "realera-studio/" in page, "the tab's frame"
    state = webui.state()
    assert state["phase"] == "idle"
    made = webui.extension / environment.FOLDER
    assert not made.exists(), "nothing is installed before the studio is opened"
    phases = webui.open()
    if not state["installed"]:
        assert phases == ["installing", "starting", "ready"]
        assert (made / "requirements.txt").exists()
        assert "Successfully installed" in (webui.folder / "outputs" / "realera" / "install.log").read_text()
    client = webui.client()
    assert client.predict(api_name="/models") == ["second.safetensors", "demo", "first.safetensors"], "the loaded one first"
    shown = httpx.get(f"{webui.url}/realera-studio/app/", timeout=PATIENCE).text
    assert f'"root":"{webui.url}/realera-studio/app"' in shown
    # a page that comes from another machine, by https, through a tunnel
    far = {"Host": "inside:1", "Referer": "https://far.example/realera-studio/app/"}
    shown = httpx.get(f"{webui.url}/realera-studio/app/", headers=far, timeout=PATIENCE).text
    assert '"root":"https://far.example/realera-studio/app"' in shown
    refused = httpx.post(
        f"{webui.url}/realera-studio/app/gradio_api/upload",
        files={"files": ("a.ckpt", b"\x80\x02}q\x00." * 400)},
        timeout=PATIENCE,
    )
    assert refused.status_code == 415


def test_reload_ui_ends_neither_studio_nor_run(webui: WebUI) -> None:
    webui.open()
    client = webui.client()
    request = {"model": "second.safetensors", "concepts": ["airplane"], "anchors": ["sky"], "method": "lora", "settings": LONG}
    run = client.predict(request, api_name="/erase")
    trained(client, run, 1)
    with httpx.stream("GET", f"{webui.url}/realera-studio/app/gradio_api/heartbeat/abc", timeout=PATIENCE) as open_page:
        next(open_page.iter_raw())
        webui.say("reload")
        assert float(webui.wait_for("reloading").split()[1]) < 20, "it waited for a page that was open"
    webui.wait_for("ready")
    assert webui.state()["phase"] == "ready", "the new tab finds the studio that runs"
    client = webui.client()
    status = client.predict(run, api_name="/status")
    assert status["state"] == "running"
    trained(client, run, status["done"] + 1)
    log = next((webui.folder / "outputs" / "realera" / "runs").glob(f"{run}/log.txt")).read_text()
    assert "closed" not in log
    assert log.count("noise alignment") == 1, "the same run, not one that was begun again"
    client.predict(run, api_name="/cancel")
    end = time.monotonic() + PATIENCE
    while client.predict(run, api_name="/status")["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.2)


def trained(client: Any, run: str, step: int) -> None:
    end = time.monotonic() + PATIENCE
    while (status := client.predict(run, api_name="/status")).get("stage") != "noise alignment" or status["done"] < step:
        assert status["state"] in ("queued", "running"), status
        assert time.monotonic() < end, status
        time.sleep(0.2)


def test_the_studio_ends_with_the_webui(webui: WebUI) -> None:
    webui.open()
    inner = re.search(r"http://127\.0\.0\.1:\d+/", (webui.folder / "outputs" / "realera" / "studio.log").read_text())
    assert inner
    assert answers(inner[0])
    webui.say("stop")
    webui.process.wait(PATIENCE)
    end = time.monotonic() + PATIENCE
    while answers(inner[0]):
        assert time.monotonic() < end, "it goes on alone"
        time.sleep(0.2)


# the tab's script alone


@pytest.fixture
def tab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Loads the script among the stand-in's modules: options -> (module, callbacks)."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "modules"}
    monkeypatch.setattr(webui_host, "ROOT", extension_in(tmp_path))
    (tmp_path / "models" / "Stable-diffusion").mkdir(parents=True)
    loaded: list[Any] = []

    def load(**options: Any) -> tuple[Any, dict[str, list]]:
        kept = webui_host.modules(tmp_path, Namespace(**options))
        loaded.append(webui_host.load_scripts())
        return loaded[-1], kept

    yield load
    for module in loaded:
        module.opening.close()
        module.opening_of.__globals__["_openings"].clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "modules"]:
        del sys.modules[name]
    sys.modules.update(before)


def shown_by(kept: dict[str, list], app: Any) -> str:
    from tests.test_studio_doorway import serving

    (started,) = kept["app_started"]
    started(SimpleNamespace(), app)
    with serving(app) as (url, _):
        return httpx.get(f"{url}/realera-studio/", timeout=PATIENCE).text


@pytest.mark.parametrize(
    ("options", "auth", "warned"),
    [({}, None, False), ({"listen": True}, None, True), ({"share": True}, None, True), ({"server_name": "0.0.0.0"}, None, True),
     ({"ngrok": "token"}, None, True), ({"listen": True}, {"me": "secret"}, False)],
)  # fmt: skip
def test_who_can_open_the_webui_can_open_the_studio_and_is_told(tab: Any, options: dict, auth: Any, warned: bool) -> None:
    from fastapi import FastAPI

    _, kept = tab(**options)
    app = FastAPI()
    app.auth = auth  # type: ignore[attr-defined]
    if auth:
        app.get("/login_check")(lambda: None)
    assert ("it asks for no name and password" in shown_by(kept, app)) is warned


@pytest.mark.parametrize("subpath", ["", "sd", "/deep/er/"])
def test_a_subpath_is_the_frames_and_the_studios(tab: Any, subpath: str) -> None:
    module, kept = tab(subpath=subpath)
    ((blocks, title, name),) = kept["ui_tabs"][0]()
    assert (title, name) == ("RealEra", "realera")
    (html,) = [b for b in blocks.blocks.values() if type(b).__name__ == "HTML"]
    clean = subpath.strip("/")
    assert f'src="{f"/{clean}/" if clean else ""}realera-studio/"' in html.value
    command = module.opening.sidecar.command(1)
    assert command[command.index("--root-path") + 1] == (f"/{clean}" if clean else "") + "/realera-studio/app"


def test_folders_of_the_command_line_and_skip_install(tab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    module, _ = tab(ckpt_dir="mine", lora_dir="loras", skip_install=True)
    command = module.opening.sidecar.command(1)
    assert str(tmp_path / "mine") in command, "absolute, as the studio runs elsewhere"
    assert f"this WebUI's LoRAs={tmp_path / 'loras'}" in command
    assert not module.opening.allowed
    assert Path(command[command.index("--out") + 1]).is_absolute()


def test_without_a_page_there_is_no_doorway(tab: Any) -> None:
    from fastapi import FastAPI

    _, kept = tab()
    app = FastAPI()
    before = len(app.routes)
    kept["app_started"][0](None, app)
    assert len(app.routes) == before


def test_a_model_that_is_loaded_later_is_told(tab: Any, tmp_path: Path) -> None:
    module, kept = tab()
    module.prepare()
    assert module.opening.sidecar.host_model.read_text().endswith("second.safetensors")
    info = SimpleNamespace(filename=str(tmp_path / "other.safetensors"))
    kept["model_loaded"][0](SimpleNamespace(sd_checkpoint_info=info))
    assert module.opening.sidecar.host_model.read_text() == info.filename


def test_loaded_again_it_is_the_same_opening(tab: Any) -> None:
    first, kept = tab()
    kept["script_unloaded"][0]()
    assert first.opening._leaving is not None
    second, _ = tab(ckpt_dir="elsewhere")
    assert second.opening is first.opening
    assert second.opening._leaving is None, "the new tab wants it"
    assert str(second.opening.sidecar.models[0]).endswith("elsewhere")


# the process


def test_a_studio_that_no_tab_wants_ends(tmp_path: Path) -> None:
    ended: list[bool] = []
    sidecar: Any = SimpleNamespace(extension=ROOT, out=tmp_path, close=lambda: ended.append(True), runs=False)
    opening = Opening(sidecar)
    opening.release(0.3)
    opening.claim()
    time.sleep(0.6)
    assert ended == []
    opening.release(0.1)
    end = time.monotonic() + PATIENCE
    while not ended:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_host_that_answers_otherwise_is_told_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def prepare() -> None:
        raise AttributeError("this WebUI has no such function")

    opening = Opening(Sidecar(ROOT, tmp_path / "out", [], {}, Path(sys.executable)), prepare=prepare)
    opening.begin()
    end = time.monotonic() + PATIENCE
    while (state := opening.state())["phase"] != "failed":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "no such function" in state["error"]
    assert "Traceback" in capsys.readouterr().err


def test_the_last_words_of_a_studio_that_ended(tmp_path: Path) -> None:
    sidecar = Sidecar(ROOT, tmp_path / "out", [], {}, Path(sys.executable))
    sidecar.login = "nonsense:"
    assert "nonsense:" not in " ".join(sidecar.command(1)), "a command line is there for others to see"
    with pytest.raises(SidecarError, match="NAME:PASSWORD"):
        sidecar.open(PATIENCE)


def test_a_studio_that_ended_later_is_told(tmp_path: Path) -> None:
    sidecar = Sidecar(ROOT, tmp_path / "out", [], {}, Path(sys.executable))
    answers_once = (
        "import http.server as h, sys\n"
        "s = h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.SimpleHTTPRequestHandler)\n"
        "s.handle_request(); print('out of memory')"
    )
    sidecar.command = lambda port: [sys.executable, "-c", answers_once, str(port)]  # type: ignore[method-assign]
    opening = Opening(sidecar)
    opening.begin()
    end = time.monotonic() + PATIENCE
    while (state := opening.state())["phase"] != "ended":
        assert time.monotonic() < end, state
        time.sleep(0.1)
    assert "out of memory" in state["error"]
    json.dumps(state)


HOST = """
import sys
from pathlib import Path
from realera_nodes.studio.sidecar import Sidecar
sidecar = Sidecar(Path(sys.argv[1]), Path(sys.argv[2]), [], {}, Path(sys.executable))
print(sidecar.open(300), flush=True)
sys.stdin.read()
"""


def test_the_studio_ends_with_a_host_that_was_killed(tmp_path: Path) -> None:
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOST, str(ROOT), str(tmp_path / "out")]
    # as "nohup webui.sh &" starts it, where interrupts are ignored
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    with subprocess.Popen(background, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as host:
        assert host.stdout
        url = host.stdout.readline().strip()
        assert answers(url)
        host.kill()
    end = time.monotonic() + PATIENCE
    while answers(url):
        assert time.monotonic() < end, "it goes on alone"
        time.sleep(0.2)
