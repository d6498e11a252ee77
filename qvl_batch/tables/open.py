"""The tables of a collection, open for reading: found, pruned and opened side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime

import lance
import pyarrow as pa

from qvl_batch.errors import ConfigError
from qvl_batch.tables.filters import Filter, filter_of
from qvl_batch.tables.layout import (
    CATALOG_TABLE,
    VECTORS_KIND,
    Partition,
    partition_from_json,
)
from qvl_batch.tables.ledger import table_collection, table_kind, table_partition
from qvl_batch.tables.store import TableStore, storage_error

# Of an object store's answers, which take tens of milliseconds each.
_THREADS = 16


@dataclass(frozen=True)
class _Catalog:
    """What is read of the catalog: partitions by table, probes by table that has an index."""

    version: int = 0
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    nprobes: Mapping[str, int] = field(default_factory=dict)


class OpenTables:
    """Tables of a root, opened at their latest version.

    The store's session keeps manifests, file metadata and indexes by version, so that a table that
    did not change is opened with one LIST request, as many as it takes to know that; a new one
    takes a GET more. Handles are new ones each time: threads must not share them.
    """

    def __init__(self, store: TableStore) -> None:
        self._store = store
        self._catalog = _Catalog()

    def collections(self) -> list[str]:
        """Return the names of all collections of vectors, sorted.

        Scores are left out, and so are tables of other makers, which state no collection.

        Costs a LIST, and for each collection what opening one of its tables costs.

        Raises:
            StorageError: If the root can not be listed or a table not be read.
        """
        first: dict[str, str] = {}
        for name in self._store.names():
            first.setdefault(collection_of(name), name)
        first.pop("", None)
        opened = self._open(first.values())
        return sorted(
            collection_of(name)
            for name, dataset in opened.items()
            if table_kind(dataset) == VECTORS_KIND
            and table_collection(dataset) == collection_of(name)
        )

    def of(
        self,
        collection: str,
        partitions: Filter | Mapping[str, object] | Sequence[str] | str | None = None,
    ) -> dict[str, lance.LanceDataset]:
        """Return the open tables of a collection by name, sorted; none if there is no such.

        The root's listing says which tables there are. The catalog says which partitions those
        hold, so that no other is opened; a table that is not in the catalog is opened and asked.

        Args:
            partitions: A filter over the partition's values, all of them strings: any form that
                `filter_of` takes; a mapping may also hold numbers, dates and times.

        Raises:
            ConfigError: If the filter is refused: no such partition key, for one.
            StorageError: If the root can not be listed or a table not be read.
        """
        names = [name for name in self._store.names() if collection_of(name) == collection]
        if not names or not collection:
            return {}
        self._refresh()
        catalog = self._catalog.partitions
        unknown = self._open(name for name in names if name not in catalog)
        held = {name: catalog[name] for name in names if name in catalog}
        held |= {name: table_partition(dataset) for name, dataset in unknown.items()}
        wanted = matching(held, partitions)
        opened = self._open(name for name in wanted if name not in unknown) | unknown
        return {
            name: opened[name]
            for name in sorted(wanted)
            if name in opened and table_kind(opened[name]) == VECTORS_KIND
        }

    def nprobes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the probes of these tables' published indexes; tables without one are left out.

        As of the last call of `of`; the catalog is read if there was none.
        """
        if not self._catalog.version:
            self._refresh()
        known = self._catalog.nprobes
        return {name: known[name] for name in names if name in known}

    def _open(self, names: Iterable[str]) -> dict[str, lance.LanceDataset]:
        """Return the latest versions of these tables; those that are gone are left out."""
        names = list(names)
        if not names:
            return {}
        # Made here, so that no two threads make one each.
        _ = self._store.session, self._store.options
        with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
            opened = dict(zip(names, pool.map(self._store.open, names), strict=True))
        return {name: dataset for name, dataset in opened.items() if dataset is not None}

    def _refresh(self) -> None:
        dataset = self._store.open(CATALOG_TABLE)
        if dataset is None:
            self._catalog = _Catalog()
        elif dataset.version != self._catalog.version:
            try:
                rows = dataset.to_table(columns=["table", "partition", "index"]).to_pylist()
            except (ValueError, OSError, RuntimeError) as error:
                raise storage_error(dataset.uri, error) from error
            self._catalog = _Catalog(
                dataset.version,
                {row["table"]: partition_from_json(row["partition"]) for row in rows},
                {row["table"]: row["index"]["nprobes"] for row in rows if row["index"]},
            )


def collection_of(name: str) -> str:
    """Return the collection that a table's name states; '' for tables of our own."""
    return "" if name.startswith("_") else name.partition("__")[0]


def matching(
    partitions: Mapping[str, Partition],
    wanted: Filter | Mapping[str, object] | Sequence[str] | str | None,
) -> list[str]:
    """Return the names of the tables whose partitions pass the filter.

    Raises:
        ConfigError: If the filter is refused.
    """
    keys = list(dict.fromkeys(key for partition in partitions.values() for key, _ in partition))
    schema = pa.schema([(key, pa.string()) for key in keys])
    if isinstance(wanted, Mapping):
        wanted = {key: _text(value) for key, value in wanted.items()}
    where = filter_of(wanted, schema)
    if where is None:
        return list(partitions)
    rows = pa.Table.from_pylist(
        [dict(partition) | {_NAME: name} for name, partition in partitions.items()],
        schema=schema.append(pa.field(_NAME, pa.string())),
    )
    try:
        return rows.filter(where)[_NAME].to_pylist()
    except pa.ArrowException as error:
        raise ConfigError(
            f"The filter of partitions {where} is refused: {str(error).splitlines()[0][:300]}",
            f"Partition keys: {', '.join(keys) or 'none'}; their values are strings.",
        ) from error


# No partition key: keys are columns of a manifest, which may not start with '_'.
_NAME = "_table"


def _text(value: object) -> object:
    """Return numbers, bools, dates and times as the text that stands in a partition."""
    if isinstance(value, list | tuple | set | frozenset):
        return [_text(one) for one in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    # str(True).lower() as a run writes it.
    return str(value).lower() if isinstance(value, int) else value
