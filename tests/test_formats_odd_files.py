"""Files that are valid and look odd are read; files that are none are named for what they are, at once and in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats.header import encode_header
from realera_nodes.formats.lora import read_lora, write_lora
from realera_nodes.formats.metadata import ErasureMetadata, inspect_file
from realera_nodes.formats.stream import SafetensorsFile, rewrite, write_tensors

ROOT = Path(__file__).resolve().parents[1]
NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def padded(path: Path, length: int, suffix: str = "") -> Path:
    """A valid file whose header is exactly so long."""
    file = path / f"{length}{suffix}.safetensors"
    save_file({"x": torch.ones(2)}, file)
    content = file.read_bytes()
    n = int.from_bytes(content[:8], "little")
    file.write_bytes(length.to_bytes(8, "little") + content[8 : 8 + n] + b" " * (length - n) + content[8 + n :])
    return file


# 0x..0280 to 0x..0580 begin as pickles do; 0x4034b50 as a zip, 0x0a and 0x20 as the white space before a page
LENGTHS = [p * 256 + 128 + k * 65536 for p in (2, 3, 4, 5) for k in (0, 1, 7)] + [0x4034B50, 0x0A0A, 0x2020, 0x3C3C]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("suffix", ["", ".ckpt"])
def test_a_header_of_any_length_is_read(tmp_path: Path, length: int, suffix: str) -> None:
    if suffix and length > 1 << 20:
        pytest.skip("once is enough for a header this long")
    path = padded(tmp_path, length)
    if suffix:
        path = path.rename(path.with_suffix(suffix))
    with safe_open(path, "pt") as file:  # the library reads it
        assert list(file.keys()) == ["x"]
    assert torch.equal(SafetensorsFile.open(path).read("x"), torch.ones(2))


def test_our_own_files_are_read_whatever_their_titles_length(tmp_path: Path) -> None:
    seen = set()
    for n in range(0, 1300, 8):
        path = tmp_path / "lora.safetensors"
        write_lora(path, {NAME: (torch.zeros(1, 768), torch.zeros(320, 1))}, {"modelspec.title": "x" * n}, overwrite=True)
        seen.add(path.read_bytes()[:2])
        assert list(read_lora(path, [NAME])) == [NAME]
    assert {b"\x80\x02", b"\x80\x03", b"\x80\x04"} <= seen


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model"])
def test_pickles_are_called_pickles(tmp_path: Path, protocol: int, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"state_dict": {"x" * 99: list(range(99))}}, protocol))
    with pytest.raises(ErasureError, match="is a pickle, which can run code"):
        SafetensorsFile.open(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_torchs_own_files_are_called_pickles(tmp_path: Path, zipped: bool) -> None:
    torch.save({"x": torch.ones(200)}, tmp_path / "a.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ErasureError, match="is a pickle, which can run code"):
        SafetensorsFile.open(tmp_path / "a.safetensors")


HALVES = ["\ud800", "a\udc00b", "\udcff"]


def with_text(path: Path, name: str, metadata: dict[str, str]) -> Path:
    header = {"__metadata__": metadata, name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()  # escapes spell what UTF-8 cannot
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    return path


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("where", ["name", "key", "value"])
def test_half_characters_in_a_header_are_refused_as_the_library_does(tmp_path: Path, half: str, where: str) -> None:
    texts = {"name": ("x" + half, {}), "key": ("x", {half: "v"}), "value": ("x", {"note": f"cut {half}"})}
    path = with_text(tmp_path / "a.safetensors", *texts[where])
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(ErasureError, match="cut inside a character") as caught:
        SafetensorsFile.open(path)
    str(caught.value).encode()  # it can be printed


def test_whole_characters_spelled_by_two_escapes_are_fine(tmp_path: Path) -> None:
    path = with_text(tmp_path / "a.safetensors", "x\U0001f600", {"note": "\U0001f600 and \\ud800"})
    assert SafetensorsFile.open(path).metadata["note"] == "\U0001f600 and \\ud800"
    rewrite(path, tmp_path / "b.safetensors", {}, {})
    assert set(load_file(tmp_path / "b.safetensors")) == {"x\U0001f600"}


@pytest.mark.parametrize("half", HALVES)
def test_half_characters_in_what_we_write_are_replaced(tmp_path: Path, half: str) -> None:
    """A file name of unknown encoding, a phrase that was cut: the file is written all the same, and any host reads it."""
    made = ErasureMetadata("uce", (f"cat{half}",), ("dog",), base_name=f"model{half}.safetensors")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, made.to_safetensors("sd1"))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert "\ufffd" in file.metadata()["modelspec.title"]
    read = inspect_file(tmp_path / "a.safetensors")["erasure"]
    assert list(read["concepts"]) == [f"cat{half}".encode("utf-16", "surrogatepass").decode("utf-16", "replace")]


DEEP = "[" * 200_000 + "]" * 200_000


def test_json_that_is_nested_too_deep(tmp_path: Path) -> None:
    for header in ('{"x": ' + DEEP + "}", '{"__metadata__": ' + DEEP + "}", '{"a":' * 200_000):
        text = header.encode()
        (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ErasureError, match=r"not a safetensors file|not a valid safetensors file"):
            SafetensorsFile.open(tmp_path / "a")
    factors = {NAME: (torch.ones(1, 768), torch.ones(320, 1))}
    write_lora(tmp_path / "lora", factors, {"lora_adapter_metadata": DEEP})
    with pytest.raises(ErasureError, match="lora_adapter_metadata that is not JSON"):
        read_lora(tmp_path / "lora", [NAME])
    write_lora(tmp_path / "made", factors, ErasureMetadata("uce", (), ()).to_safetensors("sd1", 1) | {"realera.config": DEEP})
    with pytest.raises(ErasureError, match="metadata are damaged"):
        inspect_file(tmp_path / "made")


def in_time(act: Callable[[], object], seconds: int = 30) -> None:
    """Ends what waits for ever."""

    def ring(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        act()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "link to a fifo", "link to nothing", "link to itself"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.safetensors"
    with socket.socket(socket.AF_UNIX) as s:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            s.bind("m.safetensors")
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "link to a fifo":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to("pipe")
        else:
            path.symlink_to("nowhere" if kind == "link to nothing" else "m.safetensors")
        with pytest.raises(ErasureError) as caught:
            in_time(lambda: SafetensorsFile.open(path))
    words = {"fifo": "is a pipe", "socket": "is a socket", "device": "is a device", "folder": "is a folder",
             "link to a fifo": "is a pipe", "link to nothing": "does not exist", "link to itself": "cannot be read"}  # fmt: skip
    assert words[kind] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(ErasureError, match="cannot be read"):
        SafetensorsFile.open(tmp_path / name)


def test_whole_numbers_are_no_lora(tmp_path: Path) -> None:
    """int8 factors are quantised: without their scale they would be taken for numbers a hundred times too large."""
    tensors = {f"lora_unet_{NAME.replace('.', '_')}.lora_{p}.weight": torch.ones(2, 2, dtype=torch.int8) for p in ("up", "down")}
    write_tensors(tmp_path / "a", tensors, {})
    with pytest.raises(ErasureError, match="quantised whole numbers"):
        read_lora(tmp_path / "a", [NAME])


def test_an_encoded_header_is_what_is_parsed() -> None:
    text = encode_header({}, {"a": "\ud800"})
    assert json.loads(text[8:]) == {"__metadata__": {"a": "\ufffd"}}


@pytest.mark.parametrize("value", ["null", '"cat"', '{"a": 1}', "[1]", "[null]", "3", "[["])
@pytest.mark.parametrize("field", ["concepts", "anchors", "kinds", "config", "method", "base_sha256"])
def test_odd_values_in_our_own_metadata(field: str, value: str) -> None:
    text = ErasureMetadata("uce", ("a",), ("b",)).to_safetensors("sd1") | {f"realera.{field}": value}
    fits = (field == "config" and value == '{"a": 1}') or (field in ("method", "base_sha256") and value == '"cat"')
    if fits:
        assert ErasureMetadata.from_safetensors(text) is not None
        return
    with pytest.raises(ErasureError, match=r"realera\.\* metadata are damaged"):
        ErasureMetadata.from_safetensors(text)


def test_odd_values_in_a_prior(tmp_path: Path) -> None:
    from realera_nodes.priors import Prior, read_prior, write_prior

    write_prior(tmp_path / "a", Prior(torch.eye(4).double(), None, (), (), 3, "x"))
    read_prior(tmp_path / "a")
    file = SafetensorsFile.open(tmp_path / "a")
    for key, value in (("retained", "null"), ("retained", "[3]"), ("without", "3"), ("captions", '"many"'), ("captions", "1e999"),
                       ("encoder", DEEP)):  # fmt: skip
        write_tensors(tmp_path / "b", {"general": file.read("general")}, file.metadata | {f"realera.prior.{key}": value}, True)
        with pytest.raises(ErasureError, match="is damaged"):
            read_prior(tmp_path / "b")
    write_tensors(tmp_path / "b", {"general": torch.eye(4, dtype=torch.int64)}, file.metadata, True)
    with pytest.raises(ErasureError, match="is damaged"):
        read_prior(tmp_path / "b")


def test_a_name_that_no_console_can_show_is_one_sentence(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/m\xff.safetensors"
    for make in (lambda: None, lambda: Path(os.fsdecode(name)).write_bytes(b"nothing")):
        make()
        run = subprocess.run([sys.executable, "-m", "realera_nodes", "inspect", name], capture_output=True, timeout=300, cwd=ROOT,
                             check=False)  # fmt: skip
        assert run.returncode == 1
        assert b"Traceback" not in run.stderr
        assert len(run.stderr.splitlines()) == 1
