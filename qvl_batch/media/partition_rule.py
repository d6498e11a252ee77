"""Where the partition values of a unit come from: its path, a pattern, its list, or its date."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import unquote

from qvl_batch.errors import ConfigError
from qvl_batch.schema import RESERVED

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
DATE_COLUMN = "dt"
DATE_FORMATS = ("%Y-%m-%d", "%Y-%m", "%Y")

_HIVE_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)
_ALLOWED = "hive, none, mtime, mtime:%Y-%m, column:NAME[,NAME], or regex:PATTERN with named groups"

How = Literal["hive", "none", "mtime", "column", "regex"]


@dataclass(frozen=True, kw_only=True)
class PartitionRule:
    """How a unit gets its partition values; a value is a string, or None where there is none.

    Args:
        how: ``hive`` takes every ``key=value`` folder of the path; ``regex`` the named groups of
            ``pattern`` searched in the uri; ``column`` the columns of the list; ``mtime`` the UTC
            date of the last change, as column ``dt``.
        columns: The columns of ``column``, outermost first.
        pattern: The regular expression of ``regex``.
        date_format: One of `DATE_FORMATS`.

    Raises:
        ConfigError: If a part of the rule makes no sense, or a partition column would take a name
            that the tables need themselves.
    """

    how: How
    columns: tuple[str, ...] = ()
    pattern: str = ""
    date_format: str = DATE_FORMATS[0]

    def __post_init__(self) -> None:
        if self.how == "column" and (not self.columns or "" in self.columns):
            raise ConfigError("--partition-by column: names no column.", f"Allowed: {_ALLOWED}.")
        if len(set(self.columns)) < len(self.columns):
            raise ConfigError(
                f"--partition-by column:{','.join(self.columns)} names a column twice.",
                "Name each once.",
            )
        if self.how == "regex":
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise ConfigError(
                    f"--partition-by regex:{self.pattern} is no regular expression: {error}.",
                    r"An example: regex:/(?P<dt>\d{4}-\d\d-\d\d)/",
                ) from None
            if not groups:
                raise ConfigError(
                    f"--partition-by regex:{self.pattern} has no named group.",
                    "Name the parts that are partition values: (?P<dt>...).",
                )
        if self.date_format not in DATE_FORMATS:
            raise ConfigError(
                f"--partition-by mtime:{self.date_format} is no known date format.",
                f"Allowed: {', '.join(DATE_FORMATS)}.",
            )
        for key in self.keys:
            if key in RESERVED:
                raise ConfigError(
                    f"--partition-by would make a partition column {key!r}, "
                    "which the tables use themselves.",
                    "Give it another name.",
                )

    @property
    def keys(self) -> tuple[str, ...]:
        """The partition columns as far as the rule alone tells; none for ``hive``."""
        match self.how:
            case "mtime":
                return (DATE_COLUMN,)
            case "column":
                return self.columns
            case "regex":
                return tuple(re.compile(self.pattern).groupindex)
        return ()

    def from_place(self, uri: str | None, mtime: datetime | None) -> dict[str, str | None] | None:
        """Return the values that path and date tell; None if the pattern does not match.

        A rule by column has none to tell; an inline text (no uri) has no path.
        """
        match self.how:
            case "hive":
                return hive_values(uri or "")
            case "mtime":
                when = mtime.astimezone(UTC).strftime(self.date_format) if mtime else None
                return {DATE_COLUMN: when}
            case "regex":
                found = re.search(self.pattern, uri or "")
                return found.groupdict() if found else None
        return {}


def hive_values(uri: str) -> dict[str, str | None]:
    """Return the values of the ``key=value`` folders of a uri, outermost first.

    Both sides are percent-decoded, as Hive and Spark write them. The file's own name is not looked
    at; of a key that comes twice the innermost value holds.
    """
    values: dict[str, str | None] = {}
    for part in uri.split("/")[:-1]:
        found = _HIVE_PART.fullmatch(part)
        if found:
            value = unquote(found[2])
            values[unquote(found[1])] = None if value in ("", HIVE_NULL) else value
    return values


def parse_partition_rule(text: str) -> PartitionRule:
    r"""Read a rule as the command line has it.

    ``hive``, ``none``, ``mtime``, ``mtime:%Y-%m``, ``column:NAME[,NAME]`` or ``regex:PATTERN``.

    Raises:
        ConfigError: If the text is none of these, or the rule makes no sense.
    """
    how, colon, rest = text.partition(":")
    match how:
        case "hive" | "none" if not colon:
            return PartitionRule(how=how)
        case "mtime":
            return PartitionRule(how=how, date_format=rest if colon else DATE_FORMATS[0])
        case "column":
            return PartitionRule(how=how, columns=tuple(name.strip() for name in rest.split(",")))
        case "regex":
            return PartitionRule(how=how, pattern=rest)
    raise ConfigError(f"--partition-by {text} is not known.", f"Allowed: {_ALLOWED}.")
