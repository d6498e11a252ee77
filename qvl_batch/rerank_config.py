"""The configuration of the rerank job, checked as a whole before Ray starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from qvl_batch.config import (
    CREDENTIALS_NOTE,
    DEFAULT_QUERY_INSTRUCTION,
    CommitSection,
    DecodePool,
    DocumentSection,
    ImageSection,
    LimitsSection,
    StorageSection,
    VideoSection,
    WritePool,
)
from qvl_batch.recipe import DocumentBudget, ImageBudget, RerankRecipe, Segmentation, VideoBudget
from qvl_batch.settings import Section, check, read_sections, yaml_lines


class RerankInput(Section):
    queries: str = Field(
        min_length=1,
        description="JSONL, CSV or Parquet with text, image or video (addresses), or a table; "
        "query_id is optional",
    )
    candidates: str | None = Field(
        None, description="Parquet with query_id and row_id: these pairs instead of a search"
    )
    relevance: str | None = Field(
        None, description="Labels: query_id, relevance, and row_id, media_id or uri"
    )
    relevant_from: float = Field(
        1.0, gt=0, description="The least label that is relevant to MRR and recall"
    )
    limit: int | None = Field(None, ge=1, description="Take only the first N queries")


class SearchSection(Section):
    root: str = Field(min_length=1, description="LanceDB directory that is searched")
    collection: str = Field("media", min_length=1, description="Collection or alias")
    where: list[str] = Field(
        [], description="Filters such as kind=image or dt>=2026-01-01; all of them hold"
    )
    top_k: int = Field(100, ge=1, le=10_000, description="Candidates of a query")
    rescore: bool = Field(
        True, description="false: rank by the sign bits alone, where there are any"
    )
    model: str | None = Field(None, description="Embedding model; null: as the tables state")
    revision: str | None = Field(None, description="Its hub revision; null: as the tables state")
    query_instruction: str | None = Field(
        None, description=f"null: as the tables state (default: {DEFAULT_QUERY_INSTRUCTION})"
    )


class ScoresSection(Section):
    root: str | None = Field(None, description="LanceDB directory; null: the one searched")
    collection: str = Field("scores", min_length=1, description="Name of the scores tables")
    partition_by: list[str] = Field([], description="Columns of the queries that select a table")


class RerankerSection(Section):
    path: str = Field(min_length=1, description="Local folder, hub id, or s3:// folder")
    revision: str | None = Field(None, description="Hub revision (a commit is best)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    instruction: str | None = Field(
        None, description="What counts as relevant; null: the official default"
    )
    max_tokens: int = Field(10_240, description="Context of one pair")
    token_layout: Literal["unnested", "nested"] = Field(
        "unnested", description="Vision markers of a video; unnested: as the weights were released"
    )
    image: ImageSection = ImageSection()
    video: VideoSection = VideoSection()
    document: DocumentSection = DocumentSection()


class GpuPool(Section):
    actors: int | None = Field(None, ge=1, description="null: one a GPU; without GPUs, one")
    cpus: float = Field(1.0, gt=0, description="CPUs of one actor")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of one actor; null: 1 if there are any"
    )
    batch_tokens: int | Literal["auto"] = Field(
        "auto", description="Tokens of one packed pass; auto: from the free memory"
    )


class RerankPools(Section):
    decode: DecodePool = DecodePool()
    rerank: GpuPool = GpuPool()
    write: WritePool = WritePool()
    queries_per_wave: int = Field(
        20_000,
        ge=1,
        description="Queries whose candidates are scored together: a medium is fetched once a wave",
    )
    media_per_block: int = Field(16, ge=1, description="Media of one block, with all their pairs")
    address: str | None = Field(
        None, description="Ray address; null: RAY_ADDRESS, else a local Ray is started"
    )


class RerankConfig(Section):
    """The whole file of the rerank job."""

    input: RerankInput
    search: SearchSection
    output: ScoresSection = ScoresSection()
    model: RerankerSection
    pools: RerankPools = RerankPools()
    commit: CommitSection = CommitSection()
    limits: LimitsSection = LimitsSection()
    storage: StorageSection = StorageSection()

    def build_recipe(
        self, model_digest: str, instruction: str, segmentation: Segmentation
    ) -> RerankRecipe:
        """Return what makes the scores.

        Args:
            model_digest: Of the reranker's weights.
            instruction: The one in use; the configuration's, or the official default.
            segmentation: Of the collection searched: its rows are what is scored.

        Raises:
            ConfigError: If a value or a combination is not allowed.
        """
        section = self.model
        return RerankRecipe(
            model_digest=model_digest,
            instruction=instruction,
            max_tokens=section.max_tokens,
            token_layout=section.token_layout,
            image=ImageBudget(**section.image.model_dump()),
            video=VideoBudget(**section.video.model_dump()),
            document=DocumentBudget(**section.document.model_dump()),
            segmentation=segmentation,
        )


def parse_rerank_config(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> RerankConfig:
    """Check plain values, as read from YAML, with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: Naming every key that is unknown, missing, of a wrong type or out of range.
    """
    config = check(RerankConfig, values, overrides)
    config.storage.to_storage()
    config.build_recipe("", "", Segmentation())
    return config


def load_rerank_config(path: str, overrides: Iterable[str] = ()) -> RerankConfig:
    """Read a YAML file and check it.

    Raises:
        ConfigError: If the file can not be read, is no YAML mapping, or does not check.
    """
    return parse_rerank_config(read_sections(path, "qvl-batch init --job rerank"), overrides)


def commented_rerank_yaml(given: Mapping[str, Any]) -> str:
    """Return a configuration file with every key, its default and what it means."""
    head = [
        "# Configuration of `qvl-batch rerank`. Override any key with --set section.key=value.",
        *CREDENTIALS_NOTE,
    ]
    return "\n".join([*head, *yaml_lines(RerankConfig, given)]) + "\n"
