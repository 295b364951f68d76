"""The served panel over HTTP: named endpoints, two users, what the server refuses to give or take."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from realera_nodes.presets import preset_names
from tests.studio_server import PATIENCE, ROOT, Server, served
from tests.test_studio_engine import SMALL
from tests.tiny import SIDE, tiny_files

gradio_client = pytest.importorskip("gradio_client", reason='NO GRADIO: pip install "realera-nodes[studio]"')
pytest.importorskip("gradio", reason='NO GRADIO: pip install "realera-nodes[studio]"')
httpx = pytest.importorskip("httpx")

REQUEST = {"model": "tiny.safetensors", "concepts": ["airplane"], "anchors": ["sky"], "keep": ["bird"], "pictures": 1,
    "sampling_steps": 2,
           "settings": [*SMALL, "alignment.steps=4"]}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("studio")
    (base / "models").mkdir()
    (base / "loras").mkdir()
    (base / "secret.txt").write_text("secret")
    shutil.copyfile(tiny_files("sd1")[1], base / "models" / "tiny.safetensors")
    options = ["--models", str(base / "models"), "--export", f"loras={base / 'loras'}", "--device", "cpu", "--size", str(SIDE)]
    with served(base / "out", options, {"XDG_CACHE_HOME": str(base / "cache")}) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return gradio_client.Client(server.url, verbose=False)


def finished(client: Any, run: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    while (told := client.predict(run, api_name="/status"))["state"] in ("queued", "running"):
        assert time.monotonic() < end, told
        time.sleep(0.2)
    return told


def test_it_answers_on_this_machine_alone(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    listening = Path("/proc/net/tcp")
    if listening.exists():
        port = f":{int(server.url.rstrip('/').rsplit(':', 1)[1]):04X}"
        places = {
            line.split()[1]
            for line in listening.read_text().splitlines()
            if line.split()[1].endswith(port) and line.split()[3] == "0A"
        }
        assert places == {f"0100007F{port}"}


def test_a_script_drives_the_whole_flow(client: Any, server: Server) -> None:
    assert client.predict(api_name="/models") == ["demo", "tiny.safetensors"]
    assert client.predict(api_name="/presets").keys() == set(preset_names())
    look = client.predict(REQUEST, api_name="/look")
    assert finished(client, look)["state"] == "done"
    words = client.predict(look, api_name="/result")["concepts"][0]["words"]
    assert words
    preview = client.predict(REQUEST | {"strength": 0.5}, api_name="/preview")
    assert finished(client, preview)["state"] == "done"
    shown = client.predict(preview, api_name="/result")
    assert shown["strength"] == 0.5
    assert shown["cards"][0]["after"].startswith("data:image/jpeg;base64,")
    run = client.predict(REQUEST, api_name="/erase")
    assert finished(client, run)["state"] == "done"
    result = client.predict(run, api_name="/result")
    assert result["request"]["concepts"] == ["airplane"]
    assert len(result["losses"]) == 4
    assert result["report"]["method"] == "realera"
    lora = next(f for f in result["files"] if f["name"].endswith("-erased-lora.safetensors"))
    reply = httpx.get(server.url + lora["url"], timeout=60)
    assert reply.status_code == 200
    assert len(reply.content) == lora["bytes"] == Path(lora["place"]).stat().st_size
    target = client.predict(run, lora["name"], "loras", api_name="/copy")
    assert Path(target).read_bytes() == reply.content
    assert client.predict(api_name="/history")[0]["run"] == run


def test_the_manuals_script_fetches_its_loras(server: Server, tmp_path: Path) -> None:
    manual = (ROOT / "docs" / "studio.md").read_text(encoding="utf-8")
    script = manual.split("```python\n")[1].split("```")[0]
    line = next(line for line in script.splitlines() if line.startswith("request = "))
    (tmp_path / "studio_client.py").write_text(script.replace(line, f"request = {REQUEST!r}"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "studio_client.py", server.url], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "goes with it:" in done.stdout
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {
        "tiny-erased-lora.safetensors", "tiny-erased-edit-lora.safetensors",
    }  # fmt: skip


def test_a_second_user_sees_the_queue_and_cancel_ends_a_run(client: Any, server: Server) -> None:
    long = REQUEST | {"settings": [*SMALL, "alignment.steps=100000"]}
    first = client.predict(long, api_name="/erase")
    second = client.predict(long, api_name="/erase")
    other = gradio_client.Client(server.url, verbose=False)
    end = time.monotonic() + PATIENCE
    while not client.predict(first, api_name="/status").get("done", 0):
        assert time.monotonic() < end
        time.sleep(0.2)
    queue = other.predict(api_name="/queue")
    assert [q["run"] for q in queue] == [first, second]
    assert [q["state"] for q in queue] == ["running", "queued"]
    assert queue[1]["ahead"] == 1
    assert other.predict(second, api_name="/cancel") is True
    assert other.predict(first, api_name="/cancel") is True
    assert finished(client, first)["state"] == "cancelled"
    assert other.predict(first, api_name="/cancel") is False
    again = client.predict(first, api_name="/resume")
    assert again == first
    assert client.predict(first, api_name="/status")["state"] in ("queued", "running")
    client.predict(first, api_name="/cancel")
    finished(client, first)


@pytest.mark.parametrize(
    ("endpoint", "arguments", "says"),
    [
        ("/look", [REQUEST | {"model": "../secret.safetensors"}], "not among the offered models"),
        ("/look", [REQUEST | {"model": "/etc/passwd"}], "not among the offered models"),
        ("/erase", [REQUEST | {"concepts": ["sky"]}], "both erased and the anchor"),
        ("/erase", [REQUEST | {"out": "/tmp"}], 'no "out"'),
        ("/preview", [REQUEST | {"settings": ["alignment.lr=7"]}], "lr is 7"),
        ("/status", ["../../secret"], "there is no run"),
        ("/result", ["/etc"], "there is no run"),
        ("/resume", ["20261122-120000-erase-x-abcdef"], "there is no run"),
    ],
)
def test_bad_inputs_come_back_as_their_sentence(client: Any, endpoint: str, arguments: list, says: str) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=says):
        client.predict(*arguments, api_name=endpoint)


def test_every_public_endpoint_is_named_and_told(client: Any) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {f"/{n}" for n in ("models", "presets", "look", "preview", "erase", "status", "result", "queue",
        "history", "cancel",
                                            "resume", "copy")}  # fmt: skip


def test_only_runs_are_served(server: Server) -> None:
    base = server.out.parent
    for path in (
        "/etc/passwd", base / "secret.txt", server.out / "runs" / ".." / ".." / "secret.txt", server.out / ".studio.lock",
        base / "models" / "tiny.safetensors", "../secret.txt", server.out / "runs" / "..%2f..%2fsecret.txt",
    ):  # fmt: skip
        reply = httpx.get(f"{server.url}gradio_api/file={path}", timeout=60)
        assert reply.status_code in (403, 404), path
        assert "secret" not in reply.text or "Detail" in reply.text or "detail" in reply.text


def test_the_server_refuses_uploads_of_other_kinds(server: Server) -> None:
    def send(name: str, content: bytes) -> Any:
        return httpx.post(f"{server.url}gradio_api/upload", files={"files": (name, content)}, timeout=60)

    refused = send("model.ckpt", b"\x80\x02}q\x00.")
    assert refused.status_code == 415
    assert "safetensors" in refused.json()["error"]
    assert send("model.safetensors", b"\x80\x02}q\x00." * 100_000).status_code == 415
    assert send("page.html", b"<script>alert(1)</script>").status_code == 415
    assert send("model.safetensors", tiny_files("sd1")[1].read_bytes()).status_code == 200


def test_a_killed_studio_finds_its_runs_again(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copyfile(tiny_files("sd1")[1], tmp_path / "models" / "tiny.safetensors")
    options = ["--models", str(tmp_path / "models"), "--device", "cpu", "--size", str(SIDE)]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with served(tmp_path / "out", options, environment) as server:
        client = gradio_client.Client(server.url, verbose=False)
        run = client.predict(REQUEST | {"settings": [*SMALL, "alignment.steps=100000"]}, api_name="/erase")
        end = time.monotonic() + PATIENCE
        while client.predict(run, api_name="/status").get("stage") != "noise alignment":
            assert time.monotonic() < end
            time.sleep(0.2)
        server.process.kill()
        server.process.wait()
    state = json.loads((tmp_path / "out" / "runs" / run / "state.json").read_text())
    assert state["state"] == "running", "killed in the middle"
    with served(tmp_path / "out", options, environment) as server:
        client = gradio_client.Client(server.url, verbose=False)
        assert client.predict(run, api_name="/status")["state"] == "interrupted"
        server.end()
        assert "Traceback" not in server.log.read_text()
