"""A setting's type and range, written once, beside its field: what dataclasses check, and what hosts' inputs are made from.

@dataclass(frozen=True)
class Config:
    steps: int = number(200, 1, 1_000_000)
    mask: str = choice("attention", ("attention", "none"))

    def __post_init__(self) -> None:
        check_settings(self)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from .errors import ErasureError
from .phrases import holds_one_phrase, shown, template_of, told

#: what torch takes
SEEDS = (-(2**63), 2**64 - 1)


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, both included; ``step`` is a host's, for its arrows."""

    low: float
    high: float
    step: float = 1

    def __str__(self) -> str:
        return f"between {_bound(self.low)} and {_bound(self.high)}"


def number(default: Any, low: float, high: float, step: float | None = None) -> Any:
    """The field of an int or a float within a range. None as its default: it may be left open."""
    own = step if step is not None else 1 if isinstance(low, int) and isinstance(high, int) and isinstance(default, int) else 0.01
    return field(default=default, metadata={"range": Range(low, high, own)})


def seed(default: int = 0) -> Any:
    """The field of a random seed."""
    return number(default, *SEEDS)


def choice(default: str | None, options: Sequence[str]) -> Any:
    """The field of one of a few words."""
    return field(default=default, metadata={"options": tuple(options)})


def layers(default: tuple[str, ...]) -> Any:
    """The field of ends of projections' names."""
    return field(default=default, metadata={"layers": True})


def prompts(default: tuple[str, ...]) -> Any:
    """The field of templates, each with {} where the phrase goes."""
    return field(default=default, metadata={"templates": True})


def range_of(config: type, name: str) -> Range:
    """The range of a field."""
    return next(f for f in fields(config) if f.name == name).metadata["range"]


def check_settings(config: Any) -> None:
    """Checks a dataclass's fields by what is written beside them; whole numbers become floats where floats are wanted.

    Raises:
        ErasureError: a value of another type, or out of its range; the sentence names the field and the range.
    """
    kinds = _kinds(type(config))  # type: ignore[arg-type]
    for f in fields(config):
        value, kind = getattr(config, f.name), kinds[f.name]
        if value is None and f.default is None:
            continue
        found = _typed(f.name, value, kind)
        if "range" in f.metadata:
            require(f.name, found, f.metadata["range"])
        if "options" in f.metadata and found not in f.metadata["options"]:
            raise ErasureError(f'{f.name} is "{shown(str(found))}": choose one of {", ".join(f.metadata["options"])}.')
        if "layers" in f.metadata and not found:
            raise ErasureError(f"{f.name} is empty: name at least one projection, such as attn2.to_v.")
        if "templates" in f.metadata:
            found = _templates(f.name, found)
        if found is not value:
            object.__setattr__(config, f.name, found)


def require(name: str, value: float, bounds: Range) -> None:
    """Raises ErasureError, with the range in its sentence, for a number outside of it; NaN is outside of any."""
    if not bounds.low <= value <= bounds.high:
        raise ErasureError(f"{name} is {told(value)}: it must lie {bounds}.")


def _templates(name: str, given: tuple[str, ...]) -> tuple[str, ...]:
    wrong = next((text for text in given if not holds_one_phrase(text)), None)
    if wrong is not None or not given:
        why = f'which "{shown(wrong)}" does not' if wrong is not None else "and there must be one at least"
        raise ErasureError(f"each of {name} must hold {{}} once, where the phrase goes, {why}.")
    return tuple(map(template_of, given))


@cache
def _kinds(config: type) -> dict[str, type | None]:
    """int, float, bool, str or tuple by a field's name; None for what is none of these."""
    found: dict[str, type | None] = {}
    for name, hint in get_type_hints(config).items():
        plain = [k for k in get_args(hint) if k is not type(None)] if type(None) in get_args(hint) else [hint]
        kind = getattr(plain[0], "__origin__", plain[0])
        words = get_args(plain[0]) == (str, ...)
        found[name] = kind if kind in (int, float, bool, str) or words else None
    return found


def _typed(name: str, value: Any, kind: type | None) -> Any:
    if kind is None:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ErasureError(f"{name} is {told(value)}, which is too large: mend the value.") from error
    if kind is tuple:
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return value if isinstance(value, tuple) else tuple(value)
        raise ErasureError(f"{name} must be a list of words, not {told(value)}: mend the value.")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ErasureError(f"{name} must be {kind.__name__}, not {told(value)}: mend the value.")
    return value


def _bound(value: float) -> str:
    powers = {SEEDS[0]: "-2^63", SEEDS[1]: "2^64 - 1"}
    return powers.get(value) or (str(value) if isinstance(value, int) else f"{value:g}")  # type: ignore[call-overload]
