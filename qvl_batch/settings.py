"""Configuration files of any job: read, merged with overrides, checked against a pydantic model.

Every refusal names the key, the value, what is allowed and the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qvl_batch.errors import ConfigError


class Section(BaseModel):
    """A part of a configuration: unknown keys and other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Checked = TypeVar("Checked", bound=Section)


def _valid_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _valid_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _nearest(key: str, model: type[BaseModel]) -> str:
    valid = _valid_keys(model)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    if not close:
        # The right name in the wrong section: compare the last part alone.
        last = {name.rpartition(".")[2]: name for name in valid}
        hits = difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=0.6)
        close = [last[hit] for hit in hits]
    if close:
        return f"Did you mean {close[0]}?"
    parent = key.rpartition(".")[0]
    siblings = [k for k in valid if k.rpartition(".")[0] == parent] or list(model.model_fields)
    return f"Valid keys there: {', '.join(siblings)}."


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    valid = set(_valid_keys(model))
    lines: list[str] = []
    allowed: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        key = ".".join(parts)
        if item["type"] == "extra_forbidden":
            lines.append(f"Unknown key {key}. {_nearest(key, model)}")
            continue
        if item["type"] == "missing":
            lines.append(f"Missing key {key}. Give it in the file or with --set {key}=VALUE.")
            continue
        # Behind the key stand the place in a list, or which alternative was tried.
        while parts and ".".join(parts) not in valid:
            parts.pop()
        stated = f"{'.'.join(parts)} is {item['input']!r}."
        wanted = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if item["type"] == "model_type":
            wanted = "a section with keys of its own"
        allowed.setdefault(stated, []).append(wanted)
    lines += [f"{stated} It should be {' or '.join(wanted)}." for stated, wanted in allowed.items()]
    return "\n".join(lines)


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value`` into its key parts and its YAML value.

    Raises:
        ConfigError: If there is no ``=``, an empty key part, or no YAML value.
    """
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {text!r} is not of the form a.b=value.", "")
    try:
        return parts, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value.", "Quote it.") from None


def _apply(values: dict[str, Any], parts: list[str], value: object) -> None:
    for depth, part in enumerate(parts[:-1]):
        nested = values.setdefault(part, {})
        if not isinstance(nested, dict):
            key = ".".join(parts[: depth + 1])
            raise ConfigError(f"{key} is {nested!r}, not a section.", "")
        values = nested
    values[parts[-1]] = value


def check(
    model: type[Checked], values: Mapping[str, Any], overrides: Iterable[str] = ()
) -> Checked:
    """Return plain values, with ``a.b=value`` overrides applied, as an instance of the model.

    Raises:
        ConfigError: Naming every key that is unknown, missing or of a wrong type.
    """
    merged = yaml.safe_load(yaml.safe_dump(dict(values)))
    for text in overrides:
        _apply(merged, *parse_override(text))
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, model)) from None


def read_sections(path: str, writer: str) -> dict[str, Any]:
    """Return the plain values of a YAML file.

    Args:
        path: Local path.
        writer: The command that writes such a file, for messages.

    Raises:
        ConfigError: If the file can not be read or is no YAML mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"The configuration {path} can not be read: {reason}.",
            f"`{writer}` writes a commented one.",
        ) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}.", "Mend that line.") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds no sections.", f"`{writer}` writes a commented configuration."
        )
    return values


def yaml_lines(model: type[BaseModel], given: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return a file's lines: every key with its given or default value and what it means."""
    lines = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [f"{indent}{name}:", *yaml_lines(kind, given.get(name, {}), indent + "  ")]
            continue
        default = None if field.is_required() else field.default
        value = given.get(name, default)
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
        text = text.removesuffix("...").strip()
        choices = get_args(kind) if getattr(kind, "__origin__", None) is Literal else ()
        notes = [field.description or "", f"one of {', '.join(choices)}" if choices else ""]
        note = "; ".join(part for part in notes if part)
        lines.append(f"{indent}{name}: {text}" + (f"  # {note}" if note else ""))
    return lines
