"""What the panel may touch: models of model folders, runs of the output folder, uploads in safetensors, and nothing by a path."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from pathlib import Path

import pytest

from realera_nodes.core.errors import ErasureError
from realera_nodes.studio.export import copy_to
from realera_nodes.studio.request import Request
from realera_nodes.studio.runs import Runs
from realera_nodes.studio.safety import Places, file_of, plain_name
from tests.tiny import tiny_files

TRAVERSALS = ["../secret.safetensors", "..", "/etc/passwd", "sub/../../secret.safetensors", "..\\secret.safetensors", "", ".",
    "sub", "\0",
              "sub/../tiny.safetensors", "file:///etc/passwd", "~/x.safetensors"]  # fmt: skip


@pytest.fixture
def places(tmp_path: Path) -> Places:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    shutil.copyfile(tiny_files("sd1")[1], folder / "sub" / "tiny.safetensors")
    shutil.copyfile(tiny_files("sd1")[1], tmp_path / "secret.safetensors")
    (folder / "old.ckpt").write_bytes(b"\x80\x02}q\x00." * 40)
    (folder / ".hidden.safetensors").write_bytes(b"x")
    (folder / "notes.txt").write_text("no model")
    (tmp_path / "loras").mkdir()
    return Places(tmp_path / "out", (folder,), exports={"loras": tmp_path / "loras"})


def test_models_are_those_of_the_folders(places: Places) -> None:
    assert list(places.offered()) == ["demo", "old.ckpt", "sub/tiny.safetensors"]
    assert places.model("demo") == "demo"
    assert places.model("sub/tiny.safetensors") == str(places.models[0] / "sub" / "tiny.safetensors")


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_other_model_can_be_named(places: Places, name: str) -> None:
    with pytest.raises(ErasureError, match="not among the offered models"):
        places.model(name)


def test_a_pickle_is_refused_with_the_way_out(places: Places) -> None:
    with pytest.raises(ErasureError, match=r"pickle.*save as \.safetensors.*Checkpoint Merger"):
        places.model("old.ckpt")


def test_the_diffusers_folder_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tiny").symlink_to(tiny_files("sd1")[0])
    shutil.copytree(tiny_files("sd1")[0], tmp_path / "m" / "copied")
    assert "copied" in Places(tmp_path / "out", (tmp_path / "m",)).offered()
    assert not any("unet" in name for name in Places(tmp_path / "out", (tmp_path / "m",)).offered())


def test_given_models_come_first_and_once(places: Places, tmp_path: Path) -> None:
    own = places.models[0] / "sub" / "tiny.safetensors"
    assert list(Places(places.out, places.models, (own,)).offered()) == ["tiny.safetensors", "demo", "old.ckpt"]


def test_the_webuis_checkpoint_is_first_if_it_is_in_a_model_folder(places: Places, tmp_path: Path) -> None:
    note = tmp_path / "host-model.txt"
    hosted = Places(places.out, places.models, host=note)
    assert next(iter(hosted.offered())) == "demo"
    note.write_text(str(places.models[0] / "sub" / "tiny.safetensors"))
    assert next(iter(hosted.offered())) == "tiny.safetensors"
    note.write_text(str(tmp_path / "secret.safetensors"))
    assert "secret.safetensors" not in hosted.offered()


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b/../../x.safetensors", "..\\..\\x.safetensors", "/etc/x.safetensors"])
def test_names_of_uploads_lose_their_folders(name: str) -> None:
    assert plain_name(name) == "x.safetensors"


@pytest.mark.parametrize("name", ["", "..", "a/..", ".bashrc", "a\nb.safetensors", "con|x.safetensors"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ErasureError, match="no name for a file"):
        plain_name(name)


def test_an_upload_becomes_a_model(places: Places, tmp_path: Path) -> None:
    sent = tmp_path / "sent.safetensors"
    shutil.copyfile(tiny_files("sd1")[1], sent)
    name = places.take_upload(sent, "../../mine.safetensors")
    assert places.model(name) == str(places.uploads / "mine.safetensors")
    assert not sent.exists()
    shutil.copyfile(tiny_files("sd1")[1], sent)
    with pytest.raises(ErasureError, match="uploaded before"):
        places.take_upload(sent, "mine.safetensors")
    assert not sent.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.ckpt", b"\x80\x02}q\x00.", r"only \.safetensors"),
        ("model.safetensors", b"\x80\x02}q\x00." * 40, "safetensors"),
        ("model.safetensors.pt", b"", r"only \.safetensors"),
        ("cut.safetensors", struct.pack("<Q", 900) + b"{}", "safetensors|truncated"),
    ],
)
def test_other_uploads_are_refused_and_deleted(places: Places, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(content)
    with pytest.raises(ErasureError, match=says):
        places.take_upload(sent, name)
    assert not sent.exists()
    assert not places.uploads.exists() or not any(places.uploads.iterdir())


@pytest.mark.parametrize(
    "name", ["..", "../secret", "20261122-120000-erase-x-abcdef/../..", "", "x", None, "20261122-120000-erase-x-abcdef\n"]
)
def test_runs_have_ids_and_no_paths(tmp_path: Path, name: str | None) -> None:
    runs = Runs(tmp_path / "runs")
    made = runs.create("erase", Request(concepts=("a/../b",), anchors=("c",)))
    assert made.folder.parent == tmp_path / "runs"
    assert runs.get(made.id) == made
    with pytest.raises(ErasureError, match="there is no run"):
        runs.get(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../run.json", "..", "/etc/passwd", "link", "none.txt"])
def test_only_a_runs_own_files_are_copied_and_only_to_export_folders(places: Places, name: str) -> None:
    run = Runs(places.runs).create("erase", Request(concepts=("Mira Voss/..",), anchors=("b",)))
    run.files.mkdir()
    (run.files / "x-lora.safetensors").write_bytes(b"abc")
    (run.files / "link").symlink_to("/etc/passwd")
    with pytest.raises(ErasureError, match="no file"):
        copy_to(run, name, "loras", places)
    with pytest.raises(ErasureError, match=r"no folder.*choose one of loras"):
        copy_to(run, "x-lora.safetensors", "../loras", places)
    target = copy_to(run, "x-lora.safetensors", "loras", places)
    assert target.parent == places.exports["loras"]
    assert target.name == "x-lora-mira-voss.safetensors"
    assert target.read_bytes() == b"abc"
    with pytest.raises(ErasureError, match="already exists"):
        copy_to(run, "x-lora.safetensors", "loras", places)
    assert file_of(run.files, "x-lora.safetensors").name == "x-lora.safetensors"


def body(*parts: tuple[str, bytes], boundary: str = "bound") -> bytes:
    lines = b""
    for name, content in parts:
        lines += f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'.encode()
        lines += b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n"
    return lines + f"--{boundary}--\r\n".encode()


def upload(
    data: bytes, chunk: int, path: str = "/gradio_api/upload", kind: str = "multipart/form-data; boundary=bound"
) -> tuple[int, bytes]:
    """The answer's status of the guard around an application that takes anything, and what reached the application."""
    from realera_nodes.studio.guard import UploadGuard

    got, sent = [], []

    async def anything(scope, receive, send) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            got.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"[]"})

    pieces = [data[i : i + chunk] for i in range(0, len(data), chunk)] or [b""]
    queue = [{"type": "http.request", "body": p, "more_body": i < len(pieces) - 1} for i, p in enumerate(pieces)]

    async def receive():
        return queue.pop(0)

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", kind.encode())]}
    asyncio.run(UploadGuard(anything)(scope, receive, send))
    return sent[0]["status"], b"".join(got)


