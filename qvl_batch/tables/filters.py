"""Filters as Arrow expressions: a user's value is a typed literal, never a part of any SQL text."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ConfigError

Filter = pc.Expression

# Two characters before one, so that '>=' is not '>' and a value that starts with '='.
_OPERATORS = (">=", "<=", "!=", "=", ">", "<", "~")
_OPERATOR = re.compile("|".join(_OPERATORS))
_COMPARE: Mapping[str, Callable[[pc.Expression, pa.Scalar], pc.Expression]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NULL = "null"
_SHOWN = 80


def parse_filter(text: str, schema: pa.Schema) -> Filter:
    """Return the filter that a line such as ``kind=image,video`` stands for.

    ``=`` and ``!=`` take one value or several (any of them, none of them), parted by commas;
    ``null`` stands for no value. ``>= <= > <`` compare, ``~`` finds a text within a column of
    strings. What follows the operator is the value, to the end of the text and as the column's
    type reads it: quotes, brackets and semicolons are characters like any other, blanks around a
    value are dropped. Use an expression or a mapping for a value with commas, outer blanks or the
    text ``null``. ``!=`` keeps the rows without a value, the other operators drop them.

    Raises:
        ConfigError: If there is no operator, no such column, a column of another type than string,
            signed integer, float32, float64, bool, date32 or timestamp, or a value that is not of
            the column's type.
    """
    name, sign, value = _split(text, schema)
    field = _field(name, schema)
    if sign in ("=", "!="):
        values = [
            None if one.strip(" ") == _NULL else _read(field, one.strip(" "))
            for one in value.split(",")
        ]
        one_of = _one_of(field, values)
        return one_of if sign == "=" else _none_of(field, values)
    value = value.strip(" ")
    if sign == "~":
        if not _is_text(field.type):
            raise _refused(field, value, f"'~' searches text; compare with {' '.join(_COMPARE)}")
        return pc.match_substring(pc.field(name), _read(field, value).as_py())
    if pa.types.is_boolean(field.type):
        raise _refused(field, value, "a bool is compared by = and !=")
    return _COMPARE[sign](_column(field), _read(field, value))


def filter_of(
    where: Filter | Mapping[str, object] | Sequence[str] | str | None, schema: pa.Schema
) -> Filter | None:
    """Return any form of a filter as an expression; None lets every row pass.

    Args:
        where: An expression, which is returned as it is; a mapping of columns to the value they
            must equal, a list for one of several, None for no value; one or several lines for
            `parse_filter`. All of several must hold.

    Raises:
        ConfigError: As `parse_filter` says, or if it is none of these.
    """
    if where is None or isinstance(where, pc.Expression):
        return where
    if isinstance(where, str):
        return parse_filter(where, schema)
    if isinstance(where, Mapping):
        parts = [_equals(name, value, schema) for name, value in where.items()]
    elif isinstance(where, Sequence) and all(isinstance(line, str) for line in where):
        parts = [parse_filter(line, schema) for line in where]
    else:
        raise ConfigError(
            f"A filter is a {type(where).__name__}.",
            "Give lines such as 'kind=image', a mapping of columns to values, or an expression.",
        )
    return reduce(operator.and_, parts) if parts else None


def _split(text: str, schema: pa.Schema) -> tuple[str, str, str]:
    # The longest name that fits: a manifest's column may hold operators and blanks itself.
    for name in sorted(schema.names, key=len, reverse=True):
        if text.lstrip(" ").startswith(name):
            rest = text.lstrip(" ")[len(name) :].lstrip(" ")
            sign = _OPERATOR.match(rest)
            if sign:
                return name, sign[0], rest[sign.end() :]
    found = _OPERATOR.search(text)
    if found is None:
        raise ConfigError(
            f"The filter {_short(text)} has no operator.",
            f"Write column, operator, value, such as kind=image. Operators: {' '.join(_OPERATORS)}",
        )
    return text[: found.start()].strip(" "), found[0], text[found.end() :]


def _field(name: object, schema: pa.Schema) -> pa.Field:
    names = [field.name for field in schema if _can_filter(field.type)]
    if not isinstance(name, str) or name not in schema.names:
        raise ConfigError(
            f"A filter names the column {_short(name)}, which is not there.",
            f"Columns: {', '.join(names)}.",
        )
    if name not in names:
        raise ConfigError(
            f"A filter names the column {name}, which is of type {schema.field(name).type}.",
            "Filter by string, signed integer, float, bool, date32 or timestamp: "
            f"{', '.join(names)}.",
        )
    return schema.field(name)


def _equals(name: str, value: object, schema: pa.Schema) -> Filter:
    field = _field(name, schema)
    many = isinstance(value, Sequence | set | frozenset | np.ndarray) and not isinstance(value, str)
    return _one_of(field, [_literal(field, one) for one in (value if many else [value])])


def _one_of(field: pa.Field, values: Sequence[pa.Scalar | None]) -> Filter:
    column = _column(field)
    some = [value for value in values if value is not None]
    if not values:
        return pc.scalar(False)
    if not some:
        return column.is_null()
    one_of = column == some[0] if len(some) == 1 else column.isin(_array(some))
    return one_of if len(some) == len(values) else one_of | column.is_null()


def _none_of(field: pa.Field, values: Sequence[pa.Scalar | None]) -> Filter:
    column = _column(field)
    some = [value for value in values if value is not None]
    if not some:
        return column.is_valid()
    none_of = ~column.isin(_array(some)) & column.is_valid()
    return none_of if len(some) < len(values) else none_of | column.is_null()


def _array(values: Sequence[pa.Scalar]) -> pa.Array:
    return pa.array([value.as_py() for value in values], values[0].type)


def _column(field: pa.Field) -> Filter:
    """Return the column as it is compared: times in microseconds, others as they are."""
    kind = _compared(field.type)
    column = pc.field(field.name)
    return column if kind == field.type else column.cast(kind, safe=False)


def _compared(kind: pa.DataType) -> pa.DataType:
    # Substrait has no literal of another unit.
    return pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else kind


def _literal(field: pa.Field, value: object) -> pa.Scalar | None:
    """Return a Python value as a scalar of the column's exact type; text is read where it can be.

    Substrait, which carries the filter to Lance, knows no safe casts.
    """
    kind = field.type
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, str):
        return _read(field, value)
    is_bool = isinstance(value, bool)
    fits = (
        (is_bool and pa.types.is_boolean(kind))
        or (
            isinstance(value, int)
            and not is_bool
            and (_is_float(kind) or pa.types.is_integer(kind))
        )
        or (isinstance(value, float) and _is_float(kind))
        or (isinstance(value, datetime) and pa.types.is_timestamp(kind))
        or (isinstance(value, date) and not isinstance(value, datetime) and pa.types.is_date(kind))
    )
    if not fits:
        raise _refused(field, value)
    if isinstance(value, datetime):
        return _read(field, value.isoformat())
    return _scalar(field, value)


def _read(field: pa.Field, text: str) -> pa.Scalar:
    """Return the text as a scalar of the column's type."""
    kind = field.type
    try:
        if pa.types.is_integer(kind) and _INTEGER.fullmatch(text):
            return _scalar(field, int(text))
        if _is_float(kind) and _FLOAT.fullmatch(text):
            return _scalar(field, float(text))
        if pa.types.is_boolean(kind) and text in ("true", "false"):
            return _scalar(field, text == "true")
        if pa.types.is_date(kind):
            return _scalar(field, date.fromisoformat(text))
        if pa.types.is_timestamp(kind):
            return _scalar(field, _time(text, kind))
    except ValueError as error:
        raise _refused(field, text) from error
    if not _is_text(kind):
        raise _refused(field, text)
    return _scalar(field, text)


