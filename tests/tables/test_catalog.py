from __future__ import annotations

import hashlib
from pathlib import Path

from qvl_batch.tables import catalog, commit, fragments
from qvl_batch.tables.layout import CATALOG_TABLE
from tests.tables import rows

PARTITION = (("dt", "2026-01-02"),)
SCHEMA = rows.schema(partition=PARTITION)
NAME = "media__dt-2026-01-02"


def write(store, ids, marker):
    table = rows.table_rows(ids, SCHEMA, num_segments=2)
    written = fragments.write_fragments(store.root, store.storage, NAME, table)
    commit.append(store, NAME, written, marker=marker, run_id="r")
    return [file for fragment in written for file in fragment["files"]]


def test_there_is_no_catalog_yet(store) -> None:
    assert catalog.read(store).num_rows == 0
    catalog.refresh(store, ["absent"], {}, run_id="r")
    assert catalog.read(store).num_rows == 0


def test_one_row_a_table_with_what_is_true_now(any_store) -> None:
    any_store.check_writable()
    any_store.create(NAME, SCHEMA)
    files = write(any_store, ["a", "b"], "m1")
    found = fragments.failure_rows(
        rows.embedded(["c"], failed={"c": rows.DECODE_FAILURE}),
        collection="media",
        partition_json='{"dt":"2026-01-02"}',
        run_id="r",
        failed_at=rows.NOW,
    )
    commit.append_failures(any_store, found, "f", "r")
    for run in ("r", "r2"):
        catalog.refresh(any_store, [NAME], {NAME: files}, run_id=run)
        (row,) = catalog.read(any_store).to_pylist()
        assert row.pop("updated_at") is not None
        assert row == {
            "table": NAME,
            "collection": "media",
            "partition": '{"dt":"2026-01-02"}',
            "version": 2,
            "num_units": 2,
            "num_rows": 4,
            "num_failures": 1,
            "recipe_id": rows.recipe().recipe_id,
            "recipe": rows.recipe().to_json(),
            "run_id": run,
            "index_state": "none",
            "index": None,
            "files": files,
        }


def test_known_hashes_are_kept_and_new_ones_marked(store) -> None:
    store.create(NAME, SCHEMA)
    first = write(store, ["a"], "m1")
    catalog.refresh(store, [NAME], {NAME: first}, run_id="r")
    # What the catalog says of a file written then is kept even if its bytes change later.
    path = Path(store.root, f"{NAME}.lance", first[0]["path"])
    content = bytearray(path.read_bytes())
    content[20] ^= 255
    path.write_bytes(content)
    (second,) = write(store, ["b"], "m2")
    catalog.refresh(store, [NAME], {}, run_id="r")
    files = {file["path"]: file for file in catalog.read(store)["files"][0].as_py()}
    assert files[first[0]["path"]] == first[0]
    assert files[second["path"]] == second | {"recomputed": True}
    assert first[0]["sha256"] != hashlib.sha256(content).hexdigest()


def test_index_state(store) -> None:
    store.create(NAME, SCHEMA)
    write(store, ["a"], "m1")
    store.open(NAME).create_scalar_index("row_id", "BTREE")
    assert catalog.index_state(store.open(NAME)) == "row_id:BTree"


def test_drivers_of_different_partitions_share_the_catalog(store, start_worker) -> None:
    names = ["x", "y", "z"]
    for name in names:
        store.create(f"media__dt-{name}", rows.schema(partition=(("dt", name),)))
    workers = [start_worker("catalog", store, name) for name in names]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    table = catalog.read(store)
    assert table["table"].to_pylist() == [f"media__dt-{name}" for name in names]
    assert table["num_rows"].to_pylist() == [4, 4, 4]
    assert table["version"].to_pylist() == [5, 5, 5]
    key = store.open(CATALOG_TABLE).schema.field("table").metadata
    assert key == {b"lance-schema:unenforced-primary-key": b"true"}
