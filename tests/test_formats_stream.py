"""Streaming safetensors: what is not named stays byte for byte, and bad files are named for what they are."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realera_nodes.core.errors import ErasureError
from realera_nodes.formats import stream
from realera_nodes.formats.header import MAX_HEADER, Entry, encode_header
from realera_nodes.formats.stream import SafetensorsFile, rewrite, sha256_of, write_tensors

ROOT = Path(__file__).resolve().parents[1]
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda s: s != "__metadata__"
)


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def data_of(path: Path) -> dict[str, bytes]:
    file = SafetensorsFile.open(path)
    content = path.read_bytes()[file.data_start :]
    return {name: content[e.begin : e.end] for name, e in file.entries.items()}


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    """A valid file whose header order, data order and dtypes are independent of each other."""
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=6))
    entries, at = {}, 0
    for name in draw(st.permutations(names)):
        dtype, size = draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("I64", 8), ("U8", 1), ("BOOL", 1)]))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        n = size
        for side in shape:
            n *= side
        entries[name] = Entry(dtype, shape, at, at + n)
        at += n
    data = draw(st.binary(min_size=at, max_size=at))
    metadata = draw(st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), max_size=8), max_size=2))
    return {name: entries[name] for name in names}, metadata, data


@settings(max_examples=60, deadline=None)
@given(files(), st.data(), st.booleans())
def test_rewriting_keeps_everything_else(content, data, in_kernel: bool) -> None:
    entries, metadata, body = content
    floats = [n for n, e in entries.items() if e.dtype in ("F32", "F16", "BF16", "F64")]
    named = data.draw(st.lists(st.sampled_from(floats), unique=True)) if floats else []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not in_kernel:
            patch.delattr(os, "copy_file_range", raising=False)
        source, target = Path(folder) / "a", Path(folder) / "b"
        source.write_bytes(encode_header(entries, metadata) + body)
        opened, seen = SafetensorsFile.open(source), []
        named = [n for n in named if torch.isfinite(opened.read(n)).all()]
        change = dict.fromkeys(named, torch.ones_like)
        rewrite(source, target, change, {"realera.x": "1"}, progress=lambda *a: seen.append(a))
        result = SafetensorsFile.open(target)
        assert list(result.entries.items()) == list(entries.items())
        assert result.metadata == metadata | {"realera.x": "1"}
        assert result.data_start % 8 == 0
        before, after = data_of(source), data_of(target)
        assert all(before[n] == after[n] for n in entries if n not in named)
        loaded = load_file(target)  # the library accepts it
        assert set(loaded) == set(entries)
        assert all((loaded[n] == 1).all() for n in named)
        assert seen[-1] == (target.stat().st_size, target.stat().st_size)
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)


@pytest.mark.parametrize("dtype", sorted(stream.DTYPES))
def test_every_dtype_is_read_as_the_library_does(tmp_path: Path, dtype: str) -> None:
    value = torch.arange(6).reshape(2, 3).to(torch.float32).to(stream.DTYPES[dtype])
    save_file({"x": value, "empty": value[:0].clone()}, tmp_path / "a")
    file = SafetensorsFile.open(tmp_path / "a")
    assert file.entries["x"].dtype == dtype
    read = file.read("x")
    assert read.dtype == value.dtype
    assert torch.equal(read.view(torch.uint8), value.view(torch.uint8))
    assert file.read("empty").shape == (0, 3)


def test_a_dtype_that_torch_lacks_is_copied_but_not_read(tmp_path: Path) -> None:
    raw(tmp_path / "a", {"x": {"dtype": "F99", "shape": [5], "data_offsets": [0, 3]}}, b"abc")
    rewrite(tmp_path / "a", tmp_path / "b", {}, {})
    assert data_of(tmp_path / "b") == {"x": b"abc"}
    with pytest.raises(ErasureError, match=r"stored as F99, which this torch .* cannot read"):
        SafetensorsFile.open(tmp_path / "b").read("x")


@pytest.mark.parametrize(("dtype", "seen"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                             (torch.float8_e4m3fn, torch.float32), (torch.float64, torch.float64)])  # fmt: skip
def test_edits_are_computed_in_full_precision_and_stored_as_before(tmp_path: Path, dtype, seen) -> None:
    save_file({"x": torch.tensor([1.0, -2.0]).to(dtype)}, tmp_path / "a", {"modelspec.hash_sha256": "0x1", "note": "kept"})
    dtypes = []

    def double(w: torch.Tensor) -> torch.Tensor:
        dtypes.append(w.dtype)
        return 2 * w.double()

    rewrite(tmp_path / "a", tmp_path / "b", {"x": double}, {"note2": "new"})
    assert dtypes == [seen]
    assert torch.equal(SafetensorsFile.open(tmp_path / "b").read("x").float(), torch.tensor([2.0, -4.0]))
    assert SafetensorsFile.open(tmp_path / "b").read("x").dtype == dtype
    # a hash of the old tensors would be a lie
    assert SafetensorsFile.open(tmp_path / "b").metadata == {"note": "kept", "note2": "new"}


def test_rewriting_a_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"x": torch.ones(3), "y": torch.arange(4)}, path)
    with pytest.raises(ErasureError, match="already exists"):
        rewrite(path, path, {"x": torch.zeros_like}, {})
    rewrite(path, path, {"x": torch.zeros_like}, {}, overwrite=True)
    assert torch.equal(load_file(path)["x"], torch.zeros(3))
    assert os.listdir(tmp_path) == ["a"]


BAD_EDITS = [
    ({"x": lambda w: w[:1]}, r"the edit of x in a has shape \(1,\) instead of \(2,\)"),
    ({"x": lambda w: w * float("nan")}, "the edit made x in a NaN or infinite"),
    ({"x": lambda w: w * 1e9}, r"edited x in a is too large for torch\.float16"),
    ({"nan": lambda w: w}, "nan in a contains NaN or infinity"),
    ({"int": lambda w: w}, "int in a holds quantised whole numbers"),
    ({"gone": lambda w: w}, "a has no tensor gone"),
]


@pytest.mark.parametrize(("replace", "message"), BAD_EDITS)
def test_edits_that_cannot_be_stored(tmp_path: Path, replace, message: str) -> None:
    x = torch.ones(2, dtype=torch.float16)
    save_file({"x": x, "nan": x * float("inf"), "int": torch.ones(2, dtype=torch.int8)}, tmp_path / "a")
    with pytest.raises(ErasureError, match=message):
        rewrite(tmp_path / "a", tmp_path / "b", replace, {})
    assert os.listdir(tmp_path) == ["a"]


def test_float8_is_not_silently_saturated(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a")
    with pytest.raises(ErasureError, match="too large"):
        rewrite(tmp_path / "a", tmp_path / "b", {"x": lambda w: w * 1000}, {})


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def cut(path: Path, size: int) -> None:
    save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:size])


BAD_FILES = {
    "does not exist": lambda p: None,
    "is a folder, not a safetensors file": lambda p: p.mkdir(),
    "is empty": lambda p: p.write_bytes(b""),
    "truncated inside its header": lambda p: cut(p, 40),
    "truncated: its header announces 400 bytes of tensors but 300 are there": lambda p: cut(p, -100),
    "is truncated inside": lambda p: p.write_bytes(b"\x01\x00"),
    r"pickle.*save as \.safetensors .*Checkpoint Merger.*; this project never": lambda p: torch.save({"x": torch.ones(1)}, p),
    r"never opens pickles": lambda p: p.write_bytes(b"\x80\x02}q\x00."),
    "GGUF": lambda p: p.write_bytes(b"GGUF" + bytes(60)),
    "Git LFS pointer": lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "is a web page": lambda p: p.write_bytes(b"\n<!DOCTYPE html><html>404</html>"),
    "its header would be": lambda p: p.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{}"),
    "its header is not JSON": lambda p: raw(p, b"{x}"),
    "header is not JSON": lambda p: raw(p, b"\xff\xfe"),
    "header is not a JSON object": lambda p: raw(p, [1]),
    "a name occurs twice": lambda p: raw(p, b'{"x":1,"x":2}'),
    "its metadata are not text": lambda p: raw(p, {"__metadata__": {"a": 1}}),
    "the entry of x is incomplete": lambda p: raw(p, {"x": {"dtype": "F32"}}),
    "the entry of x makes no sense": lambda p: raw(p, {"x": entry([-1], 0, 4)}),
    "entry of x makes no sense": lambda p: raw(p, {"x": entry([1], 4, 0)}),
    r"the size of x does not fit its shape \[3\] of F32": lambda p: raw(p, {"x": entry([3], 0, 8)}, bytes(8)),
    "overlaps another tensor": lambda p: raw(p, {"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12)),
    "there is a hole before y": lambda p: raw(p, {"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12)),
    "3 bytes follow the last tensor": lambda p: raw(p, {"x": entry([1], 0, 4)}, bytes(7)),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_unusable_files_are_named_for_what_they_are(tmp_path: Path, message: str) -> None:
    BAD_FILES[message](tmp_path / "bad.safetensors")
    with pytest.raises(ErasureError, match=message):
        SafetensorsFile.open(tmp_path / "bad.safetensors")


def test_an_unreadable_pickle_and_a_misnamed_safetensors(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(bytes(100))
    with pytest.raises(ErasureError, match="never opens pickles"):
        SafetensorsFile.open(tmp_path / "a.ckpt")
    save_file({"x": torch.ones(1)}, tmp_path / "b.ckpt")
    assert list(SafetensorsFile.open(tmp_path / "b.ckpt").entries) == ["x"]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_crash_the_parser(junk: bytes, framed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(len(junk).to_bytes(8, "little") + junk if framed else junk)
        try:
            SafetensorsFile.open(path)
        except ErasureError:
            return
        load_file(path)  # what is accepted, the library accepts too


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, 0])
def test_copying_goes_on_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The kernel copies the first bytes and then refuses; 0 stands for its answer "nothing copied"."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100)
    calls = []

    def once(src, dst, count, offset_src):
        calls.append(count)
        if len(calls) > 1:
            if code:
                raise OSError(code, "no")
            return 0
        return os.write(dst, os.pread(src, 1000, offset_src))

    monkeypatch.setattr(os, "copy_file_range", once, raising=False)
    stream.copy_file(tmp_path / "a", tmp_path / "b")
    assert len(calls) == 2
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 5_000_000).hexdigest()


def test_written_tensors_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, dtype=torch.float16), "a": torch.arange(6.0).reshape(2, 3).T, "s": torch.tensor(4.0)}
    metadata = {str(i): "é" for i in range(9)}
    write_tensors(tmp_path / "1", tensors, metadata)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())), metadata)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    loaded = load_file(tmp_path / "1")
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    with safe_open(tmp_path / "1", "pt") as f:
        assert f.metadata() == metadata


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads peak memory from /proc")
def test_memory_stays_far_below_the_file_size(tmp_path: Path) -> None:
    n = 40
    save_file({f"t{i}": torch.zeros(1 << 20) for i in range(n)}, tmp_path / "a")  # 160 MB
    program = f"""
from pathlib import Path
from realera_nodes.formats.stream import rewrite
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
folder = Path({str(tmp_path)!r})
rewrite(folder / "a", folder / "b", {{"t7": lambda w: w + 1}}, {{}})
print(peak() - before)
"""
    kilobytes = int(subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout)
    assert kilobytes < 50_000
