"""The header of a safetensors file: parsed without trusting it, and written."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..core.errors import ErasureError

#: bits per element; a dtype that is not here can be copied but not checked
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
        "F6_E3M2": 6, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
        "C64": 64}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_PROTOCOLS = {b"\x02", b"\x03", b"\x04", b"\x05"}  # of pickles; torch writes 2


class Entry(NamedTuple):
    """One tensor: dtype as the header spells it, shape, and its bytes from ``begin`` to ``end`` within the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def parse_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries in header order, metadata, and the position of the data.

    Raises:
        ErasureError: missing, no regular file, unreadable, empty, truncated, a pickle, or not a valid safetensors file.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            return parse_stream(file, path)
    except ErasureError:
        raise
    except FileNotFoundError as error:
        raise ErasureError(f"{path} does not exist: check the path.") from error
    except PermissionError as error:
        raise ErasureError(f"{path} cannot be read, you lack the permission: change its permissions.") from error
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero byte, links in a circle, a failing disk
        why = getattr(error, "strerror", None) or error
        raise ErasureError(f"{path} cannot be read ({why}): choose another file.") from error


def parse_stream(file: IO[bytes], path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """``parse_header`` of an open file, which ``path`` names in sentences."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    text = file.read(length) if length <= MAX_HEADER else file.read(64)
    if size == 0:
        raise ErasureError(f"{path.name} is empty: download it again.")
    _refuse_other_formats(path, start + text[:64])
    if length > MAX_HEADER:
        raise ErasureError(f"{path.name} is not a safetensors file (its header would be {length} bytes long): download it again.")
    if len(start) < 8 or len(text) < length:
        raise ErasureError(f"{path.name} is truncated inside its header: download it again.")
    header = _decode(path, text)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid(path, "its metadata are not text")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_ranges(path, entries, size - 8 - length)
    return entries, metadata, 8 + length


#: file types that are opened at best in vain, and at worst for ever
_SPECIAL = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def require_file(path: Path, kind: str = "safetensors") -> None:
    """Refuses what is no regular file, links followed, without opening it: a pipe would be waited for.

    Args:
        kind: what the file should be, for the sentence

    Raises:
        ErasureError: a folder, a pipe, a socket or a device.
        OSError: it cannot be looked at, or does not exist.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ErasureError(f"{path} is a folder, not a {kind} file: choose a file inside it.")
    what = next((name for test, name in _SPECIAL if test(mode)), None)
    if what is not None or not stat.S_ISREG(mode):
        raise ErasureError(f"{path} is {what or 'something special'}, not a {kind} file: choose a file.")


def _invalid(path: Path, why: str) -> ErasureError:
    return ErasureError(f"{path.name} is not a valid safetensors file ({why}): download it again or save it anew.")


def _refuse_other_formats(path: Path, start: bytes) -> None:
    # first of all: a header's length may begin with the very bytes that other formats begin with, 640 with a pickle's
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return
    pickled = start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in _PROTOCOLS)
    if pickled or path.suffix.lower() in PICKLES:
        raise ErasureError(
            f"{path.name} is a pickle, which can run code when opened: open it in a tool you trust and save as .safetensors "
            "(AUTOMATIC1111, Forge: Checkpoint Merger, no interpolation, safetensors); this project never opens pickles."
        )
    if start.startswith(b"GGUF"):
        raise ErasureError(f"{path.name} is a quantised GGUF file: use the float16 .safetensors version of the model.")
    if start.startswith(b"version https://git-lfs"):
        raise ErasureError(f"{path.name} is a Git LFS pointer, not the model itself: run git lfs pull or download it again.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ErasureError(f"{path.name} is a web page, not a model: the download failed, download it again.")


def _decode(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _invalid(path, "a name occurs twice in its header")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ErasureError:
        raise
    except (ValueError, RecursionError) as error:
        raise ErasureError(f"{path.name} is not a safetensors file (its header is not JSON): download it again.") from error
    if not isinstance(header, dict):
        raise ErasureError(f"{path.name} is not a safetensors file (its header is not a JSON object): download it again.")
    if b"\\u" in text and not _is_unicode(header):
        raise _invalid(path, "a name or a text in its header is cut inside a character, which no host reads")
    return header


def _is_unicode(header: dict[str, Any]) -> bool:
    """Whether all names and metadata can be written again: JSON's escapes can spell half a character."""
    metadata = header.get("__metadata__")
    texts = [*header, *(t for pair in metadata.items() for t in pair)] if isinstance(metadata, dict) else list(header)
    try:
        "".join(t for t in texts if isinstance(t, str)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(path: Path, name: str, value: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _invalid(path, f"the entry of {name} is incomplete") from error
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or end < begin:
        raise _invalid(path, f"the entry of {name} makes no sense")
    if dtype in BITS and math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise _invalid(path, f"the size of {name} does not fit its shape {list(shape)} of {dtype}")
    return Entry(dtype, shape, begin, end)


def _check_ranges(path: Path, entries: Mapping[str, Entry], available: int) -> None:
    """The tensors must cover the data without overlaps or holes: the safetensors library refuses anything else."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            raise _invalid(path, f"{name} overlaps another tensor")
        if entry.begin > at:
            raise _invalid(path, f"there is a hole before {name}")
        at = entry.end
    if at > available:
        raise ErasureError(
            f"{path.name} is truncated: its header announces {at} bytes of tensors but {available} are there; download it again."
        )
    if at < available:
        raise _invalid(path, f"{available - at} bytes follow the last tensor")


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header in the order given, padded with spaces so that the data begin at a multiple of 8 bytes.

    Halves of characters in metadata (cut texts, file names of unknown encoding) become U+FFFD, as no host reads them.
    """
    header: dict[str, Any] = {"__metadata__": {readable(k): readable(v) for k, v in metadata.items()}} if metadata else {}
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def readable(text: str) -> str:
    """The text with U+FFFD in place of lone surrogates: what every file and console can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
