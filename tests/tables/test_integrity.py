"""Flipped, missing and foreign files are found in real tables; the catalog can be made anew."""

from __future__ import annotations

from datetime import timedelta

import pytest

from qvl_batch.errors import StorageError
from qvl_batch.schema import CATALOG
from qvl_batch.tables import catalog, commit, fragments, staging
from qvl_batch.tables.check import MISSING_FILE
from qvl_batch.tables.garbage import gc
from qvl_batch.tables.integrity import CHANGED_FILE, check_files, rebuild_catalog
from qvl_batch.tables.layout import CATALOG_TABLE
from qvl_batch.tables.store import TableStore
from tests.tables import rows

NAME = "media__dt-1"
SCHEMA = rows.schema(partition=(("dt", "1"),))
# Times of an object store are whole seconds; a file of this moment is younger than "now".
AT_ONCE = timedelta(seconds=-2)


@pytest.fixture
def store(any_store) -> TableStore:
    """Two tables of two fragments each, catalogued with the hashes that their run knew."""
    any_store.check_writable()
    known = {}
    for name in (NAME, "media__dt-2"):
        partition = (("dt", name[-1]),)
        any_store.create(name, rows.schema(partition=partition))
        for ids in (["a", "b", "c"], ["d"]):
            written = write(any_store, name, ids)
            commit.append(any_store, name, written, marker=f"m{ids}", run_id="r")
            known.setdefault(name, []).extend(f for w in written for f in w["files"])
    catalog.refresh(any_store, list(known), known, run_id="r")
    return any_store


def write(store: TableStore, name: str, ids: list[str]):
    table = rows.table_rows(ids, store.open(name).schema)
    return fragments.write_fragments(store.root, store.storage, name, table)


class Files:
    """The files of a table, to be changed as a bad disk or a careless hand does."""

    def __init__(self, store: TableStore, name: str = NAME) -> None:
        self.fs = store.storage.filesystem(store.root)
        self.fs.invalidate_cache()
        self.top = self.fs._strip_protocol(store.uri(name))
        dataset = store.open(name)
        self.data = [f"data/{f.path}" for g in dataset.get_fragments() for f in g.metadata.files]

    def flip(self, path: str, at: int = 40) -> None:
        content = bytearray(self.fs.cat_file(f"{self.top}/{path}"))
        content[at] ^= 1
        self.fs.pipe_file(f"{self.top}/{path}", bytes(content))

    def put(self, path: str, content: bytes) -> None:
        self.fs.pipe_file(f"{self.top}/{path}", content)

    def remove(self, path: str) -> None:
        self.fs.rm(f"{self.top}/{path}", recursive=True)


def fresh(store: TableStore) -> TableStore:
    return TableStore(store.root, store.storage)


def kinds(found) -> list[str]:
    return [problem.kind for problem in found.problems]


def test_sound_files_are_all_compared(store) -> None:
    found = check_files(store, NAME)
    assert (found.num_files, found.num_compared, found.num_orphans) == (2, 2, 0)
    assert found.problems == ()


def test_one_flipped_bit_is_found_where_lance_reads_on(store) -> None:
    files = Files(store)
    files.flip(files.data[1])
    (problem,) = check_files(fresh(store), NAME).problems
    assert problem.kind == CHANGED_FILE
    assert problem.is_error
    assert files.data[1] in problem.detail
    assert check_files(fresh(store), "media__dt-2").problems == ()


def test_missing_and_cut_files_are_found(store) -> None:
    files = Files(store)
    files.remove(files.data[0])
    files.put(files.data[1], b"cut")
    found = check_files(fresh(store), NAME)
    assert kinds(found) == [MISSING_FILE, MISSING_FILE]
    assert found.num_compared == 0


def test_missing_deletion_and_index_files_are_found(store) -> None:
    store.open(NAME).delete("unit_id = 'a'")
    store.open(NAME).create_scalar_index("row_id", "BTREE")
    assert check_files(store, NAME).problems == ()
    files = Files(store)
    (index,) = store.open(NAME).describe_indices()
    folder = f"_indices/{index.segments[0].uuid}"
    first = sorted(files.fs.find(f"{files.top}/{folder}"))[0]
    files.remove(first.removeprefix(f"{files.top}/"))
    deletions = [f.deletion_file() for f in store.open(NAME).get_fragments() if f.num_deletions]
    files.remove(deletions[0])
    found = check_files(fresh(store), NAME)
    assert kinds(found) == [MISSING_FILE, MISSING_FILE]
    assert deletions[0] in found.problems[0].detail
    assert folder in found.problems[1].detail


