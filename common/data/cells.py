"""Turns the cells of a data set into texts, without rounding, and refuses cells that are not a text or a number."""

from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import polars as pl

SHORT_FLOATS = (pl.Float16, pl.Float32)
MOST_DIGITS = 400
"""The most digits of a decimal before or after the point: more than any double has."""


def rows_of(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame. A 16- or 32-bit float becomes the shortest decimal that rounds to it: 1.1 stays 1.1."""
    rows = frame.to_dicts()
    for name, dtype in frame.schema.items():
        if _holds_short_floats(dtype):
            for row in rows:
                row[name] = _widened(row[name], dtype)
    return rows


def _holds_short_floats(dtype: Any) -> bool:
    if isinstance(dtype, pl.List | pl.Array):
        return _holds_short_floats(dtype.inner)
    if isinstance(dtype, pl.Struct):
        return any(_holds_short_floats(inner) for inner in dtype.to_schema().values())
    return dtype in SHORT_FLOATS


def _widened(value: Any, dtype: Any) -> Any:
    if value is None:
        return None
    if isinstance(dtype, pl.List | pl.Array):
        return [_widened(each, dtype.inner) for each in value]
    if isinstance(dtype, pl.Struct):
        return {name: _widened(value[name], inner) for name, inner in dtype.to_schema().items()}
    if dtype not in SHORT_FLOATS:
        return value
    own: type[np.floating[Any]] = np.float32 if dtype == pl.Float32 else np.float16
    return float(str(own(value)))


def number_of(literal: str) -> float | Decimal:
    """A number in a JSON file: a float, or a decimal if a float cannot hold all of its digits.

    Raises ValueError for an exponent that no decimal can have.
    """
    number = float(literal)
    try:
        exact = Decimal(literal)
    except InvalidOperation as error:
        raise ValueError(f"the number {literal[:40]} is out of range") from error
    return number if Decimal(repr(number)) == exact else exact


def text_of(value: Any) -> str:
    """The text of a cell: a text itself, or a number without an exponent.

    Raises TypeError or ValueError for any other cell; the message says what the cell is. A boolean is refused too,
    because a completion could spell it in several ways.
    """
    if value is None:
        raise ValueError("is missing")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds half of a UTF-16 pair, which no file can store")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(f"is a {type(value).__name__}, not a text or a number")
    if isinstance(value, int):
        return str(value)
    if not Decimal(value).is_finite():
        raise ValueError(f"is {value}, not a number")
    if isinstance(value, float):
        return np.format_float_positional(value, trim="0")
    if abs(value.adjusted()) > MOST_DIGITS:
        raise ValueError(f"is {value}, which is out of range")
    return format(value, "f")
