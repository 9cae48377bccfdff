"""Values read from a file or given by a user, checked before anything is computed of them."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any

MAX_STEPS = 1000  # of a solver: more would be a damaged file


class _Short(reprlib.Repr):
    """``repr`` of anything in bounded time and length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**60 else f"a whole number of {x.bit_length()} bits"


shown = _Short().repr


def as_float(value: Any) -> float:
    """The value as a float; nan if it is no number that a float holds (``True`` and texts are none)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a float in [low, high].

    Raises:
        ValueError: no number, not finite, or out of range.
    """
    result = as_float(value)
    if not math.isfinite(result) or not low <= result <= high:
        raise ValueError(f"{name}={shown(value)} must be a finite number{_range(low, high)}.")
    return result


def whole(name: str, value: Any, low: int, high: int) -> int:
    """The value, a whole number in [low, high].

    Raises:
        ValueError: another type, ``True`` included, or out of range.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}={shown(value)} must be a whole number{_range(low, high)}.")
    return value


def one_of(what: str, name: str, names: Iterable[str]) -> None:
    """The name is one of these.

    Raises:
        ValueError: it is not; says what there is.
    """
    if name not in names:
        raise ValueError(f"{what}={name!r} is none of {', '.join(names)}.")


def identifier(name: str, value: Any) -> str:
    """The value, a text that can be part of a weight's name.

    Raises:
        ValueError: another type, empty, longer than 64, or other characters.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise ValueError(f"{name}={shown(value)} must be 1 to 64 letters, digits, '-' or '_'.")
    return value


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return "" if math.isinf(low) else f" of at least {low:g}"
    return f" from {low:g} to {high:g}"