def _time(text: str, kind: pa.TimestampType) -> datetime:
    time = datetime.fromisoformat(text)
    if kind.tz is None:
        if time.tzinfo is not None:
            raise ValueError("the column has no time zone")
        return time
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _scalar(field: pa.Field, value: object) -> pa.Scalar:
    try:
        scalar = pa.scalar(value, _compared(field.type))
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise _refused(field, value) from error
    # 1e999, or 1e300 in a column of float32.
    if _is_float(field.type) and not math.isfinite(scalar.as_py()):
        raise _refused(field, value)
    return scalar


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind)


def _is_float(kind: pa.DataType) -> bool:
    return pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _can_filter(kind: pa.DataType) -> bool:
    # What Substrait and Lance both know (14.0): not unsigned, float16 or large_string.
    return (
        _is_text(kind)
        or pa.types.is_signed_integer(kind)
        or _is_float(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_date32(kind)
        or pa.types.is_timestamp(kind)
    )


def _allowed(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return f"a whole number that {kind} holds, or null"
    if _is_float(kind):
        return f"a finite number that {kind} holds, or null"
    if pa.types.is_boolean(kind):
        return "true, false or null"
    if pa.types.is_date(kind):
        return "a date such as 2026-01-31, or null"
    if pa.types.is_timestamp(kind):
        zone = " (UTC unless it names another zone)" if kind.tz else " without a zone"
        return f"a time such as 2026-01-31T12:00:00{zone}, or null"
    return "text of valid Unicode"


def _refused(field: pa.Field, value: object, allowed: str = "") -> ConfigError:
    return ConfigError(
        f"A filter compares the column {field.name} ({field.type}) with {_short(value)}.",
        f"Allowed: {allowed or _allowed(field.type)}.",
    )


def _short(value: object) -> str:
    # An integer of 5,000 digits can not even be printed.
    try:
        text = ascii(value)
    except ValueError:
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