def test_foreign_files_are_orphans_once_they_are_old(store) -> None:
    files = Files(store)
    left = write(store, NAME, ["never-committed"])
    files.put("data/notes.txt", b"what is this?")
    assert check_files(store, NAME).num_orphans == 0
    found = check_files(store, NAME, AT_ONCE)
    assert found.num_orphans == 2
    assert found.orphan_bytes == left[0]["files"][0]["size_bytes"] + 13
    assert found.problems == ()
    assert "2 orphans" in str(found)


def test_what_an_open_replace_has_written_is_no_orphan_and_survives_gc(store) -> None:
    begun = staging.begin(store, NAME, session="s", digest="d", base_version=3, run_id="r")
    staged = write(store, NAME, ["new"])
    staging.record(store, NAME, staged, ["new"], [], marker="m", run_id="r", since=begun.version)
    (path,) = [file["path"] for fragment in staged for file in fragment["files"]]
    assert check_files(store, NAME, AT_ONCE).num_orphans == 0
    gc(store, NAME, AT_ONCE)
    assert store.files(NAME).contains(path)
    staging.close(store, NAME, "s", run_id="r")
    assert check_files(store, NAME, AT_ONCE).num_orphans == 1
    gc(store, NAME, AT_ONCE)
    assert not store.files(NAME).contains(path)


def test_a_catalog_made_anew_keeps_what_it_knew(store) -> None:
    late = write(store, NAME, ["e"])
    commit.append(store, NAME, late, marker="late", run_id="killed-before-its-catalog")
    assert check_files(store, NAME).num_compared == 2
    rebuilt = rebuild_catalog(store)
    assert (rebuilt.num_tables, rebuilt.num_files, rebuilt.num_recomputed) == (2, 5, 1)
    assert rebuilt.was_readable
    row = catalog.row_of(store, NAME, ["files", "num_units", "run_id"])
    recomputed = {file["path"]: file["recomputed"] for file in row["files"]}
    assert [path for path, new in recomputed.items() if new] == [late[0]["files"][0]["path"]]
    assert (row["num_units"], row["run_id"]) == (5, "r")
    assert check_files(store, NAME).num_compared == 3


def test_a_flipped_file_is_not_made_right_by_a_catalog_made_anew(store) -> None:
    files = Files(store)
    files.flip(files.data[0])
    rebuild_catalog(fresh(store))
    assert kinds(check_files(fresh(store), NAME)) == [CHANGED_FILE]


@pytest.mark.parametrize("harm", ["gone", "manifests", "rows"])
def test_a_catalog_that_is_gone_or_damaged_is_made_from_the_tables(store, harm) -> None:
    files = Files(store, CATALOG_TABLE)
    if harm == "gone":
        files.remove("")
    elif harm == "rows":
        for path in files.data:
            files.put(path, b"x" * 100)
    else:
        for path in files.fs.find(f"{files.top}/_versions"):
            files.fs.pipe_file(path, b"x" * 100)
    rebuilt = rebuild_catalog(fresh(store))
    assert (rebuilt.num_tables, rebuilt.num_recomputed) == (2, 4)
    assert not rebuilt.was_readable
    read = catalog.read(fresh(store))
    assert read.schema.equals(CATALOG)
    assert read["table"].to_pylist() == [NAME, "media__dt-2"]
    found = check_files(fresh(store), NAME)
    assert (found.num_compared, found.problems) == (2, ())


def test_a_table_that_was_removed_leaves_the_catalog(store) -> None:
    Files(store, "media__dt-2").remove("")
    rebuilt = rebuild_catalog(fresh(store))
    assert rebuilt.num_tables == 1
    assert catalog.read(fresh(store))["table"].to_pylist() == [NAME]


def test_a_damaged_table_is_no_reason_to_forget_it(store) -> None:
    files = Files(store)
    for path in files.fs.find(f"{files.top}/_versions"):
        files.fs.pipe_file(path, b"x" * 100)
    with pytest.raises(StorageError, match=NAME):
        rebuild_catalog(fresh(store))
    assert catalog.read(fresh(store)).num_rows == 2
