"""The one exception that users see."""

from __future__ import annotations


class ErasureError(ValueError):
    """Something the user can change. The message is one sentence that says what is wrong and what to change."""


def says_out_of_memory(error: BaseException) -> bool:
    """Torch's allocators raise plain RuntimeErrors."""
    said = str(error).casefold()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("not enough memory", "out of memory", "can't allocate")
    )
