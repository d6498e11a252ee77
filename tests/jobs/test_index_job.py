"""The commands index, compact and gc on real tables, in one process and through Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from qvl_batch.cli import main
from qvl_batch.demo.corpus import write_corpus
from qvl_batch.errors import ConfigError, StorageError
from qvl_batch.jobs.cluster import Node
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.index import IndexReport, cpus_a_table, pays, run_index
from qvl_batch.jobs.maintenance import parse_age, run_compact, run_gc
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables import catalog
from qvl_batch.tables.garbage import gc
from qvl_batch.tables.index import BUILD, Indexed, IndexRules
from qvl_batch.tables.lease import Leases, lease_place
from qvl_batch.tables.store import TableStore
from tests.tables import clusters

RULES = IndexRules(min_rows=1000, num_queries=200)
DAYS = ("1", "2", "3")


def make(store: TableStore, num_rows: int = 2000) -> None:
    for day in DAYS:
        clusters.make(store, f"media__dt-{day}", [num_rows, num_rows])


def published(store: TableStore) -> dict[str, dict]:
    rows = catalog.read(store).to_pylist()
    return {row["table"]: row["index"] for row in rows if row["index"]}


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> TableStore:
    if request.param == "local":
        return TableStore(str(tmp_path / "root"))
    bucket = request.getfixturevalue("bucket")
    return TableStore(bucket.uri("tables"), bucket.storage)


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def options(store: TableStore) -> list[str]:
    url = store.storage.endpoint_url
    return ["--endpoint-url", url, "--region", store.storage.region] if url else []


def test_all_tables_of_a_filter_are_indexed_and_published(store) -> None:
    make(store)
    lines: list[str] = []
    report = run_index(store.root, store.storage, where=["dt=1,3"], rules=RULES, echo=lines.append)
    assert report.exit_code == 0
    assert set(published(store)) == {"media__dt-1", "media__dt-3"}
    assert len(lines) == 2
    assert "4,000 rows, 4,000 indexed, nprobes " in lines[0]
    assert "recall@10 0.99" in lines[0] or "recall@10 1.0000" in lines[0]
    report = run_index(store.root, store.storage, rules=RULES, echo=lines.append)
    assert [done.action for done in report.tables] == ["nothing to do", "built", "nothing to do"]
    assert set(published(store)) == {f"media__dt-{day}" for day in DAYS}
    assert verify(store.root, store.storage).problems == ()


def test_commands_say_what_they_did(store, capsys) -> None:
    make(store, 100)
    code, out, _ = command(capsys, "index", store.root, *options(store))
    assert code == 0
    assert out.count("200 rows, too small") == 3
    assert "0 of 3 table(s) have a published index, 3 too small for one" in out
    code, out, _ = command(capsys, "compact", store.root, "--partition", "dt=2", *options(store))
    assert (code, out) == (
        0,
        "media__dt-2: 200 rows, 2 fragments are now 1\n1 of 1 table(s) compacted\n",
    )
    code, out, _ = command(capsys, "compact", store.root, "--json", *options(store))
    assert code == 0
    told = {table["table"]: table["fragments_after"] for table in json.loads(out)["tables"]}
    assert told == {"_qvl_catalog": 1} | {f"media__dt-{day}": 1 for day in DAYS}
    code, out, _ = command(capsys, "gc", store.root, "--dry-run", *options(store))
    assert code == 0
    assert "media__dt-1: would remove 0 versions, 0 files, 0.0 MB" in out
    assert verify(store.root, store.storage).problems == ()


def test_an_index_below_the_target_ends_with_1_and_the_figures(tmp_path, capsys) -> None:
    store = TableStore(str(tmp_path / "root"))
    clusters.make(store, "media", [20_000], dim=32)
    arguments = ["index", store.root, "--recall", "1.0", "--max-nprobes", "1"]
    code, out, _ = command(capsys, *arguments)
    assert code == 1
    assert "NOT published: recall@10 0." in out
    assert "1 refused for recall below 1" in out
    assert published(store) == {}
    assert store.open("media").describe_indices() == []
    code, out, _ = command(capsys, *arguments, "--json")
    told = json.loads(out)
    assert (code, told["ok"]) == (1, False)
    assert told["tables"][0]["ladder"][0]["recall"] < 1
    code, out, _ = command(capsys, "index", store.root, "--recall", "0.9")
    assert code == 0
    assert set(published(store)) == {"media"}


def test_through_ray_as_in_one_process(store, local_ray) -> None:
    make(store)
    lines: list[str] = []
    report = run_index(store.root, store.storage, rules=RULES, ray_from_rows=1, echo=lines.append)
    assert report.exit_code == 0
    assert [done.action for done in report.tables] == ["built"] * 3
    assert set(published(store)) == {f"media__dt-{day}" for day in DAYS}
    again = run_index(store.root, store.storage, rules=RULES, ray_from_rows=1, echo=lines.append)
    assert [done.action for done in again.tables] == ["nothing to do"] * 3
    assert verify(store.root, store.storage).problems == ()


@pytest.mark.full
def test_runs_and_maintenance_take_turns(tmp_path, make_job, local_ray) -> None:
    job = make_job(str(write_corpus(tmp_path / "corpus").media_dir))
    config = job.config("recipe.encodings=[binary, int8]", "input.limit=12")
    rules = IndexRules(min_rows=2, num_queries=200)
    for skipped in (0, 12):
        # Twelve of those that are left.
        report = run_embed(config, echo=str)
        assert (report.embedded, report.skipped_done) == (12, skipped)
        done = run_index(job.root, job.storage, rules=rules, local=True, echo=str)
        assert all(table.published for table in done.tables)
        assert run_compact(job.root, job.storage, echo=str).exit_code == 0
        for name in job.tables():
            gc(TableStore(job.root), name, timedelta(0))
        assert verify(job.root, job.storage).problems == ()
    rows = catalog.read(TableStore(job.root)).to_pylist()
    assert sum(row["num_units"] for row in rows) == 24
    assert all(row["index"] and catalog.unindexed_rows(row) == 0 for row in rows)
    # Every byte was hashed by who wrote it, compactions included.
    assert not any(file["recomputed"] for row in rows for file in row["files"])


def test_one_broken_table_does_not_stop_the_others(tmp_path) -> None:
    store = TableStore(str(tmp_path / "root"))
    make(store)
    (path,) = list(Path(store.uri("media__dt-2"), "data").iterdir())[:1]
    path.unlink()
    lines: list[str] = []
    report = run_index(store.root, store.storage, rules=RULES, echo=lines.append)
    assert report.exit_code == 1
    assert set(report.errors) == {"media__dt-2"}
    assert set(published(store)) == {"media__dt-1", "media__dt-3"}
    assert any(line.startswith("media__dt-2: ") and path.name in line for line in lines)


def test_a_table_that_a_run_holds_ends_compaction_with_3(tmp_path, capsys) -> None:
    store = TableStore(str(tmp_path / "root"))
    make(store, 100)
    with Leases(lease_place(store.root, store.storage), "run-9") as leases:
        leases.acquire(["media__dt-2"])
        code, out, _ = command(capsys, "compact", store.root)
    assert code == 3
    assert "media__dt-2: Table media__dt-2 is being written by another run (run-9" in out
    assert "2 of 2 table(s) compacted; 1 left as they were" in out
    assert len(store.open("media__dt-2").get_fragments()) == 2
    assert command(capsys, "compact", store.root)[0] == 0


def test_gc_lists_and_then_removes(tmp_path, capsys) -> None:
    store = TableStore(str(tmp_path / "root"))
    make(store, 100)
    run_compact(store.root, store.storage, echo=lambda _: None)
    long_ago = time.time() - 8 * 86400
    for path in Path(store.root).rglob("*.lance/**/*"):
        if path.is_file():
            os.utime(path, (long_ago, long_ago))
    num_files = sum(path.is_file() for path in Path(store.root).rglob("*"))
    code, out, _ = command(capsys, "gc", store.root, "--dry-run")
    assert code == 0
    assert "  data/" in out
    assert sum(path.is_file() for path in Path(store.root).rglob("*")) == num_files
    code, out, _ = command(capsys, "gc", store.root, "--older-than", "36h", "--json")
    assert code == 0
    assert {table["table"] for table in json.loads(out)["tables"]} >= {"media__dt-1"}
    data = [*Path(store.root).glob("media*/data/*.lance")]
    assert len(data) == 3
    assert verify(store.root, store.storage).problems == ()
    assert all(store.open(f"media__dt-{day}").to_table().num_rows == 200 for day in DAYS)


def test_a_killed_index_command_can_be_run_again(tmp_path) -> None:
    store = TableStore(str(tmp_path / "root"))
    clusters.make(store, "media__dt-1", [30_000])
    clusters.make(store, "media__dt-2", [30_000])
    arguments = [sys.executable, "-m", "qvl_batch.cli", "index", store.root]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(Path(store.root).glob("*/_indices/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert published(store) == {}
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(published(store)) == {"media__dt-1", "media__dt-2"}
    assert verify(store.root, store.storage).problems == ()


def test_wrong_inputs(tmp_path, capsys) -> None:
    store = TableStore(str(tmp_path / "root"))
    code, _, err = command(capsys, "index", store.root)
    assert code == 2
    assert "holds no tables" in err
    make(store, 10)
    for arguments, said in (
        (["index", store.root, "--collection", "pages"], "no collection 'pages'"),
        (["index", store.root, "--partition", "day=1"], "day"),
        (["index", store.root, "--partition", "dt=9"], "No table passes dt=9"),
        (["index", store.root, "--partition", "dt"], "operator"),
        (["index", store.root, "--recall", "1.5"], "recall is 1.5"),
        (["index", store.root, "--max-nprobes", "0"], "max_nprobes is 0"),
        (["compact", store.root, "--collection", "pages"], "no collection 'pages'"),
        (["gc", store.root, "--older-than", "10m"], "Give 1h or more"),
        (["gc", store.root, "--older-than", "soon"], "'soon' is no time"),
        (["gc", str(tmp_path / "absent")], "holds no tables"),
    ):
        code, _, err = command(capsys, *arguments)
        assert (code, said in err) == (2, True), (arguments, err)


def test_ages() -> None:
    assert parse_age("7d") == timedelta(days=7)
    assert parse_age(" 90m ") == timedelta(minutes=90)
    for wrong in ("", "7", "d", "1.5h", "-1d", "7 d"):
        with pytest.raises(ConfigError):
            parse_age(wrong)
    with pytest.raises(ConfigError, match="1h or more"):
        run_gc("anywhere", Storage(), older_than=timedelta(minutes=59))


def test_what_pays_and_how_cpus_are_shared() -> None:
    def plans(*num_rows):
        return [Indexed(table="t", action=BUILD, num_rows=rows) for rows in num_rows]

    assert not pays(plans(5_000_000)), "one table is one task"
    assert not pays(plans(1000, 1000))
    assert pays(plans(300_000, 300_000))
    nodes = [Node(cpus=16, gpus=1), Node(cpus=4, gpus=0)]
    assert [cpus_a_table(nodes, n) for n in (1, 2, 4, 10, 100)] == [8, 8, 5, 2, 1]
    assert cpus_a_table([Node(cpus=2, gpus=0)], 1) == 2


def test_a_failed_table_is_told_in_json() -> None:
    report = IndexReport(
        tables=(), errors={"t": StorageError("gone.", "Look.")}, recall=0.99, seconds=1.0
    )
    told = json.loads(report.to_json())
    assert (told["ok"], told["errors"]) == (False, {"t": "gone. Look."})
