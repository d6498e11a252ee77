"""Write modes through the whole job: rows added, put in the place of older ones, all at once."""

from __future__ import annotations

import contextlib
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_batch.errors import ConfigError, LeaseHeldError, StorageError
from qvl_batch.jobs.embed import run_embed, work_of
from qvl_batch.jobs.embed_job import prepare
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables import staging
from qvl_batch.tables.lease import Leases, lease_place
from qvl_batch.tables.store import TableStore
from tests.faults.plain_driver import POOLS, unit_rows
from tests.jobs.conftest import Job

pytestmark = pytest.mark.usefixtures("local_ray")


def listed(path, files: dict[str, str], day: str = "2026-01-01") -> str:
    """Write notes and a manifest of them with contents as etags; return the manifest's path."""
    rows = []
    for name, content in files.items():
        note = path / f"{name}.txt"
        note.write_text(content)
        stat = note.stat()
        etag = f"{stat.st_size}-{stat.st_mtime_ns}"
        rows.append({"uri": str(note), "kind": "text", "etag": etag, "dt": day})
    manifest = path / f"manifest-{time.monotonic_ns()}.parquet"
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"qvl.partition_by": '["dt"]'})
    pq.write_table(table, manifest)
    return str(manifest)


def contents(job: Job) -> dict[str, str]:
    rows = job.all_rows()
    found = dict(zip(rows["uri"].to_pylist(), rows["text"].to_pylist(), strict=True))
    assert len(found) == rows.num_rows, "an old row stands beside the new one"
    return {uri.rsplit("/", 1)[-1].removesuffix(".txt"): text for uri, text in found.items()}


def test_upsert_puts_changed_media_in_the_place_of_their_old_rows(tmp_path):
    first = {"a": "red circle", "b": "blue star", "c": "green ring"}
    job = Job(manifest=listed(tmp_path, first), root=str(tmp_path / "vectors"))
    run_embed(job.config())
    later = listed(tmp_path, {"a": "red circle", "b": "a blue star that changed", "d": "new"})
    second = Job(manifest=later, root=job.root)
    report = run_embed(second.config("output.mode=upsert"))
    assert report.embedded == 2 + (report.skipped_done == 0)
    assert contents(job) == {
        "a": "red circle",
        "b": "a blue star that changed",
        "c": "green ring",
        "d": "new",
    }
    assert verify(job.root, Storage(), manifest=later).problems == ()
    assert run_embed(second.config("output.mode=upsert")).embedded == 0


def test_upsert_removes_what_an_append_had_left_beside(tmp_path):
    job = Job(manifest=listed(tmp_path, {"a": "red"}), root=str(tmp_path / "vectors"))
    run_embed(job.config())
    later = Job(manifest=listed(tmp_path, {"a": "a red one that changed"}), root=job.root)
    run_embed(later.config())
    assert job.all_rows().num_rows == 2
    run_embed(later.config("output.mode=upsert"))
    assert contents(job) == {"a": "a red one that changed"}


def test_replace_shows_the_old_content_until_the_new_one_is_complete(tmp_path):
    first = {f"n{i}": f"old text {i}" for i in range(30)}
    job = Job(manifest=listed(tmp_path, first), root=str(tmp_path / "vectors"))
    run_embed(job.config())
    table = job.tables()[0]
    old = set(job.rows(table)["unit_id"].to_pylist())
    later = {f"n{i}": f"new and different text {i}" for i in range(5, 40)}
    second = Job(manifest=listed(tmp_path, later), root=job.root)
    seen, ended = [], threading.Event()

    def poll() -> None:
        while not ended.is_set():
            seen.append(frozenset(job.rows(table)["unit_id"].to_pylist()))
            time.sleep(0.05)

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        sliced = ["pools.units_per_block=8", "commit.interval_s=0.2", "commit.fragment_bytes=65536"]
        run_embed(second.config("output.mode=replace", *sliced))
    finally:
        ended.set()
        reader.join()
    new = set(job.rows(table)["unit_id"].to_pylist())
    assert len(new) == 35
    assert not new & old
    assert set(seen) <= {frozenset(old), frozenset(new)}
    assert contents(job) == later
    assert verify(job.root, Storage(), manifest=second.manifest).problems == ()
    assert staging.open_replaces(TableStore(job.root)) == {}
    # Cleared and run again, as a scheduler may: everything is made anew, once.
    assert run_embed(second.config("output.mode=replace")).embedded == 35
    assert contents(job) == later


def test_an_open_replace_is_gone_on_with_and_stands_in_the_way_of_others(tmp_path):
    files = {f"n{i}": f"text {i}" for i in range(12)}
    job = Job(manifest=listed(tmp_path, files), root=str(tmp_path / "vectors"))
    with pytest.raises(ConfigError, match="limit"):
        run_embed(job.config("output.mode=replace", "input.limit=3"))
    run_embed(job.config("input.limit=2"))
    # A replace that ended early: one block of it is staged.
    replacing = job.config("output.mode=replace", "pools.units_per_block=4")
    with contextlib.ExitStack() as held:
        begun = prepare(replacing, held)
        (name,) = begun.units.tables
        begun.make_ready([name])
        work = work_of(begun, POOLS)
        written = work.write(
            [unit_rows(begun.plan.todo.slice(0, 5), begun.recipe.dim)], frozenset()
        )
        begun.commits().append(name, written.fragments[name], "m", written.done[name])
    with pytest.raises(StorageError, match=f"A replace of table {name} was begun"):
        run_embed(job.config())
    report = run_embed(replacing)
    assert (report.skipped_done, report.embedded) == (5, 7)
    # The staged rows were made without reading their notes.
    assert contents(job).keys() == files.keys()
    run_embed(job.config())


def test_a_second_driver_is_refused_and_told_who_is_at_work(tmp_path):
    job = Job(manifest=listed(tmp_path, {"a": "red"}), root=str(tmp_path / "vectors"))
    (tmp_path / "vectors").mkdir()
    with Leases(lease_place(job.root, Storage()), "somebody") as other:
        other.acquire(["media__dt-2026-01-01"])
        with pytest.raises(LeaseHeldError, match="somebody, process") as refused:
            run_embed(job.config())
        assert refused.value.exit_code == 3
        assert run_embed(job.config(), steal=True).embedded == 1
    assert run_embed(job.config()).skipped_done == 1
