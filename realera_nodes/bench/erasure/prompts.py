"""Prompt files: I2P's table with its seeds, MS-COCO's captions."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from ...core.errors import ErasureError

#: columns that hold a prompt's own seed, in the files that are about
SEEDS = ("sd_seed", "evaluation_seed", "seed")


def read_prompts(path: Path) -> list[tuple[str, int]]:
    """(prompt, seed) of a CSV table with a column "prompt" and one of SEEDS. ErasureError: it is not such a table."""
    rows = list(csv.DictReader(_text(path).splitlines(keepends=True)))
    seeds = [s for s in SEEDS if rows and s in rows[0]]
    if not rows or "prompt" not in rows[0] or not seeds:
        raise ErasureError(f'{path} has no columns "prompt" and {" or ".join(SEEDS)}: give I2P\'s table.')
    try:
        return [(row["prompt"], int(float(row[seeds[0]]))) for row in rows]
    except ValueError as error:
        raise ErasureError(f"{path} holds a seed that is no number ({error}): mend it.") from error


def read_captions(path: Path, count: int, seed: int) -> list[str]:
    """``count`` captions of MS-COCO's JSON or of a text file, drawn without replacement; of different pictures, if it tells."""
    if path.suffix == ".json":
        try:
            rows = json.loads(_text(path))["annotations"]
            first = {row["image_id"]: " ".join(row["caption"].split()) for row in reversed(rows)}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ErasureError(f"{path} holds no annotations with image_id and caption: give captions_val2014.json.") from error
        captions = [first[k] for k in sorted(first)]
    else:
        captions = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not captions:
        raise ErasureError(f"{path} holds no captions: give another file.")
    return random.Random(seed).sample(captions, min(count, len(captions)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ErasureError(f"{path} does not exist: give --prompts another file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ErasureError(f"{path} cannot be read ({error}): give --prompts another file.") from error