WHOLE = struct.pack("<Q", 2) + b"{}"


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([("m.safetensors", WHOLE)], 200),
        ([("m.SAFETENSORS", WHOLE + b"x" * 100)], 200),
        ([("m.ckpt", WHOLE)], 415),
        ([("m.safetensors", b"\x80\x02}q\x00." * 9)], 415),
        ([("m.safetensors", b"")], 415),
        ([("m.safetensors", WHOLE), ("x.html", b"<script>")], 415),
        ([("m.safetensors.pkl", WHOLE)], 415),
    ],
)
def test_uploads_are_judged_while_they_arrive(parts: list[tuple[str, bytes]], status: int, chunk: int) -> None:
    pytest.importorskip("python_multipart", reason='NO GRADIO: pip install "realera-nodes[studio]"')
    data = body(*parts)
    answer, got = upload(data, chunk)
    assert answer == status
    if status == 200:
        assert got == data


def test_uploads_of_no_known_form_are_refused_and_other_addresses_pass() -> None:
    pytest.importorskip("python_multipart", reason='NO GRADIO: pip install "realera-nodes[studio]"')
    assert upload(b"abc", 2, kind="application/octet-stream")[0] == 415
    assert upload(b"garbage", 3)[0] == 415
    assert upload(json.dumps({"data": []}).encode(), 4, path="/gradio_api/call/erase", kind="application/json")[0] == 200
