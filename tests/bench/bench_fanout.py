"""A search over 64 partitions on S3: requests, CPU and time, and the hits of one table of them all.

    python -m tests.bench.bench_fanout
    python -m tests.bench.bench_fanout --partitions 8 --rows 200

The server is moto on loopback, which counts what it is asked; it answers in a few milliseconds of
its own CPU time, so the requests say more than the seconds. LanceDB searches a float16 copy of each
partition, one after the other and in as many threads as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import lance
import lancedb
import numpy as np
import pyarrow as pa
import torch

from qvl_batch.schema import CATALOG
from qvl_batch.storage import Storage
from qvl_batch.tables.layout import CATALOG_TABLE, partition_json, table_name
from qvl_batch.tables.open import OpenTables
from qvl_batch.tables.search import search
from qvl_batch.tables.store import TableStore
from tests.bench.measure import print_machine, print_table, say
from tests.bench.vectors import Source, Vectors, columns_of

DIM = 512
THREADS = 16
SERVER = Path(__file__).parents[1] / "s3" / "serve_counted.py"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def counted_server() -> Iterator[str]:
    """Run the counting server; yield its URL."""
    command = [sys.executable, str(SERVER)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[1]
    finally:
        process.stdin.close()
        process.wait(20)


class Meter:
    """Requests, CPU-ms of this process and seconds of calls, in rows of a table."""

    def __init__(self, url: str) -> None:
        self._url, self.rows = url, []
        self.counts()

    def counts(self) -> Counter[str]:
        """Return the requests since the last call."""
        with urllib.request.urlopen(f"{self._url}/-/counts") as answer:
            return Counter(json.load(answer))

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        cpu_s, start_s = time.process_time(), time.perf_counter()
        result = call()
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        found = self.counts()
        self.rows.append((name, found["LIST"], found["GET"], found["HEAD"], 1000 * cpu_s, wall_s))
        return result


def write_tables(store: TableStore, source: Source, partitions: int) -> None:
    """Write our partitions, the catalog, their union, and a float16 copy of each partition."""
    every = np.concatenate(list(source.rows()))
    rows_each, catalog = len(every) // partitions, []
    ours = ("binary", "int8")
    for number in range(partitions):
        start = number * rows_each
        vectors = every[start : start + rows_each]
        partition = (("dt", f"day-{number:03}"),)
        name = table_name("media", partition)
        stated = {"qvl.collection": "media", "qvl.partition": partition_json(partition)}
        rows = columns_of(start, vectors, ours).replace_schema_metadata(stated)
        write(store, name, rows)
        write(store, f"plain{number:03}", columns_of(start, vectors, ("float16",)))
        empty = {field.name: "" for field in CATALOG if field.type == pa.string()}
        empty |= {field.name: 0 for field in CATALOG if field.type == pa.int64()}
        row = {"table": name, "collection": "media", "partition": partition_json(partition)}
        catalog.append(empty | row | {"files": [], "updated_at": datetime.now(UTC)})
    write(store, CATALOG_TABLE, pa.Table.from_pylist(catalog, schema=CATALOG))
    write(store, "union", columns_of(0, every, ours))


def write(store: TableStore, name: str, rows: pa.Table) -> None:
    lance.write_dataset(rows, store.uri(name), storage_options=store.options)


def plain_search(tables: Mapping[str, Any], query: Vectors, threads: int) -> list[tuple]:
    """Search each table with LanceDB and merge by distance: (row_id, distance), best first."""

    def one(name: str) -> list[dict[str, Any]]:
        asked = tables[name]().search(query).distance_type("dot").limit(10)
        return asked.select(["row_id", "uri", "kind", "page", "text"]).to_list()

    with ThreadPoolExecutor(threads) as pool:
        found = [hit for hits in pool.map(one, sorted(tables)) for hit in hits]
    hits = [(hit["_distance"], hit["row_id"]) for hit in found]
    return [(row_id, distance) for distance, row_id in sorted(hits)[:10]]


def bench(url: str, root: str, partitions: int, rows: int, dim: int = DIM) -> dict[str, Any]:
    """Measure and print; return the hits of the partitions and of their union, and the counts."""
    storage = Storage(endpoint_url=url, region="us-east-1")
    store = TableStore(root, storage)
    source = Source(dim, partitions * rows)
    write_tables(store, source, partitions)
    queries = source.queries(10)
    meter = Meter(url)

    def of_lancedb(name: str) -> Any:
        return lancedb.connect(root, storage_options=store.options).open_table(name)

    names = [f"plain{number:03}" for number in range(partitions)]
    anew = {name: (lambda name=name: of_lancedb(name)) for name in names}
    for threads in (1, THREADS):
        named = f"LanceDB, {partitions} x open and search, {threads} thread{'s'[: threads - 1]}"
        meter.measure(named, lambda threads=threads: plain_search(anew, queries[0], threads))
    kept = {name: (lambda table=of_lancedb(name): table) for name in names}
    plain_search(kept, queries[0], THREADS)
    meter.counts()
    named = f"LanceDB, tables kept open, {THREADS} threads"
    plain = meter.measure(named, lambda: plain_search(kept, queries[0], THREADS))
    tables = OpenTables(TableStore(root, storage))

    def ours(asked: Vectors, where: Mapping[str, object] | None = None) -> pa.Table:
        return search(tables.of("media", where), asked, 10)

    first = meter.measure("ours, first search", lambda: ours(queries[0]))
    meter.measure("ours, the same again", lambda: ours(queries[0]))
    meter.measure("ours, another query", lambda: ours(queries[1]))
    many = meter.measure("ours, 10 queries in a call", lambda: ours(queries))
    opened = tables.of("media")
    meter.counts()
    meter.measure("ours, another query, tables kept", lambda: search(opened, queries[2], 10))
    few = {"dt": [f"day-{number:03}" for number in range(partitions // 8)]}
    pruned = OpenTables(TableStore(root, storage))
    meter.measure(
        f"ours, first search, {partitions // 8} partitions by the catalog",
        lambda: search(pruned.of("media", few), queries[0], 10),
    )
    union = store.open("union")
    assert union is not None
    whole = search({"union": union}, queries, 10)
    print_table(
        f"{partitions} partitions x {rows:,} rows x {dim} dimensions on S3 (moto)",
        ("", "LIST", "GET", "HEAD", "CPU-ms", "wall s"),
        meter.rows,
    )
    same = many.drop_columns("table").equals(whole.drop_columns("table"))
    say(f"The hits of 10 queries are those of a search over the union: {'yes' if same else 'NO'}.")
    mine = first["row_id"].to_pylist()
    say(f"Of LanceDB's exact 10 on float16, ours has {len({row for row, _ in plain} & {*mine})}.")
    return {"split": many, "union": whole, "rows": meter.rows}


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_fanout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--partitions", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2000, help="of a partition")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    print_machine(torch.device("cpu"))
    os.environ |= ENVIRONMENT
    with counted_server() as url:
        request = urllib.request.Request(f"{url}/bench-bucket", method="PUT")
        urllib.request.urlopen(request).close()
        bench(url, "s3://bench-bucket/root", asked.partitions, asked.rows)


if __name__ == "__main__":
    main()
