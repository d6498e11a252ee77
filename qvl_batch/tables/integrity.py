"""Are the files of a table still what was written? Lance has no checksums; the catalog has."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import lance
import pyarrow as pa

from qvl_batch.errors import LeaseHeldError, QvlError, RunFailedError
from qvl_batch.schema import CATALOG
from qvl_batch.tables import catalog
from qvl_batch.tables.check import MISSING_FILE, Problem, whole_fragments
from qvl_batch.tables.fragments import data_path, sha256_of, write_to
from qvl_batch.tables.garbage import file_sizes, orphans
from qvl_batch.tables.layout import CATALOG_TABLE, VECTORS_KIND
from qvl_batch.tables.ledger import table_collection, table_kind
from qvl_batch.tables.rewrite import publish
from qvl_batch.tables.store import TableStore, storage_error

CHANGED_FILE = "changed file"
# A run commits every minute; what is older and in no version was left by one that died.
ORPHANED_AFTER = timedelta(days=1)
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Integrity:
    """What a look at all files of a table found.

    Args:
        num_files: Data files of the latest version.
        num_compared: Those whose sha256 the catalog knows, all of them read.
        num_orphans: Files that nothing refers to, a day old or older; no error.
        problems: Files that are missing, short, or not what was written.
    """

    table: str
    num_files: int
    num_compared: int
    num_orphans: int
    orphan_bytes: int
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        line = f"{self.table}: {self.num_compared:,} of {self.num_files:,} data files compared"
        if self.num_orphans:
            size = f"{self.orphan_bytes / 1e6:,.1f} MB"
            line += f"; {self.num_orphans:,} orphans, {size} (qvl-batch gc removes them)"
        return line


def check_files(
    store: TableStore, table: str, orphaned_after: timedelta = ORPHANED_AFTER
) -> Integrity:
    """Read every data file of a table and compare it with the catalog's hash.

    Files of tables that the catalog does not list (scores, failures), and of a run that did not
    come to its catalog, are looked for and not compared.

    Args:
        orphaned_after: Younger files that nothing refers to may be those of a run at work.

    Raises:
        StorageError: If the table can not be read.
    """
    dataset = store.open_existing(table)
    row = catalog.row_of(store, table, ["files"])
    known = {file["path"]: file for file in row["files"]} if row else {}
    try:
        problems, whole = whole_fragments(dataset, table)
        problems += _missing_index_files(store, table, dataset)
        files = [data_path(f) for fragment in whole for f in fragment.metadata.files]
        session = store.files(table)

        def changed(path: str) -> bool:
            record = known[path]
            return sha256_of(session, path, record["size_bytes"]) != record["sha256"]

        compared = [path for path in files if path in known]
        with ThreadPoolExecutor(4) as pool:
            for path, is_changed in zip(compared, pool.map(changed, compared), strict=True):
                if is_changed:
                    detail = f"{path} is not what was written (sha256 differs from the catalog's)"
                    problems.append(Problem(CHANGED_FILE, table, None, None, detail))
        left = orphans(store, table, orphaned_after)
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error
    return Integrity(
        table=table,
        num_files=sum(len(f.metadata.files) for f in dataset.get_fragments()),
        num_compared=len(compared),
        num_orphans=len(left),
        orphan_bytes=sum(file.size_bytes for file in left),
        problems=tuple(problems),
    )


def _missing_index_files(
    store: TableStore, table: str, dataset: lance.LanceDataset
) -> list[Problem]:
    found: dict[str, int] = {}
    for path, size_bytes in file_sizes(store, table).items():
        folder, _, _ = path.rpartition("/")
        found[folder] = found.get(folder, 0) + size_bytes
    problems = []
    for index in dataset.describe_indices():
        for segment in index.segments:
            held = found.get(f"_indices/{segment.uuid}", 0)
            if held < (segment.size_bytes or 1):
                detail = (
                    f"index {index.name} has {held} of its {segment.size_bytes} bytes in "
                    f"_indices/{segment.uuid}: drop it and run qvl-batch index"
                )
                problems.append(Problem(MISSING_FILE, table, None, None, detail))
    return problems


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A catalog that was written anew; `was_readable` tells whether hashes could be kept."""

    num_tables: int
    num_files: int
    num_recomputed: int
    was_readable: bool

    def __str__(self) -> str:
        kept = "" if self.was_readable else "; the old one was gone or damaged"
        return (
            f"catalog of {self.num_tables} table(s), {self.num_files:,} files, "
            f"{self.num_recomputed:,} of which have a recomputed hash{kept}"
        )


def rebuild_catalog(store: TableStore) -> Rebuilt:
    """Write the catalog anew from the tables, in one commit.

    Hashes that it has are kept. Files that it does not know are read, and marked ``recomputed``:
    what they held when they were written nobody knows. A published index stays published. Rows of
    tables that are gone go.

    Raises:
        StorageError: If a table can not be read, or the catalog not be written.
        RunFailedError: If runs changed the catalog all the time.
    """
    names = [name for name in store.names() if not name.startswith("_")]
    opened = {name: store.open_existing(name) for name in names}
    vectors = [
        name
        for name, dataset in opened.items()
        if table_collection(dataset) and table_kind(dataset) == VECTORS_KIND
    ]
    before = _readable(store)
    if before is None:
        _remove(store)
        # Without what the old one's session remembers of a table of the same name.
        store = TableStore(store.root, store.storage)
    for _ in range(_ATTEMPTS):
        store.create(CATALOG_TABLE, CATALOG)
        planned = store.open_existing(CATALOG_TABLE)
        known = {row["table"]: row for row in catalog.read(store).to_pylist()}
        rows = [catalog.present_row(store, name, known.get(name)) for name in vectors]
        marker = f"rebuild-{uuid.uuid4().hex}"
        written = write_to(store, CATALOG_TABLE, pa.Table.from_pylist(rows, schema=CATALOG))
        try:
            publish(
                store,
                CATALOG_TABLE,
                written,
                marker=marker,
                run_id=marker,
                planned_version=planned.version,
            )
        except LeaseHeldError:
            # A run has refreshed its rows: look at them again.
            continue
        files = [file for row in rows for file in row["files"]]
        return Rebuilt(
            num_tables=len(rows),
            num_files=len(files),
            num_recomputed=sum(file["recomputed"] for file in files),
            was_readable=before is not None,
        )
    raise RunFailedError("the catalog was changed by runs all the time; try again")


def _readable(store: TableStore) -> pa.Table | None:
    """Return the catalog's rows; None if it is gone or can not be read.

    The tables beside it could be read a moment ago: what fails here is the catalog, not the store.
    """
    for _ in range(_ATTEMPTS):
        try:
            return catalog.read(store) if store.open(CATALOG_TABLE) is not None else None
        except (QvlError, ValueError, OSError, RuntimeError):
            continue
    return None


def _remove(store: TableStore) -> None:
    uri = store.uri(CATALOG_TABLE)
    fs = store.storage.filesystem(uri)
    fs.invalidate_cache()
    path = fs._strip_protocol(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
