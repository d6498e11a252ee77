"""What plugs into LanceDB: an embedding function and two rerankers, without the models.

The classes that hold a model are made of these in `qvl_batch.api.lancedb_plugins`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.embeddings import EmbeddingFunction, get_registry
from lancedb.rerankers import Reranker
from pydantic import ConfigDict

from qvl_batch.config import DEFAULT_QUERY_INSTRUCTION
from qvl_batch.errors import InputError, UnitError
from qvl_batch.recipe import DEFAULT_INSTRUCTION, DocumentBudget, ImageBudget, VideoBudget
from qvl_batch.tables.embedding_metadata import FUNCTION_NAME, METADATA_KEY

RELEVANCE = "_relevance_score"
RESCORED = ("vector_int8", "vector_scale")
# What says where the medium of a row lies, and which part of it the row is.
FETCHED = (
    *("kind", "uri", "etag", "byte_offset", "byte_length"),
    *("segment", "page", "text"),
)


@runtime_checkable
class QueryEmbedder(Protocol):
    """Embeds queries."""

    def embed_query(self, query: Any) -> npt.NDArray[np.float32]:
        """Return the vector of a query, float32 ``(dim,)``, of norm 1."""
        ...


class ItemEmbedder(QueryEmbedder, Protocol):
    """Embeds queries and items."""

    def embed(self, items: Sequence[Any]) -> npt.NDArray[np.float32]:
        """Return the vectors of items, float32 ``(items, dim)``, of norm 1."""
        ...


class EmbeddingPlugin(EmbeddingFunction):
    """LanceDB's embedding function of a Qwen3-VL-Embedding checkpoint.

    A query is a text or any other item of `Embedder.embed`.

    Args:
        model: A local folder, a hub id, or an object-store folder.
        dim: Dimensions of the vectors.
        revision: A hub commit, tag or branch.
        digest: Of the weights; a checkpoint with another one is refused. None: not looked at.
        instruction: Of the rows, used when LanceDB embeds new ones.
        query_instruction: Of the queries.
        max_tokens: The context.
        token_layout: ``unnested`` or ``nested``.
        dtype: Of the computation.
        image, video, document: Fields of the budgets.
        binary: Give packed sign bits, uint8 ``(dim / 8,)``, for a Hamming search.
    """

    # A table of a later version may state more: better refused than left out of account.
    model_config = ConfigDict(extra="forbid")

    model: str
    dim: int
    revision: str | None = None
    digest: str | None = None
    instruction: str = DEFAULT_INSTRUCTION
    query_instruction: str = DEFAULT_QUERY_INSTRUCTION
    max_tokens: int = 8192
    token_layout: str = "unnested"
    dtype: str = "auto"
    image: dict[str, Any] = dataclasses.asdict(ImageBudget())
    video: dict[str, Any] = dataclasses.asdict(VideoBudget())
    document: dict[str, Any] = dataclasses.asdict(DocumentBudget())
    binary: bool = False

    @classmethod
    def create(cls, **given: Any) -> EmbeddingPlugin:
        """Return the function; tables made with it state every argument, defaults too."""
        made = super().create(**given)
        # LanceDB alone would state `given`, and a later default would change old tables' queries.
        made._original_args = made.settings() | given
        return made

    @classmethod
    def of(cls, table: Any) -> EmbeddingPlugin:
        """Return the function that an open LanceDB table states.

        Raises:
            InputError: If it states none of these.
        """
        function = stated_function(table.schema.metadata)
        if function is None:
            raise InputError(
                f"Table {table.name} states no {METADATA_KEY} of {FUNCTION_NAME}.",
                "Open a table of the embed job.",
            )
        return function

    def query_vector(self, query: Any) -> npt.NDArray[np.float32]:
        """Return a query's vector, float32 ``(dim,)``, of norm 1, also where bits are searched.

        Raises:
            InputError, UnitError: As `Embedder.embed_query`.
        """
        return np.asarray(self.embedder().embed_query(query), np.float32)

    def settings(self) -> dict[str, Any]:
        """Return all arguments by name."""
        return self.model_dump(exclude={"max_retries"})

    def embedder(self) -> ItemEmbedder:
        """Return what embeds; loaded once for equal settings.

        Raises:
            ModelError: If the checkpoint can not be used, or is not the stated one.
        """
        raise NotImplementedError

    def ndims(self) -> int:
        return self.dim // 8 if self.binary else self.dim

    def compute_query_embeddings(self, query: Any, *_: Any, **__: Any) -> list[npt.NDArray]:
        """Return the one vector of a query.

        Raises:
            InputError, UnitError: As `Embedder.embed_query`.
        """
        return [self._encoded(self.query_vector(query))]

    def compute_source_embeddings(self, items: Any, *_: Any, **__: Any) -> list[npt.NDArray]:
        """Return one vector an item: a str is a text, bytes are an image or a video.

        Raises:
            InputError, UnitError: As `Embedder.embed`.
        """
        vectors = self.embedder().embed(list(self.sanitize_input(items)))
        return [self._encoded(vector) for vector in vectors]

    # What a local model refuses it refuses again: LanceDB would wait a minute between tries and
    # hide the reason.
    def compute_query_embeddings_with_retry(self, *given: Any, **named: Any) -> list[npt.NDArray]:
        return self.compute_query_embeddings(*given, **named)

    def compute_source_embeddings_with_retry(self, *given: Any, **named: Any) -> list[npt.NDArray]:
        return self.compute_source_embeddings(*given, **named)

    def _encoded(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
        return np.packbits(vector > 0) if self.binary else vector

    def __hash__(self) -> int:
        # The inherited one fails on the budgets.
        return hash(self.model_dump_json())


Plugin = TypeVar("Plugin", bound=type[EmbeddingPlugin])


def register(plugin: Plugin) -> Plugin:
    """Let LanceDB find the function by the name that tables state."""
    return get_registry().register(FUNCTION_NAME)(plugin)


def stated_function(metadata: Mapping[bytes, bytes] | None) -> EmbeddingPlugin | None:
    """Return the function that a table's schema metadata names, if it is one of ours."""
    for stated in get_registry().parse_functions(metadata).values():
        if isinstance(stated.function, EmbeddingPlugin):
            return stated.function
    return None


