"""The configuration file: read, checked as a whole, turned into the rooms' frozen dataclasses.

Every refusal names the key, the value, what is allowed and the nearest valid key, and comes before
Ray starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qvl_batch.errors import ConfigError
from qvl_batch.recipe import (
    DEFAULT_INSTRUCTION,
    DocumentBudget,
    ImageBudget,
    Recipe,
    Segmentation,
    VideoBudget,
)
from qvl_batch.storage import Storage

DEFAULT_QUERY_INSTRUCTION = "Retrieve images, pages, videos or texts relevant to the user's query."


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputSection(_Section):
    manifest: str = Field(min_length=1, description="Parquet manifest: a path or an s3:// address")
    limit: int | None = Field(None, ge=1, description="Take only the first N units that are left")


class OutputSection(_Section):
    root: str = Field(min_length=1, description="LanceDB directory: a path or an s3:// address")
    collection: str = Field("media", min_length=1, description="Tables of one recipe")
    partition_by: list[str] | None = Field(
        None, description="Manifest columns that select a table; null: as the manifest states"
    )
    mode: Literal["append"] = Field("append", description="append: skip done units, add the rest")


class ModelSection(_Section):
    path: str = Field(min_length=1, description="Local folder, hub id, or s3:// folder")
    revision: str | None = Field(None, description="Hub revision (a commit is best)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    query_instruction: str = Field(
        DEFAULT_QUERY_INSTRUCTION, description="Stored for search; does not change the vectors"
    )
    check: bool = Field(
        True, description="Compare this installation with stored vectors before anything is written"
    )


class ImageSection(_Section):
    min_px: int = Field(ImageBudget.min_px, description="Of a picture; smaller ones are enlarged")
    max_px: int = Field(ImageBudget.max_px, description="Of a picture; larger ones are shrunk")


class VideoSection(_Section):
    fps: float = Field(VideoBudget.fps, description="Frames taken a second, at least 4 in all")
    max_frames: int = Field(VideoBudget.max_frames, description="Frames taken at the most")
    min_px: int = Field(VideoBudget.min_px, description="Of one frame")
    max_px: int = Field(VideoBudget.max_px, description="Of one frame")
    total_px: int = Field(VideoBudget.total_px, description="Of all frames of one video")


class DocumentSection(_Section):
    dpi: int = Field(DocumentBudget.dpi, description="A page is rendered at this, then resized")
    max_pages: int = Field(DocumentBudget.max_pages, description="Longer documents fail")
    min_px: int = Field(DocumentBudget.min_px, description="Of one page")
    max_px: int = Field(DocumentBudget.max_px, description="Of one page")


class SegmentationSection(_Section):
    video_s: float | None = Field(None, description="Seconds a segment; null: one row a video")


class RecipeSection(_Section):
    instruction: str = Field(DEFAULT_INSTRUCTION, description="System turn of every document")
    max_tokens: int = Field(8192, description="Context of one prompt")
    token_layout: Literal["unnested", "nested"] = Field(
        "unnested", description="Vision markers of a video; unnested: as the weights were released"
    )
    dim: int | None = Field(None, description="Matryoshka dimension; null: the model's own")
    encodings: list[Literal["float32", "float16", "int8", "binary"]] = Field(
        ["binary", "int8"], description="How a vector is stored"
    )
    image: ImageSection = ImageSection()
    video: VideoSection = VideoSection()
    document: DocumentSection = DocumentSection()
    segmentation: SegmentationSection = SegmentationSection()


class DecodePool(_Section):
    actors: int | None = Field(None, ge=1, description="null: the CPUs that are left")
    cpus: float = Field(1.0, gt=0, description="CPUs of one actor")


class EmbedPool(_Section):
    actors: int | None = Field(None, ge=1, description="null: one a GPU; without GPUs, one")
    cpus: float = Field(1.0, gt=0, description="CPUs of one actor")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of one actor; null: 1 if there are any"
    )
    batch_tokens: int | Literal["auto"] = Field(
        "auto", description="Tokens of one packed pass (256 or more); auto: from the free memory"
    )

    @field_validator("batch_tokens")
    @classmethod
    def _enough(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 256:
            raise ValueError("Input should be 256 or more")
        return value


class WritePool(_Section):
    tasks: int | None = Field(None, ge=1, description="Writes at a time; null: from the cluster")


class PoolsSection(_Section):
    decode: DecodePool = DecodePool()
    embed: EmbedPool = EmbedPool()
    write: WritePool = WritePool()
    units_per_block: int | None = Field(
        None, ge=1, description="null: by kind, so that a block stays under block_bytes"
    )
    block_bytes: int = Field(
        128 * 2**20, ge=2**20, description="Decoded pixels of one block at the most"
    )
    address: str | None = Field(
        None, description="Ray address; null: RAY_ADDRESS, else a local Ray is started"
    )


class CommitSection(_Section):
    interval_s: float = Field(60.0, gt=0, description="A kill loses at most this much work")
    fragment_bytes: int = Field(8 * 2**20, ge=2**16, description="Write a fragment at this size")


class LimitsSection(_Section):
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="A run with a larger share of failed units ends"
    )
    failure_rate_after_units: int = Field(
        100, ge=1, description="Units to finish before the failure rate counts"
    )
    max_attempts: int = Field(3, ge=1, description="Runs that may retry a passing failure")
    decode_timeout_s: float = Field(120.0, gt=0, description="Decoding of one unit")
    decode_memory_bytes: int = Field(2 * 2**30, ge=2**28, description="Of one decoding process")
    max_object_bytes: int = Field(4 * 2**30, ge=1, description="Larger objects fail")
    max_image_px: int = Field(178_956_970, ge=1, description="Larger pictures fail (bombs)")
    max_text_bytes: int = Field(2**20, ge=1, description="Larger text files fail")
    fetch_timeout_s: float = Field(120.0, gt=0, description="One read from an object store")
    stop_grace_s: float = Field(30.0, ge=0, description="After SIGTERM, for blocks in flight")


class StorageSection(_Section):
    endpoint_url: str | None = Field(None, description="S3 endpoint other than Amazon's")
    region: str | None = Field(None, description="S3 region")
    anonymous: bool = Field(False, description="Read public buckets without credentials")

    def to_storage(self) -> Storage:
        return Storage.of(
            endpoint_url=self.endpoint_url, region=self.region, anonymous=self.anonymous
        )


class EmbedConfig(_Section):
    """The whole file of the embed job."""

    input: InputSection
    output: OutputSection
    model: ModelSection
    recipe: RecipeSection = RecipeSection()
    pools: PoolsSection = PoolsSection()
    commit: CommitSection = CommitSection()
    limits: LimitsSection = LimitsSection()
    storage: StorageSection = StorageSection()

    def build_recipe(self, model_digest: str, model_dim: int) -> Recipe:
        """Return the recipe of this configuration for a checkpoint of this digest and width.

        Raises:
            ConfigError: If a value or a combination is not allowed.
        """
        section = self.recipe
        dim = section.dim if section.dim is not None else model_dim
        if dim > model_dim:
            raise ConfigError(
                f"recipe.dim is {dim}, but the model gives {model_dim} dimensions.",
                f"Set recipe.dim to {model_dim} or less.",
            )
        return Recipe(
            model_digest=model_digest,
            dim=dim,
            encodings=tuple(section.encodings),
            instruction=section.instruction,
            max_tokens=section.max_tokens,
            token_layout=section.token_layout,
            image=ImageBudget(**section.image.model_dump()),
            video=VideoBudget(**section.video.model_dump()),
            document=DocumentBudget(**section.document.model_dump()),
            segmentation=Segmentation(**section.segmentation.model_dump()),
        )


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


def parse_config(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> EmbedConfig:
    """Check plain values, as read from YAML, with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: Naming every key that is unknown, missing, of a wrong type or out of range.
    """
    merged = yaml.safe_load(yaml.safe_dump(dict(values)))
    for text in overrides:
        _apply(merged, *parse_override(text))
    try:
        config = EmbedConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, EmbedConfig)) from None
    config.storage.to_storage()
    # A width that no model reaches stands for the checkpoint that is not read yet.
    config.build_recipe("", model_dim=config.recipe.dim or 2**20)
    return config


def load_config(path: str, overrides: Iterable[str] = ()) -> EmbedConfig:
    """Read a YAML file and check it.

    Raises:
        ConfigError: If the file can not be read, is no YAML mapping, or does not check.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"The configuration {path} can not be read: {reason}.",
            "`qvl-batch init` writes a commented one.",
        ) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}.", "Mend that line.") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds no sections.", "`qvl-batch init` writes a commented configuration."
        )
    return parse_config(values, overrides)


def _yaml_lines(model: type[BaseModel], given: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [f"{indent}{name}:", *_yaml_lines(kind, given.get(name, {}), indent + "  ")]
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


def commented_yaml(given: Mapping[str, Any]) -> str:
    """Return a configuration file with every key, its default and what it means."""
    head = [
        "# Configuration of `qvl-batch embed`. Override any key with --set section.key=value.",
        "# Credentials are never written here: they come from the standard chain (environment,",
        "# shared credentials file, instance or workload identity).",
    ]
    return "\n".join([*head, *_yaml_lines(EmbedConfig, given, "")]) + "\n"
