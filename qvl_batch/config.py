"""The configuration of the embed job, checked as a whole before Ray starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from qvl_batch.errors import ConfigError
from qvl_batch.recipe import (
    DEFAULT_INSTRUCTION,
    DocumentBudget,
    ImageBudget,
    Recipe,
    Segmentation,
    VideoBudget,
)
from qvl_batch.settings import Section, check, read_sections, yaml_lines
from qvl_batch.storage import Storage

# Stands in every written configuration.
CREDENTIALS_NOTE = (
    "# Credentials are never written here: they come from the standard chain (environment,",
    "# shared credentials file, instance or workload identity).",
)

DEFAULT_QUERY_INSTRUCTION = "Retrieve images, pages, videos or texts relevant to the user's query."


class InputSection(Section):
    manifest: str = Field(min_length=1, description="Parquet manifest: a path or an s3:// address")
    limit: int | None = Field(None, ge=1, description="Take only the first N units that are left")


class OutputSection(Section):
    root: str = Field(min_length=1, description="LanceDB directory: a path or an s3:// address")
    collection: str = Field("media", min_length=1, description="Tables of one recipe")
    partition_by: list[str] | None = Field(
        None, description="Manifest columns that select a table; null: as the manifest states"
    )
    mode: Literal["append", "upsert", "replace"] = Field(
        "append",
        description="append: skip done units, add the rest; upsert: so, and changed media replace "
        "their old rows; replace: a partition's whole content is made anew and published at once",
    )


class ModelSection(Section):
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


class ImageSection(Section):
    min_px: int = Field(ImageBudget.min_px, description="Of a picture; smaller ones are enlarged")
    max_px: int = Field(ImageBudget.max_px, description="Of a picture; larger ones are shrunk")


class VideoSection(Section):
    fps: float = Field(VideoBudget.fps, description="Frames taken a second, at least 4 in all")
    max_frames: int = Field(VideoBudget.max_frames, description="Frames taken at the most")
    min_px: int = Field(VideoBudget.min_px, description="Of one frame")
    max_px: int = Field(VideoBudget.max_px, description="Of one frame")
    total_px: int = Field(VideoBudget.total_px, description="Of all frames of one video")


class DocumentSection(Section):
    dpi: int = Field(DocumentBudget.dpi, description="A page is rendered at this, then resized")
    max_pages: int = Field(DocumentBudget.max_pages, description="Longer documents fail")
    min_px: int = Field(DocumentBudget.min_px, description="Of one page")
    max_px: int = Field(DocumentBudget.max_px, description="Of one page")


class SegmentationSection(Section):
    video_s: float | None = Field(None, description="Seconds a segment; null: one row a video")


class RecipeSection(Section):
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


class DecodePool(Section):
    actors: int | None = Field(None, ge=1, description="null: the CPUs that are left")
    cpus: float = Field(1.0, gt=0, description="CPUs of one actor")


class EmbedPool(Section):
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


class WritePool(Section):
    tasks: int | None = Field(None, ge=1, description="Writes at a time; null: from the cluster")


class PoolsSection(Section):
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


class CommitSection(Section):
    interval_s: float = Field(60.0, gt=0, description="A kill loses at most this much work")
    lease_ttl_s: float = Field(
        60.0, ge=5, description="A run that was silent for so long may be taken over"
    )
    fragment_bytes: int = Field(8 * 2**20, ge=2**16, description="Write a fragment at this size")


class LimitsSection(Section):
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="A run with a larger share of failed units ends"
    )
    failure_rate_after_units: int = Field(
        100, ge=1, description="Units to finish before the failure rate counts"
    )
    max_attempts: int = Field(3, ge=1, description="Runs that may retry a passing failure")
    max_worker_deaths: int = Field(
        3, ge=2, description="Workers that may die on a unit before it counts as failed"
    )
    no_progress_s: float = Field(
        1800.0, gt=0, description="A run that delivers nothing for so long ends"
    )
    decode_timeout_s: float = Field(120.0, gt=0, description="Decoding of one unit")
    decode_memory_bytes: int = Field(2 * 2**30, ge=2**28, description="Of one decoding process")
    max_object_bytes: int = Field(4 * 2**30, ge=1, description="Larger objects fail")
    max_image_px: int = Field(178_956_970, ge=1, description="Larger pictures fail (bombs)")
    max_text_bytes: int = Field(2**20, ge=1, description="Larger text files fail")
    fetch_timeout_s: float = Field(120.0, gt=0, description="One read from an object store")
    stop_grace_s: float = Field(30.0, ge=0, description="After SIGTERM, for blocks in flight")


class StorageSection(Section):
    endpoint_url: str | None = Field(None, description="S3 endpoint other than Amazon's")
    region: str | None = Field(None, description="S3 region")
    anonymous: bool = Field(False, description="Read public buckets without credentials")

    def to_storage(self) -> Storage:
        return Storage.of(
            endpoint_url=self.endpoint_url, region=self.region, anonymous=self.anonymous
        )


class EmbedConfig(Section):
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


def parse_config(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> EmbedConfig:
    """Check plain values, as read from YAML, with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: Naming every key that is unknown, missing, of a wrong type or out of range.
    """
    config = check(EmbedConfig, values, overrides)
    config.storage.to_storage()
    # A width that no model reaches stands for the checkpoint that is not read yet.
    config.build_recipe("", model_dim=config.recipe.dim or 2**20)
    return config


def load_config(path: str, overrides: Iterable[str] = ()) -> EmbedConfig:
    """Read a YAML file and check it.

    Raises:
        ConfigError: If the file can not be read, is no YAML mapping, or does not check.
    """
    return parse_config(read_sections(path, "qvl-batch init"), overrides)


def commented_yaml(given: Mapping[str, Any]) -> str:
    """Return a configuration file with every key, its default and what it means."""
    head = [
        "# Configuration of `qvl-batch embed`. Override any key with --set section.key=value.",
        *CREDENTIALS_NOTE,
    ]
    return "\n".join([*head, *yaml_lines(EmbedConfig, given)]) + "\n"