class ScoringReranker(Reranker):
    """Orders what a search found by a score of each row, whatever kind of search it was.

    Rows without a score come last; ties keep the order of `row_id`, where it is selected.

    Args:
        return_score: ``relevance``: ``_relevance_score`` alone; ``all``: also ``_distance`` and
            ``_score`` of the search.
    """

    def scores(self, query: str, rows: pa.Table) -> pa.Array:
        """Return one float32 score a row, null where there is none."""
        raise NotImplementedError

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        return self._ranked(query, vector_results)

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        return self._ranked(query, fts_results)

    def rerank_hybrid(
        self, query: str, vector_results: pa.Table, fts_results: pa.Table
    ) -> pa.Table:
        return self._ranked(query, merge_results(vector_results, fts_results))

    def _ranked(self, query: Any, rows: pa.Table) -> pa.Table:
        # LanceDB hands full-text queries over as they were given.
        text = query if isinstance(query, str) else getattr(query, "query", str(query))
        found = self.scores(text, rows) if rows.num_rows else pa.array([], pa.float32())
        rows = rows.append_column(RELEVANCE, found)
        keys = [(RELEVANCE, "descending")]
        if "row_id" in rows.column_names:
            keys.append(("row_id", "ascending"))
        rows = rows.take(pc.sort_indices(rows, sort_keys=keys))
        return self._keep_relevance_score(rows)


def merge_results(by_vector: pa.Table, by_text: pa.Table) -> pa.Table:
    """Return each row of both searches once, with ``_distance`` and ``_score`` where it has them.

    Args:
        by_vector: Rows with ``_rowid`` and ``_distance``.
        by_text: Rows with ``_rowid`` and ``_score``.
    """
    if not by_vector.num_rows or not by_text.num_rows:
        return by_vector if by_vector.num_rows else by_text
    here, there = (table["_rowid"].combine_chunks() for table in (by_vector, by_text))
    score = by_text["_score"].combine_chunks().take(pc.index_in(here, value_set=there))
    alone = by_text.filter(pc.invert(pc.is_in(there, value_set=here)))
    both = by_vector.append_column("_score", score)
    return pa.concat_tables([both, alone], promote_options="default")


