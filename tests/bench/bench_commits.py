"""What a commit costs while a table grows by commits, and what maintenance gives back.

    python -m tests.bench.bench_commits                 (2,000 commits on disk, 500 on S3)
    python -m tests.bench.bench_commits --local 300 --s3 100

One run appends to one table, a row a commit, by the protocol of the jobs: files checked, markers
searched, one Append. The S3 server is moto on loopback, in a process of its own. Times are wall
milliseconds of this process, medians; on a busy machine compare them within a table only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3

from qvl_batch.storage import Storage
from qvl_batch.tables import catalog, commit, fragments
from qvl_batch.tables.garbage import gc
from qvl_batch.tables.ledger import done_units
from qvl_batch.tables.maintenance import compact
from qvl_batch.tables.store import TableStore
from tests.bench.measure import print_table
from tests.tables import rows

TABLE = "media"
_SERVER = Path(__file__).parents[1] / "s3" / "serve_moto.py"


class Bench:
    """One table that grows; `lines` has a row of figures a stage."""

    def __init__(self, store: TableStore) -> None:
        self.store, self.count = store, 0
        self.lines: list[tuple[str, float, float, float, float, float, int]] = []
        self.run_id, self.planned = "run-0", 1
        store.check_writable()
        store.create(TABLE, rows.schema())

    def new_run(self) -> None:
        """Go on as another run does: with nothing in memory, from the present version."""
        self.store = TableStore(self.store.root, self.store.storage)
        self.run_id = f"run-{uuid.uuid4().hex[:6]}"
        self.planned = self.store.open_existing(TABLE).version

    def grow(self, commits: int) -> list[tuple[float, float]]:
        """Return ms of writing and of committing for each of so many commits."""
        took = []
        for _ in range(commits):
            self.count += 1
            table = rows.table_rows([f"unit-{self.count:06d}"], rows.schema())
            start = time.perf_counter()
            written = fragments.write_to(self.store, TABLE, table)
            between = time.perf_counter()
            commit.append(
                self.store,
                TABLE,
                written,
                marker=f"{self.run_id}/{self.count}",
                run_id=self.run_id,
                planned_version=self.planned,
            )
            took.append(((between - start) * 1e3, (time.perf_counter() - between) * 1e3))
        return took

    def note(self, stage: str, took: list[tuple[float, float]]) -> None:
        """Add a row: medians of these commits, and what opening and scanning costs now."""
        fresh = TableStore(self.store.root, self.store.storage)
        dataset = fresh.open_existing(TABLE)
        assert len(done_units(dataset)) == self.count
        history = self.store.histories[TABLE]
        start = time.perf_counter()
        history.read(dataset, self.planned)
        history.find(f"{self.run_id}/{self.count}", self.planned)
        history.other_writers(self.run_id, self.planned)
        markers_ms = (time.perf_counter() - start) * 1e3
        self.lines.append(
            (
                stage,
                statistics.median(t[0] for t in took),
                statistics.median(t[1] for t in took),
                markers_ms,
                _ms(lambda: TableStore(self.store.root, self.store.storage).open(TABLE)),
                _ms(lambda: done_units(fresh.open_existing(TABLE))),
                len(dataset.get_fragments()),
            )
        )

    def maintain(self) -> float:
        """Refresh the catalog, compact, and collect what is old; return seconds."""
        start = time.perf_counter()
        catalog.refresh(self.store, [TABLE], {}, run_id=self.run_id)
        compact(self.store, TABLE)
        time.sleep(1.1)
        gc(self.store, TABLE, timedelta(0))
        return time.perf_counter() - start


def _ms(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def bench(store: TableStore, name: str, commits: int) -> None:
    """Grow a table, note the first, middle and last commits; maintain it and grow on."""
    seen = min(100, commits // 3)
    run = Bench(store)
    run.note(f"first {seen}", run.grow(seen))
    run.grow(commits // 2 - seen - seen // 2)
    run.note(f"around {commits // 2:,}", run.grow(seen))
    run.grow(commits - run.count - seen)
    run.note(f"last {seen} of {commits:,}", run.grow(seen))
    maintenance_s = run.maintain()
    run.new_run()
    run.note(f"{seen} after compact and gc ({maintenance_s:.0f} s)", run.grow(seen))
    columns = ("commits", "write ms", "commit ms", "markers ms", "open ms", "scan ms", "fragments")
    print_table(f"Commits to one table, {name}", columns, run.lines)


@contextmanager
def s3_storage() -> Iterator[Storage]:
    """Run an S3 server in a process of its own."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
    server = subprocess.Popen(
        [sys.executable, str(_SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("ready "))
        yield Storage(endpoint_url=line.split()[1], region="us-east-1")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local", type=int, default=2000, help="commits on disk; 0: none")
    parser.add_argument("--s3", type=int, default=500, help="commits on S3; 0: none")
    asked = parser.parse_args()
    if asked.local:
        with tempfile.TemporaryDirectory(prefix="qvl-commits-") as scratch:
            bench(TableStore(f"{scratch}/root"), "local disk", asked.local)
    if asked.s3:
        with s3_storage() as storage:
            client = boto3.client(
                "s3", endpoint_url=storage.endpoint_url, region_name=storage.region
            )
            client.create_bucket(Bucket="bench")
            bench(TableStore("s3://bench/root", storage), "S3 (moto on loopback)", asked.s3)


if __name__ == "__main__":
    main()
