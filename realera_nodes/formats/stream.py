"""safetensors files, read and rewritten as streams: the header is parsed, tensors are touched only when asked for.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..core.errors import ErasureError
from .atomic import Batch, atomic_file, require_space
from .header import Entry, encode_header, parse_header
from .written import require_written

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
# dtypes that only newer versions of torch have
_OTHERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32",
           "U64": "uint64", "BOOL": "bool", "C64": "complex64", "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip
DTYPES = FLOATS | {name: getattr(torch, t) for name, t in _OTHERS.items() if hasattr(torch, t)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 64 << 20  # one call into the kernel: short enough for Ctrl-C and progress
_BUFFER = 256 << 10  # stays in the processor's cache: faster than larger ones
#: copy_file_range does not work between these two files; reading and writing does
_NO_COPY_RANGE = {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY}
#: metadata that hash the tensors: false once a tensor has changed
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of a safetensors file; the file is not kept open.

    Attributes:
        path: the file.
        entries: tensor name -> Entry (dtype as in the header, shape, begin and end within the data), in header order.
        metadata: the header's free text fields.
        data_start: where the data begin in the file, in bytes.

    ``SafetensorsFile.open(path)`` raises ErasureError, with one sentence for each kind of unusable file.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        return cls(Path(path), *parse_header(Path(path)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Raises ErasureError: no such tensor, a dtype torch lacks, a truncated file."""
        with self.path.open("rb") as file:
            return self._read_from(file, name)

    def _read_from(self, file: IO[bytes], name: str) -> Tensor:
        if name not in self.entries:
            raise ErasureError(f"{self.path.name} has no tensor {name}: choose another file.")
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ErasureError(
                f"{name} in {self.path.name} is stored as {entry.dtype}, which this torch {torch.__version__} cannot read: "
                "use a float16 or float32 version of the model."
            )
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        data = bytearray(entry.nbytes)
        file.seek(self.data_start + entry.begin)
        at = 0
        while at < entry.nbytes:  # one read gives at most 2 GB
            n = file.readinto(memoryview(data)[at:])  # type: ignore[attr-defined]
            if not n:
                raise _shrunk(self.path)
            at += n
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def _shrunk(path: Path) -> ErasureError:
    return ErasureError(f"{path.name} became shorter while it was read: wait until it is completely written, then try again.")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """``sha256_of``; a file that has not changed since it was last asked for in this process is not read again."""
    now = path.stat()
    return _known_sha256(path.resolve(), now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=8)
def _known_sha256(path: Path, modified: int, size: int) -> str:
    return sha256_of(path)


def copy_bytes(source: IO[bytes], target: IO[bytes], begin: int, count: int, tick: Callable[[int], None]) -> None:
    """Appends ``count`` bytes of ``source`` from ``begin`` on to ``target``, inside the kernel where it can.

    Args:
        tick: called with the number of bytes of each chunk.

    Raises:
        ErasureError: the source ends too early.
        OSError: no space.
    """
    target.flush()
    end, in_kernel = begin + count, hasattr(os, "copy_file_range")
    while in_kernel and begin < end:
        try:
            n = os.copy_file_range(source.fileno(), target.fileno(), min(_CHUNK, end - begin), offset_src=begin)
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
            n = 0
        if n == 0:  # also some network file systems' answer
            break
        begin += n
        tick(n)
    target.seek(0, os.SEEK_END)  # the kernel moved the file's position behind Python's back
    source.seek(begin)
    buffer = memoryview(bytearray(min(_BUFFER, end - begin)))
    while begin < end:
        n = source.readinto(buffer[: end - begin])  # type: ignore[attr-defined]
        if not n:
            raise _shrunk(Path(source.name))
        target.write(buffer[:n])
        begin += n
        tick(n)


def copy_file(source: Path, target: Path, tick: Callable[[int], None] = lambda n: None) -> None:
    """The bytes of ``source`` in a new file ``target``; links are followed."""
    with atomic_file(target) as out, source.open("rb", buffering=0) as file:
        copy_bytes(file, out, 0, source.stat().st_size, tick)


def tensor_bytes(value: Tensor) -> memoryview:
    """A tensor's bytes in C order, without a copy where it is contiguous already."""
    return memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _peak(value: Tensor) -> float:
    """Largest magnitude; NaN if there is one."""
    if value.numel() == 0:
        return 0.0
    low, high = (float(x) for x in torch.aminmax(value))
    return max(-low, high)


