"""Finished rows, one line of JSON each: what is there is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import ErasureError


class Ledger:
    """rows.jsonl. A row is the mapping that ``run.Worker.row`` makes; its "key" names all that decides it."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ErasureError(f"line {number} of {path} is damaged: delete that line; its row will be made anew.") from error
        if whole < len(data):  # a run was killed while it wrote: that row was not finished
            os.truncate(path, whole)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row and waits until it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row)
        with self.path.open("ab") as f:
            f.write(line.encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        self.rows[row["key"]] = json.loads(line)  # as a later run will read it
