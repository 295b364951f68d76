"""The one exception that users see."""

from __future__ import annotations


class ErasureError(ValueError):
    """Something the user can change. The message is one sentence that says what is wrong and what to change."""