def transformed(value: Tensor, change: Callable[[Tensor], Tensor], what: str) -> Tensor:
    """``change(value)`` computed in float32 (float64 stays), in ``value``'s dtype.

    Raises:
        ErasureError: not a float tensor, NaN or infinity before or after, an overflow of the dtype, another shape. ``what``
            names the tensor.
    """
    if value.dtype not in FLOATS.values():
        raise ErasureError(f"{what} holds quantised whole numbers: use a float16 or float32 version of the model.")
    exact = value if value.dtype == torch.float64 else value.float()
    if not math.isfinite(_peak(exact)):
        raise ErasureError(f"{what} contains NaN or infinity: the file is damaged, use another copy of the model.")
    result = change(exact)
    if result.shape != value.shape:
        raise ErasureError(f"the edit of {what} has shape {tuple(result.shape)} instead of {tuple(value.shape)}: "
                           "it was made for another model.")  # fmt: skip
    peak = _peak(result)
    if not math.isfinite(peak):
        raise ErasureError(f"the edit made {what} NaN or infinite: weaken the edit or raise its regularisation.")
    if peak > torch.finfo(value.dtype).max:
        raise ErasureError(f"the edited {what} is too large for {value.dtype}: weaken the edit or use a float32 model.")
    return result.to(value.dtype)


def rewrite(
    source: Path,
    target: Path,
    replace: Mapping[str, Callable[[Tensor], Tensor]],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    batch: Batch | None = None,
) -> None:
    """``source`` with some tensors changed, as a new file.

    Other tensors are copied byte for byte; order, dtypes, offsets, foreign tensors and metadata stay. Memory: one tensor.

    Args:
        source: a safetensors file; may be ``target`` with ``overwrite``.
        target: the file to write; it appears whole or not at all.
        replace: tensor name -> its new value from its old, both float32 (float64 if stored so) of the same shape.
        metadata: added to the source's; these win. Hashes of the old tensors are left out.
        overwrite: replace ``target`` if it exists.
        progress: called with bytes done and bytes in total.
        batch: what it is to appear with, in place of ``overwrite``.

    Raises:
        ErasureError: unusable source or target, an unknown name, no disk space, NaN or infinity (see ``transformed``), or a
            disk that does not hold what was written.
    """
    content = SafetensorsFile.open(source)
    for name in replace:
        if name not in content.entries:
            raise ErasureError(f"{content.path.name} has no tensor {name}: the edit was made for another model.")
    kept = {k: v for k, v in content.metadata.items() if not (replace and k in _STALE)}
    texts = kept | dict(metadata)
    header = encode_header(content.entries, texts)
    size = max((entry.end for entry in content.entries.values()), default=0)
    total, done = len(header) + size, 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    changed = sorted((content.entries[name].begin, content.entries[name].end, name) for name in replace)
    sums: dict[str, int] = {}
    with atomic_file(target, overwrite, batch) as out:
        require_space(Path(target).parent, total)
        with content.path.open("rb", buffering=0) as file:
            out.write(header)
            tick(len(header))
            at = 0
            for begin, end, name in changed:
                copy_bytes(file, out, content.data_start + at, begin - at, tick)
                value = transformed(content._read_from(file, name), replace[name], f"{name} in {content.path.name}")
                data = tensor_bytes(value)
                sums[name] = zlib.crc32(data)
                out.write(data)
                at = end
                tick(end - begin)
            copy_bytes(file, out, content.data_start + at, size - at, tick)
        require_written(out, Path(target), content.entries, sums)


def write_tensors(
    target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = False, batch: Batch | None = None,
    hashed: bool = False,
) -> None:  # fmt: skip
    """A safetensors file of ``tensors``; the same input gives the same bytes.

    Args:
        batch: what it is to appear with, in place of ``overwrite``.
        hashed: add the hash of all tensors' bytes to the metadata, as ModelSpec and kohya's trainers name it.

    Raises:
        ErasureError: as ``rewrite``.
    """
    # large items first keeps every tensor aligned to its item size, as the safetensors library does
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    entries, at = {}, 0
    for name in names:
        value = tensors[name]
        end = at + value.numel() * value.element_size()
        entries[name] = Entry(_NAMES[value.dtype], tuple(value.shape), at, end)
        at = end
    if hashed:
        digest = hashlib.sha256()
        for name in names:
            digest.update(tensor_bytes(tensors[name]))
        found = digest.hexdigest()
        metadata = {**metadata, "modelspec.hash_sha256": f"0x{found}", "sshs_model_hash": found}
    header = encode_header(entries, metadata)
    with atomic_file(target, overwrite, batch) as out:
        require_space(Path(target).parent, len(header) + at)
        out.write(header)
        for name in names:
            out.write(tensor_bytes(tensors[name]))
        require_written(out, Path(target), entries)
