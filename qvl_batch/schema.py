"""The Arrow schema of every edge, written once.

manifest -> planned -> decoded -> embedded -> table rows | failures; and the catalog.

Columns that start with ``_`` live inside a run only and never reach a table. A manifest's further
columns travel under their own names and end in the tables as metadata.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from qvl_batch.recipe import Recipe

SCHEMA_VERSION = 1
UTC_TIME = pa.timestamp("us", tz="UTC")
PRIMARY_KEY = {b"lance-schema:unenforced-primary-key": b"true"}

MANIFEST = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("mtime", UTC_TIME),
        pa.field("text", pa.string()),
        pa.field("byte_offset", pa.int64()),
        pa.field("byte_length", pa.int64()),
        pa.field("instruction", pa.string()),
        pa.field("fps", pa.float64()),
        pa.field("max_frames", pa.int32()),
    ]
)

PLANNED = pa.schema(
    [
        *MANIFEST,
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("media_id", pa.string(), nullable=False),
        # Position in the plan: the driver keeps one bit a unit, whatever the ids weigh.
        pa.field("_ordinal", pa.int64(), nullable=False),
        pa.field("_table", pa.string(), nullable=False),
        # Attempts of earlier runs that ended in a retryable failure.
        pa.field("_attempt", pa.int32(), nullable=False),
    ]
)

FAILURE = pa.struct(
    [
        pa.field("stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("message", pa.string()),
        pa.field("retryable", pa.bool_()),
    ]
)

PART = pa.struct(
    [
        pa.field("segment", pa.int32()),
        pa.field("page", pa.int32()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("num_frames", pa.int32()),
        pa.field("seconds", pa.list_(pa.float64())),
        # large_binary: 46 parts at the full video budget overflow binary's 32-bit offsets.
        pa.field("pixels", pa.large_binary()),
    ]
)

ROW = pa.struct(
    [
        pa.field("segment", pa.int32()),
        pa.field("num_segments", pa.int32()),
        pa.field("page", pa.int32()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("num_frames", pa.int32()),
        pa.field("num_tokens", pa.int32()),
        pa.field("truncated", pa.bool_()),
        pa.field("vector", pa.binary()),
        pa.field("vector_int8", pa.binary()),
        pa.field("vector_scale", pa.float32()),
        pa.field("vector_bits", pa.binary()),
    ]
)

FAILURES = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("partition", pa.string(), nullable=False),
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("media_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error_type", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("failed_at", UTC_TIME, nullable=False),
    ],
    metadata={b"qvl.schema_version": str(SCHEMA_VERSION).encode()},
)

DATA_FILE = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("recomputed", pa.bool_()),
    ]
)

INDEX_STATE = pa.struct(
    [
        pa.field("column", pa.string()),
        pa.field("name", pa.string()),
        # Version of the table that the recall was measured on, and the rows indexed there.
        pa.field("version", pa.int64()),
        pa.field("num_rows", pa.int64()),
        pa.field("nprobes", pa.int32()),
        pa.field("shortlist", pa.int32()),
        # Share of the top k of an exhaustive scan of the same columns that the index finds.
        pa.field("recall", pa.float64()),
        pa.field("recall_k", pa.int32()),
        pa.field("num_queries", pa.int32()),
    ]
)

CATALOG = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("collection", pa.string(), nullable=False),
        # JSON object of the partition's keys and values, in partition_by order.
        pa.field("partition", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("num_units", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_failures", pa.int64(), nullable=False),
        pa.field("recipe_id", pa.string(), nullable=False),
        pa.field("recipe", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        # ``none``, or the indexes of the table as ``column:type`` joined by commas.
        pa.field("index_state", pa.string(), nullable=False),
        # The published index: search uses it with these settings, and not at all if they are null.
        pa.field("index", INDEX_STATE),
        pa.field("files", pa.list_(DATA_FILE), nullable=False),
        pa.field("updated_at", UTC_TIME, nullable=False),
    ],
    metadata={b"qvl.schema_version": str(SCHEMA_VERSION).encode()},
)

# Readers ask for an alias; one commit to this table makes it stand for another collection.
ALIASES = pa.schema(
    [
        pa.field("alias", pa.string(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("collection", pa.string(), nullable=False),
        pa.field("updated_at", UTC_TIME, nullable=False),
    ],
    metadata={b"qvl.schema_version": str(SCHEMA_VERSION).encode()},
)

# Queries of a rerank job. ``image`` and ``video`` are addresses; at least one of text, image and
# video is there. An ``instruction`` replaces that of both models for this query. Further columns
# may be partition columns of the scores.
QUERIES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("image", pa.string()),
        pa.field("video", pa.string()),
        pa.field("instruction", pa.string()),
    ]
)

# Where a row that was found lies, and what is needed to fetch its medium again.
FOUND_ROW = (
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("unit_id", pa.string(), nullable=False),
    pa.field("media_id", pa.string(), nullable=False),
    # The table that holds the row.
    pa.field("table", pa.string(), nullable=False),
    pa.field("uri", pa.string()),
    pa.field("etag", pa.string()),
    pa.field("byte_offset", pa.int64()),
    pa.field("byte_length", pa.int64()),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("segment", pa.int32(), nullable=False),
    pa.field("page", pa.int32()),
    pa.field("start_s", pa.float64()),
    pa.field("end_s", pa.float64()),
    pa.field("text", pa.string()),
)

# Names that a manifest's own columns may not take.
RESERVED = frozenset(PLANNED.names) | {
    "row_id",
    "segment",
    "num_segments",
    "page",
    "start_s",
    "end_s",
    "width_px",
    "height_px",
    "num_frames",
    "num_tokens",
    "truncated",
    "vector",
    "vector_int8",
    "vector_scale",
    "vector_bits",
    "run_id",
    "embedded_at",
}


# What a reranked medium took, in counts; sums over media are a run's.
WORK = pa.struct(
    [
        pa.field(name, pa.int64())
        for name in (
            "media_fetched",
            "media_decoded",
            "parts_decoded",
            "visions",
            "visions_encoded",
            "tokens",
            "prefix_tokens_saved",
        )
    ]
)

# What the reranker says of a pair: a score or a failure.
SCORE = pa.struct(
    [
        pa.field("rerank_score", pa.float32()),
        pa.field("num_tokens", pa.int32()),
        pa.field("truncated", pa.bool_()),
        pa.field("failure", FAILURE),
    ]
)


def found_pair(query_columns: Iterable[pa.Field]) -> pa.DataType:
    """Return the struct of a pair within a run: a candidate, its table, and its past attempts."""
    names = {"run_id", "made_at"}
    fields = [field for field in candidates(query_columns, {}) if field.name not in names]
    inside = [pa.field("_table", pa.string()), pa.field("_attempt", pa.int32())]
    return pa.struct([*(pa.field(field.name, field.type) for field in fields), *inside])


def decoded(planned: pa.Schema) -> pa.Schema:
    """Return the schema behind DecodeMedia: one row a unit, its parts or its failure."""
    return planned.append(pa.field("_parts", pa.list_(PART))).append(pa.field("_failure", FAILURE))


def embedded(planned: pa.Schema) -> pa.Schema:
    """Return the schema behind EmbedMedia: one row a unit, its encoded rows or its failure."""
    return planned.append(pa.field("_rows", pa.list_(ROW))).append(pa.field("_failure", FAILURE))


def vector_fields(recipe: Recipe) -> list[pa.Field]:
    """Return the vector columns of the recipe's encodings, in a fixed order."""
    fields = []
    if "float32" in recipe.encodings or "float16" in recipe.encodings:
        item = pa.float32() if "float32" in recipe.encodings else pa.float16()
        fields.append(pa.field("vector", pa.list_(item, recipe.dim), nullable=False))
    if "int8" in recipe.encodings:
        fields.append(pa.field("vector_int8", pa.list_(pa.int8(), recipe.dim), nullable=False))
        fields.append(pa.field("vector_scale", pa.float32(), nullable=False))
    if "binary" in recipe.encodings:
        bits = pa.list_(pa.uint8(), recipe.dim // 8)
        fields.append(pa.field("vector_bits", bits, nullable=False))
    return fields


def table_rows(
    recipe: Recipe, manifest_columns: Iterable[pa.Field], metadata: dict[str, str]
) -> pa.Schema:
    """Return the schema of a partition's table: one row a vector.

    Args:
        recipe: Stored in the schema metadata with its id, under ``qvl.recipe`` and
            ``qvl.recipe_id``.
        manifest_columns: The manifest's further columns, the partition columns among them.
        metadata: Further ``qvl.*`` entries (collection, partition, model path, versions).
    """
    stated = {
        "qvl.schema_version": str(SCHEMA_VERSION),
        "qvl.recipe": recipe.to_json(),
        "qvl.recipe_id": recipe.recipe_id,
    } | metadata
    return pa.schema(
        [
            pa.field("row_id", pa.string(), nullable=False, metadata=PRIMARY_KEY),
            pa.field("unit_id", pa.string(), nullable=False),
            pa.field("media_id", pa.string(), nullable=False),
            pa.field("uri", pa.string()),
            pa.field("etag", pa.string()),
            pa.field("byte_offset", pa.int64()),
            pa.field("byte_length", pa.int64()),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("segment", pa.int32(), nullable=False),
            pa.field("num_segments", pa.int32(), nullable=False),
            pa.field("page", pa.int32()),
            pa.field("start_s", pa.float64()),
            pa.field("end_s", pa.float64()),
            pa.field("width_px", pa.int32()),
            pa.field("height_px", pa.int32()),
            pa.field("num_frames", pa.int32()),
            pa.field("num_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            pa.field("text", pa.string()),
            *(pa.field(field.name, field.type) for field in manifest_columns),
            *vector_fields(recipe),
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("embedded_at", UTC_TIME, nullable=False),
        ],
        metadata={key.encode(): value.encode() for key, value in stated.items()},
    )


def candidates(query_columns: Iterable[pa.Field], metadata: dict[str, str]) -> pa.Schema:
    """Return the schema of a candidates table: one row a (query, row) pair.

    Args:
        query_columns: The queries' partition columns.
        metadata: ``qvl.*`` entries: collection, partition, the first stage's recipe and settings.
    """
    return _pairs(query_columns, metadata, [])


def scores(query_columns: Iterable[pa.Field], metadata: dict[str, str]) -> pa.Schema:
    """Return the schema of a scores table: a candidate with what the reranker says of it.

    ``rank_after`` (from 1, within the query) is null until every candidate of the query has its
    score or its failure; a failed pair has no row.
    """
    scored = [
        pa.field("rerank_score", pa.float32(), nullable=False),
        pa.field("rank_after", pa.int32()),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
    return _pairs(query_columns, metadata, scored)


def _pairs(
    query_columns: Iterable[pa.Field], metadata: dict[str, str], scored: list[pa.Field]
) -> pa.Schema:
    stated = {"qvl.schema_version": str(SCHEMA_VERSION)} | metadata
    return pa.schema(
        [
            pa.field("pair_id", pa.string(), nullable=False, metadata=PRIMARY_KEY),
            pa.field("query_id", pa.string(), nullable=False),
            # `units.query_id` of what it asks: tells a query that was changed under its id.
            pa.field("query_digest", pa.string(), nullable=False),
            *FOUND_ROW,
            pa.field("first_score", pa.float32()),
            # From 1, within the query.
            pa.field("rank_before", pa.int32(), nullable=False),
            *scored,
            *query_columns,
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("made_at", UTC_TIME, nullable=False),
        ],
        metadata={key.encode(): value.encode() for key, value in stated.items()},
    )
