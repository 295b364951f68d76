"""What was written is read again before anything is called done."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ..core.errors import ErasureError
from .header import Entry, parse_stream

CHUNK = 16 << 20


def not_as_written(target: Path, why: str) -> ErasureError:
    return ErasureError(
        f"{target} is not as it was written ({why.rstrip('.')}): check the disk, or choose another folder; nothing was kept."
    )


def require_written(out: IO[bytes], target: Path, entries: Mapping[str, Entry], sums: Mapping[str, int] | None = None) -> None:
    """Reads a file that was just written, before it gets its name.

    Args:
        out: the file, opened for reading too below Python
        entries: its tensors
        sums: tensor name -> CRC-32 of its bytes, of those that are to be read again

    Raises:
        ErasureError: its header is not valid, has other tensors, or one of them has other bytes.
    """
    out.flush()
    with os.fdopen(os.dup(out.fileno()), "rb") as file:
        try:
            found, _, start = parse_stream(file, target)
            if list(found.items()) != list(entries.items()):
                raise ErasureError("its tensors are others")
            for name, expected in (sums or {}).items():
                file.seek(start + found[name].begin)
                value = 0
                for at in range(0, found[name].nbytes, CHUNK):
                    value = zlib.crc32(file.read(min(CHUNK, found[name].nbytes - at)), value)
                if value != expected:
                    raise ErasureError(f"{name} has other bytes")
        except ErasureError as error:
            raise not_as_written(target, str(error)) from error
        finally:
            out.seek(0, os.SEEK_END)  # both share one position
