"""`Collection`: the tables of one recipe, to be asked and looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.api.health import partition_table
from qvl_batch.api.inputs import Item
from qvl_batch.api.query import MEDIUM_COLUMNS, Row, parse_query, row_item
from qvl_batch.api.query_models import QueryModels, Stated
from qvl_batch.api.rescore import rescore
from qvl_batch.errors import ConfigError, InputError, RecipeMismatchError
from qvl_batch.recipe import Recipe, differences
from qvl_batch.tables.filters import filter_of
from qvl_batch.tables.open import OpenTables
from qvl_batch.tables.rows import find_row, read_scores
from qvl_batch.tables.search import COLUMNS, SHORTLIST, search
from qvl_batch.tables.store import TableStore

if TYPE_CHECKING:
    from qvl_batch.api.reranker import Reranker

RERANK_TOP = 100

# A parsed query; a row is its columns, as `find_row` returns them.
Asked = Item | dict[str, Any] | npt.NDArray[np.float32]
Where = pc.Expression | Mapping[str, object] | Sequence[str] | str | None


class Collection:
    """The tables of one recipe under a root; got from `Root.collection`.

    Every call works on the latest version of the tables. Threads may share it; those that need a
    model wait for one another.

    Args:
        name: Of the collection, not an alias.
        store: Where its tables lie.
        tables: Opens its tables.
        models: Embedders and rerankers of the root.
    """

    def __init__(
        self,
        name: str,
        store: TableStore,
        tables: OpenTables,
        models: QueryModels,
    ) -> None:
        self.name, self._store = name, store
        self._tables, self._models = tables, models

    @property
    def recipe(self) -> Recipe:
        """What made the vectors.

        Raises:
            RecipeMismatchError: If its tables state different recipes, or none.
        """
        return self._stated(self._open(None)).recipe

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self.recipe.dim

    @property
    def schema(self) -> pa.Schema:
        """Columns of the tables, metadata of the manifest among them; of the latest partition."""
        opened = self._open(None)
        return opened[max(opened)].schema.remove_metadata()

    @property
    def count(self) -> int:
        """Number of rows (vectors) that are there now."""
        return sum(dataset.count_rows() for dataset in self._open(None).values())

    def partitions(self) -> pa.Table:
        """Return what the catalog says of each partition; see `Root.partitions`."""
        return partition_table(self._store, self.name)

    def search(
        self,
        query: object,
        top_k: int = 10,
        *,
        partitions: Where = None,
        where: Where = None,
        columns: Sequence[str] = (),
        rerank: Reranker | str | Path | None = None,
        rerank_top: int = RERANK_TOP,
        shortlist: int = SHORTLIST,
    ) -> pa.Table:
        """Return the rows nearest to a query, best first.

        Args:
            query: A ``str`` is a text; a ``pathlib.Path``, bytes, a Pillow image or a mapping such
                as ``{"text": ..., "image": ...}`` are those of `qvl_batch.api.inputs`; a 1-D array
                is a vector of any norm; a `Row` asks for "more like this" and leaves that row out.
            top_k: How many rows.
            partitions: Which tables are searched, by partition values: an expression, a mapping
                such as ``{"dt": ["2026-01-01", "2026-01-02"]}``, or texts such as
                ``"dt>=2026-01-01"``. None: all.
            where: Which rows count, in the same forms, by any column: ``{"kind": "image"}``.
            columns: Further columns to return.
            rerank: A `Reranker`, or a checkpoint: the first ``rerank_top`` hits are read again
                where they lie and scored by it. A checkpoint sees media as the recipe shows them.
                An ``instruction`` of the query is the embedder's alone.
            rerank_top: How many hits to rerank.
            shortlist: Rows that the sign bits propose for exact scoring; never fewer than are asked
                for.

        Returns:
            ``rank`` int32 from 1, ``score`` float32 (cosine), ``table``, ``row_id, uri, kind, page,
            start_s, end_s, text``, and ``columns``. With ``rerank``, sorted by it, also
            ``rerank_score``, ``rank_before`` and ``rerank_error``: why a medium could not be read
            again; see `rescore.rescore`.

        Raises:
            InputError: If the query, a filter or the model is not what it must be, saying why.
            UnitError: If the query's own medium can not be used.
        """
        _require_counts(top_k=top_k, rerank_top=rerank_top, shortlist=shortlist)
        opened = self._open(partitions)
        stated = self._stated(opened)
        filtered = filter_of(where, _schema(opened))
        asked = self._asked(query, stated)
        if rerank is None:
            return self._nearest(opened, asked, stated, top_k, filtered, columns, shortlist)
        item = _item(asked, stated.recipe)
        reranker = self._reranker(rerank, stated.recipe)
        needed = [*columns, *MEDIUM_COLUMNS]
        first = max(top_k, rerank_top)
        hits = self._nearest(opened, asked, stated, first, filtered, needed, shortlist)
        with self._models.lock:
            hits = rescore(hits, item, reranker, stated.recipe, rerank_top).slice(0, top_k)
        return hits.drop_columns(sorted({*MEDIUM_COLUMNS} - {*COLUMNS, *columns}))

    def search_many(
        self,
        queries: Sequence[object],
        top_k: int = 10,
        *,
        partitions: Where = None,
        where: Where = None,
        columns: Sequence[str] = (),
        shortlist: int = SHORTLIST,
    ) -> pa.Table:
        """Return the rows nearest to each of many queries; one scan of a table serves all of them.

        Args:
            queries: In the forms of `search`; or a 2-D array of vectors. A `Row` may find itself.

        Returns:
            As `search`, with ``query`` int32 (from 0) before the rest, sorted by it.

        Raises:
            InputError, UnitError: As `search`.
        """
        opened = self._open(partitions)
        stated = self._stated(opened)
        filtered = filter_of(where, _schema(opened))
        asked = [self._asked(query, stated) for query in queries]
        return search(
            opened,
            self._vectors(asked, stated),
            top_k,
            shortlist=max(shortlist, top_k),
            where=filtered,
            columns=columns,
            nprobes=self._tables.nprobes(opened),
        )

    def like(self, row_id: str, top_k: int = 10, **options: Any) -> pa.Table:
        """Return the rows most like a row, without that row: ``search(Row(row_id), ...)``."""
        return self.search(Row(row_id), top_k, **options)

    def embed(self, query: object) -> npt.NDArray[np.float32]:
        """Return the vector with which a query is asked, float32 ``(dim,)`` of norm 1."""
        stated = self._stated(self._open(None))
        return self._vectors([self._asked(query, stated)], stated)[0]

    def row(self, row_id: str, *, table: str | None = None) -> dict[str, Any]:
        """Return a row's columns, its table, and its ``vector`` (float32, norm 1, dequantised).

        Args:
            row_id: As a search returned it.
            table: Its table, as a search returned it; without it all tables are looked through.

        Raises:
            InputError: If there is no such row.
        """
        opened = self._open(None)
        if table is not None:
            if table not in opened:
                raise InputError(
                    f"Collection {self.name} has no table {table!r}.", "Leave `table` out."
                )
            opened = {table: opened[table]}
        found = find_row(opened, row_id)
        if found is None:
            where = f"table {table}" if table is not None else f"collection {self.name}"
            raise InputError(f"{where} has no row {row_id!r}.", "Take a row_id of a search.")
        return found

    def scores(self, name: str = "scores") -> pa.Table:
        """Return what a rerank job said of this collection's rows, from tables of this root.

        Args:
            name: The job's ``output.collection``.

        Returns:
            One row a (query, row) pair: `schema.scores`, sorted by ``query_id, rank_before``.

        Raises:
            ConfigError: If there are no scores of that name.
        """
        found = read_scores(self._store, name, self.name)
        if found is None:
            raise ConfigError(
                f"{self._store.root} holds no scores {name!r}.",
                "Give the output.collection of a rerank job; connect to its root if it has its "
                "own.",
            )
        return found

    def __repr__(self) -> str:
        recipe = self.recipe
        return (
            f"Collection({self.name!r}: {self.count:,} rows in {len(self._open(None))} tables, "
            f"{recipe.dim} dimensions, {' + '.join(recipe.encodings)})"
        )

    def _open(self, partitions: Where) -> Mapping[str, Any]:
        opened = self._tables.of(self.name, partitions)
        if not opened and partitions is not None:
            raise ConfigError(
                f"No partition of collection {self.name} is selected by {partitions!r}.",
                "See Collection.partitions().",
            )
        if not opened:
            raise ConfigError(f"Collection {self.name} has no tables by now.", "Connect again.")
        return opened

    def _stated(self, opened: Mapping[str, Any]) -> Stated:
        """Return what all these tables state; of what is not in the recipe, the last one's."""
        stated = [Stated.of(self.name, n, opened[n].schema) for n in sorted(opened)]
        for name, other in zip(sorted(opened), stated, strict=True):
            found = differences(stated[0].recipe.to_dict(), other.recipe.to_dict())
            if found:
                key, ours, theirs = found[0]
                raise RecipeMismatchError(
                    f"Tables of collection {self.name} were made by different recipes: {key} is "
                    f"{ours!r} in {min(opened)}, {theirs!r} in {name}.",
                    "Choose partitions of one recipe, and embed the others again.",
                )
        return stated[-1]

    def _asked(self, query: object, stated: Stated) -> Asked:
        parsed = parse_query(query, stated.recipe.dim, self.name)
        return self.row(parsed.row_id, table=parsed.table) if isinstance(parsed, Row) else parsed

    def _vectors(self, asked: Sequence[Asked], stated: Stated) -> npt.NDArray[np.float32]:
        """Return one vector a query, float32 ``(queries, dim)``."""
        vectors = np.empty((len(asked), stated.recipe.dim), np.float32)
        items = {place: one for place, one in enumerate(asked) if isinstance(one, Item)}
        with self._models.lock:
            if len(items) == 1:
                # Its errors speak of "the query", not of the first of several.
                ((place, item),) = items.items()
                vectors[place] = self._models.embedder(stated).embed_query(item)
            elif items:
                vectors[[*items]] = self._models.embedder(stated).embed_queries(items.values())
        for place, one in enumerate(asked):
            if not isinstance(one, Item):
                vectors[place] = one["vector"] if isinstance(one, dict) else one
        return vectors

    def _reranker(self, rerank: Reranker | str | Path, recipe: Recipe) -> Reranker:
        if isinstance(rerank, str | Path):
            return self._models.reranker(rerank, recipe)
        return rerank

    def _nearest(
        self,
        opened: Mapping[str, Any],
        asked: Asked,
        stated: Stated,
        top_k: int,
        where: pc.Expression | None,
        columns: Sequence[str],
        shortlist: int,
    ) -> pa.Table:
        """Return the hits of one query, without the row that it is."""
        # One more, for that row.
        wanted = top_k + isinstance(asked, dict)
        hits = search(
            opened,
            self._vectors([asked], stated),
            wanted,
            shortlist=max(shortlist, wanted),
            where=where,
            columns=columns,
            nprobes=self._tables.nprobes(opened),
        ).drop_columns("query")
        return _without(hits, asked["row_id"], top_k) if isinstance(asked, dict) else hits


def _require_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} is {value}.", "Give 1 or more.")


def _item(asked: Asked, recipe: Recipe) -> Item:
    """Return the query as the reranker is to see it."""
    if isinstance(asked, Item):
        return dataclasses.replace(asked, instruction=None)
    if isinstance(asked, dict):
        return row_item(asked, recipe)
    raise InputError(
        "A vector can not be reranked: there is no text or medium to look at.",
        "Ask by text, medium or row, or leave `rerank` out.",
    )


def _schema(opened: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of all tables: what a filter may name."""
    try:
        return pa.unify_schemas([opened[name].schema.remove_metadata() for name in sorted(opened)])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"The tables {min(opened)} … {max(opened)} have columns of different types: {error}",
            "Search partitions whose manifests had the same columns.",
        ) from None


def _without(hits: pa.Table, row_id: str, top_k: int) -> pa.Table:
    kept = hits.filter(pc.not_equal(hits["row_id"], row_id)).slice(0, top_k)
    rank = pa.array(range(1, kept.num_rows + 1), pa.int32())
    return kept.set_column(kept.column_names.index("rank"), "rank", rank)
