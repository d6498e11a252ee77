"""`Root`: a directory of tables, its collections, and whether all is well there."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from qvl_batch.api.collection import Collection
from qvl_batch.api.health import Health, check_health, partition_table
from qvl_batch.api.query_models import QueryModels, Stated
from qvl_batch.errors import ConfigError, StorageError
from qvl_batch.storage import Storage, is_local
from qvl_batch.tables import aliases
from qvl_batch.tables.open import OpenTables
from qvl_batch.tables.store import TableStore

COLLECTIONS = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("aliases", pa.list_(pa.string()), nullable=False),
        pa.field("num_partitions", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("dim", pa.int32(), nullable=False),
        pa.field("encodings", pa.list_(pa.string()), nullable=False),
        pa.field("model", pa.string()),
        pa.field("recipe_id", pa.string(), nullable=False),
    ]
)


class Root:
    """What an embed job wrote under its ``output.root``; made by `qvl_batch.connect`.

    Tables are opened when they are needed, and again only once there is a newer version.

    Args:
        root: A directory or an object-store address.
        storage: How object stores are reached; None: from the standard environment variables.
        model: A checkpoint for queries in place of the one that the tables state; it must be the
            same weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, for queries and reranking.

    Raises:
        StorageError: If the root can not be listed, or is no directory.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        storage: Storage | None = None,
        model: str | Path | None = None,
        device: str = "auto",
    ) -> None:
        storage = storage or Storage.of()
        self._store = TableStore(str(root), storage)
        if is_local(self._store.root) and not os.path.isdir(self._store.root):
            raise StorageError(
                f"There is no directory {self._store.root}.",
                "Give the output.root of an embed run.",
            )
        self._store.names()
        self._tables = OpenTables(self._store)
        self._models = QueryModels(storage, model, device)

    @property
    def uri(self) -> str:
        return self._store.root

    def collections(self) -> pa.Table:
        """Return one row a collection, as `COLLECTIONS`, sorted by name."""
        named = aliases.read(self._store)
        rows = []
        for name in sorted(self._tables.collections()):
            opened = self._tables.of(name, None)
            if not opened:
                continue
            last = max(opened)
            stated = Stated.of(name, last, opened[last].schema)
            rows.append(
                {
                    "collection": name,
                    "aliases": [alias for alias, other in named.items() if other == name],
                    "num_partitions": len(opened),
                    "num_rows": sum(dataset.count_rows() for dataset in opened.values()),
                    "dim": stated.recipe.dim,
                    "encodings": list(stated.recipe.encodings),
                    "model": stated.model,
                    "recipe_id": stated.recipe.recipe_id,
                }
            )
        return pa.Table.from_pylist(rows, schema=COLLECTIONS)

    def partitions(self) -> pa.Table:
        """Return what the catalog says of each partition, sorted by table.

        ``collection, partition`` (a JSON object), ``table, num_rows, num_units, num_failures,
        version, index, index_state, recipe_id, run_id, updated_at``. A table that a run has not
        catalogued yet is missing here: `health` tells.
        """
        return partition_table(self._store)

    def health(self) -> Health:
        """Look at every table: counts by collection, and whatever is wrong."""
        return check_health(self._store)

    def aliases(self) -> dict[str, str]:
        """Return the collection that each alias stands for."""
        return aliases.read(self._store)

    def switch_alias(self, alias: str, collection: str) -> None:
        """Let an alias stand for a collection from now on, in one commit.

        Raises:
            ConfigError: If the alias is a collection's name, or there is no such collection.
        """
        aliases.switch(self._store, alias, collection)

    def collection(self, name: str | None = None) -> Collection:
        """Return a collection by its name or an alias; None: the only one.

        An alias is looked up here, once: what is returned stays the same collection when the alias
        is switched.

        Raises:
            ConfigError: If there is none, or several and no name.
        """
        known = sorted(self._tables.collections())
        named = aliases.read(self._store)
        listed = ", ".join([*known, *(f"{a} (alias of {c})" for a, c in named.items())])
        if not known:
            raise ConfigError(
                f"{self.uri} holds no collection.", "Give the output.root of an embed run."
            )
        if name is None and len(known) > 1:
            raise ConfigError(
                f"{self.uri} holds {len(known)} collections.", f"Name one of: {listed}."
            )
        chosen = known[0] if name is None else named.get(name, name)
        if name in named and name in known:
            raise ConfigError(
                f"{self.uri}: {name!r} is an alias of {chosen} and a collection as well.",
                "Use another alias.",
            )
        if chosen not in known:
            raise ConfigError(
                f"{self.uri} holds no collection or alias {name!r}.", f"There are: {listed}."
            )
        return Collection(chosen, self._store, self._tables, self._models)

    def close(self) -> None:
        """Let go of the models, and end their decoding children; they come back when needed."""
        self._models.close()

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        lines = [f"Root({self.uri!r})"]
        for row in self.collections().to_pylist():
            also = f" ({', '.join(row['aliases'])})" if row["aliases"] else ""
            lines.append(
                f"  {row['collection']}{also}: {row['num_rows']:,} rows in "
                f"{row['num_partitions']} tables, {row['dim']} dimensions, "
                f"{' + '.join(row['encodings'])}, by {row['model'] or 'a model without a name'}"
            )
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no collections"])