class Int8Rescorer(ScoringReranker):
    """Scores rows by ``vector_int8 * vector_scale`` times the query: a cosine.

    After a Hamming search this is the second tier that LanceDB itself does not have:
    ``table.search(text).limit(200).rerank(Int8Rescorer())``.

    Args:
        query: The query's vector, float ``(dim,)``; or an `Embedder`, which embeds the query text
            of the search; None: the table's own embedding function does.
        return_score: See `ScoringReranker`.
    """

    def __init__(
        self, query: npt.ArrayLike | QueryEmbedder | None = None, return_score: str = "relevance"
    ) -> None:
        super().__init__(return_score)
        self._embedder = query if query is None or isinstance(query, QueryEmbedder) else None
        self._vector = None
        if query is not None and self._embedder is None:
            self._vector = np.asarray(query, np.float32)
            if self._vector.ndim != 1 or not np.isfinite(self._vector).all():
                raise InputError(
                    f"The query has shape {self._vector.shape}.", "Give one finite float vector."
                )

    def scores(self, query: str, rows: pa.Table) -> pa.Array:
        """Return the cosines.

        Raises:
            InputError: If a column was not selected, the vector has another dimension, or nothing
                is there that could embed the query.
        """
        require_columns(rows, RESCORED, "Int8Rescorer")
        items = rows["vector_int8"].combine_chunks()
        values = items.flatten().to_numpy().reshape(len(items), -1).astype(np.float32)
        vector = self._query_vector(query, rows.schema.metadata)
        if vector.shape != values.shape[1:]:
            raise InputError(
                f"The query has {len(vector)} dimensions, the table {values.shape[1]}.",
                "Embed the query with the table's recipe.",
            )
        scale = rows["vector_scale"].to_numpy().astype(np.float32)
        # Not BLAS: its rounding depends on a row's place in the block, so equal rows would not tie.
        return pa.array(np.einsum("ij,j->i", values, vector) * scale, pa.float32())

    def _query_vector(
        self, query: str, metadata: Mapping[bytes, bytes] | None
    ) -> npt.NDArray[np.float32]:
        if self._vector is not None:
            return self._vector
        embedder = self._embedder
        if embedder is None:
            function = stated_function(metadata)
            if function is None:
                raise InputError(
                    f"The table states no {METADATA_KEY} of {FUNCTION_NAME}.",
                    "Give Int8Rescorer the query's vector, or an Embedder.",
                )
            embedder = function.embedder()
        return np.asarray(embedder.embed_query(query), np.float32)


class PairReranker(ScoringReranker):
    """Scores rows by looking at their media again, with the query."""

    def pair_scores(
        self, query: str, rows: list[dict[str, Any]], metadata: Mapping[bytes, bytes]
    ) -> list[float | UnitError]:
        """Return one score, or the reason why there is none, a row.

        Args:
            query: A text.
            rows: `FETCHED` of each row.
            metadata: Schema metadata of the table.
        """
        raise NotImplementedError

    def failed(self, errors: list[UnitError]) -> None:
        """Say that rows have no score; never called with nothing."""
        raise NotImplementedError

    def scores(self, query: str, rows: pa.Table) -> pa.Array:
        """Return the probabilities that rows answer the query, null where a medium failed.

        Raises:
            InputError: If a column was not selected.
        """
        require_columns(rows, FETCHED, type(self).__name__)
        found = self.pair_scores(
            query, rows.select(FETCHED).to_pylist(), rows.schema.metadata or {}
        )
        errors = [score for score in found if isinstance(score, UnitError)]
        if errors:
            self.failed(errors)
        values = [None if isinstance(score, UnitError) else float(score) for score in found]
        return pa.array(values, pa.float32())


def require_columns(rows: pa.Table, needed: Sequence[str], who: str) -> None:
    """Raise `InputError` with what to select unless the columns are there."""
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        shown = ", ".join(f'"{name}"' for name in needed)
        raise InputError(
            f"{who} needs the column(s) {', '.join(missing)}.",
            f"Select them too: .select([{shown}, ...]), or leave .select() out.",
        )
