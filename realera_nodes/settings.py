"""Configs from TOML files and ``section.key=value`` settings: every default lives in its dataclass, and here only names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from .core.concepts import Concept, Preserved
from .core.errors import ErasureError
from .core.phrases import shown, told

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
#: keys of a config file that are no settings
LISTS = ("concepts", "retain", "preset")


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table. ErasureError: missing, unreadable, or not TOML."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ErasureError(f"{path} is no file: give another one, or leave --config out.")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte order mark
    except ErasureError:
        raise
    except FileNotFoundError as error:
        raise ErasureError(f"{path} does not exist: give --config a TOML file.") from error
    except OSError as error:
        raise ErasureError(f"{path} cannot be read ({error.strerror}): give another file, or leave --config out.") from error
    except (ValueError, RecursionError) as error:  # TOML's errors, bytes that are no text, numbers of thousands of digits
        raise ErasureError(f"{path} is not TOML ({shown(str(error), 200)}): mend it, or leave --config out.") from error


def concepts_from(rows: Any) -> list[Concept]:
    """Concepts from the ``[[concepts]]`` tables of a config."""
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ErasureError("concepts must be tables: write [[concepts]] with phrase and anchor below.")
    known = {f.name for f in dataclasses.fields(Concept)} - {"images", "masks"}
    found = []
    for row in rows:
        for key in row:
            if key not in known:
                raise ErasureError(f'a concept has no setting "{key}": choose from {", ".join(sorted(known))}.')
        for key in ("phrase", "anchor"):
            if not isinstance(row.get(key), str):
                raise ErasureError(f'a concept in the config lacks its {key}: write {key} = "...".')
        if not isinstance(row.get("kind", ""), str):
            raise ErasureError(f'kind of "{row["phrase"]}" must be a word, not {told(row["kind"])}: mend the value.')
        values = dict(row)
        values["preserve"] = _preserved(row)
        for key in ("aliases", "templates"):
            if key in values:
                if not _are_words(values[key]):
                    raise ErasureError(
                        f'{key} of "{row["phrase"]}" must be a list of words, not {told(row[key])}: mend the value.'
                    )
                values[key] = tuple(values[key])
        found.append(Concept(**values))
    return found


def _preserved(row: Mapping[str, Any], key: str = "preserve") -> tuple[Preserved, ...]:
    """The preserved concepts of a table: words, or {phrase, weight}. ``key`` is what messages call it."""
    rows = row.get("preserve", ())
    fits = isinstance(rows, (list, tuple))
    tables = [{"phrase": r} if isinstance(r, str) else r for r in rows] if fits else []
    for table in tables:
        fits = fits and isinstance(table, dict) and table.keys() <= {"phrase", "weight"} and isinstance(table.get("phrase"), str)
        fits = fits and type(table.get("weight", 1.0)) in (int, float)
    if not fits:
        wanted = 'a list of words or of { phrase = "...", weight = 1.0 }'
        where = f'{key} of "{row["phrase"]}"' if key == "preserve" else key
        raise ErasureError(f"{where} must be {wanted}, not {told(rows)}: mend the value.")
    return tuple(Preserved(**table) for table in tables)


def retained_from(rows: Any) -> tuple[Preserved, ...]:
    """The ``retain`` list of a config: words, or {phrase, weight}."""
    return _preserved({"phrase": "the list", "preserve": rows}, "retain")


def sections(config: Any) -> tuple[str, ...]:
    """The parts of a config that are configs themselves."""
    return tuple(f.name for f in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, f.name)))


def config_from(table: Mapping[str, Any], base: T) -> T:
    """A config with the values of a table ({"neighbors": {"m": 20}, "beyond_on": false}) over a base's."""
    changes: dict[str, Any] = {}
    for key, value in table.items():
        if key in LISTS:
            continue
        if key in sections(base):
            if not isinstance(value, Mapping):
                raise ErasureError(f'"{key}" is a section: write [{key}] and its settings below.')
            changes[key] = _replaced(getattr(base, key), value, f"{key}.")
        else:
            changes |= {key: _typed(type(base), key, value, "")}
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def with_settings(config: T, settings: Iterable[str]) -> T:
    """Applies ``section.key=value`` strings, all at once: some ranges only hold together. Of two for one key the last holds.

    Raises:
        ErasureError: unknown name, wrong type, out of range.
    """
    table: dict[str, Any] = {}
    for setting in settings:
        name, sign, text = setting.partition("=")
        if not sign:
            raise ErasureError(f'"{setting}" is not a setting: write section.key=value, such as neighbors.m=20.')
        section, dot, key = name.strip().partition(".")
        if section in LISTS:
            raise ErasureError(f'there is no setting "{section}": choose from the sections ' + ", ".join(sections(config)) + ".")
        value = {key: _parse(text.strip())} if dot else _parse(text.strip())
        before = table.get(section)
        table[section] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    return config_from(table, config) if table else config


def as_table(config: Any) -> dict[str, Any]:
    """A config as plain values, for metadata and reports."""
    return dataclasses.asdict(config)


def _parse(text: str) -> Any:
    """A TOML value, or the text itself."""
    try:
        table = tomllib.loads(f"x = {text}")
    except (ValueError, RecursionError):
        return text
    return table["x"] if len(table) == 1 else text


def _are_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)


def _replaced(part: Any, values: Mapping[str, Any], prefix: str) -> Any:
    changes = {k: _typed(type(part), k, v, prefix) for k, v in values.items()}
    try:
        return dataclasses.replace(part, **changes)
    except ErasureError as error:  # two sections may have settings of one name
        own = str(error).partition(" ")[0] in {f.name for f in dataclasses.fields(part)}
        raise ErasureError(f"{prefix if own else ''}{error}") from error


def _typed(kind: type, key: str, value: Any, prefix: str) -> Any:
    hints = get_type_hints(kind)
    if key not in hints:
        names = ", ".join(f"{prefix}{k}" for k in hints)
        raise ErasureError(f'there is no setting "{prefix}{key}": choose from {names}.')
    wanted = hints[key]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ErasureError(f"{prefix}{key} must be float, and a number that long is too large: mend the value.") from error
    if wanted in (int, float, bool, str):
        if type(value) is not wanted:
            raise ErasureError(f"{prefix}{key} must be {wanted.__name__}, not {told(value)}: mend the value.")
        return value
    if _are_words(value):
        return tuple(value)
    raise ErasureError(f"{prefix}{key} must be a list of words, not {told(value)}: mend the value.")
