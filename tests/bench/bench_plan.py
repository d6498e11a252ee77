"""What planning costs against tables that hold everything already.

    python -m tests.bench.bench_plan --units 500000 5000000

Each size runs in a process of its own: a manifest of that many images, and tables whose key columns
hold all of them but a thousand. Prints seconds, CPU seconds and the peak memory over imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.units import media_id, unit_id

PARTITIONS = 10
LEFT = 1000


def write_inputs(folder: Path, num_units: int) -> Path:
    """Write a manifest and its tables' key columns; return the manifest's path."""
    from qvl_batch.tables.layout import table_name

    path = folder / "manifest.parquet"
    per_partition = num_units // PARTITIONS
    writer = None
    for day in range(PARTITIONS):
        uris = [f"s3://media/images/{day:02d}/{i:09d}-photo.jpg" for i in range(per_partition)]
        etags = [f"{i:032x}" for i in range(per_partition)]
        rows = pa.table(
            {
                "uri": uris,
                "kind": pa.repeat("image", per_partition),
                "etag": etags,
                "size_bytes": pa.array(np.arange(per_partition) % 1_000_000),
                "dt": pa.repeat(f"2026-01-{day + 1:02d}", per_partition),
            },
            metadata={"qvl.partition_by": '["dt"]'},
        )
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
        ids = [unit_id(media_id(u), e) for u, e in zip(uris, etags, strict=True)]
        done = ids[: per_partition - LEFT // PARTITIONS]
        name = table_name("media", (("dt", f"2026-01-{day + 1:02d}"),))
        lance.write_dataset(pa.table({"unit_id": done}), str(folder / "root" / f"{name}.lance"))
    writer.close()
    return path


def plan(folder: Path) -> dict[str, float]:
    """Plan in this process; return what it took."""
    from qvl_batch.jobs.identify import identify
    from qvl_batch.jobs.manifest import read_manifest
    from qvl_batch.jobs.plan import plan_units
    from qvl_batch.storage import Storage
    from qvl_batch.tables.store import TableStore

    storage = Storage()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start_s = time.perf_counter()
    manifest = read_manifest(str(folder / "manifest.parquet"), storage, None)
    read_s = time.perf_counter() - start_s
    units = identify(manifest, "media")
    identified_s = time.perf_counter() - start_s
    found = plan_units(
        units,
        TableStore(str(folder / "root"), storage),
        "media",
        extra_fields=manifest.extra_fields,
        num_manifest_rows=manifest.rows.num_rows,
        retry_failed=False,
        max_attempts=3,
        limit=None,
    )
    assert found.todo.num_rows == LEFT, found.todo.num_rows
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "read_s": read_s,
        "identify_s": identified_s - read_s,
        "subtract_s": time.perf_counter() - start_s - identified_s,
        "total_s": time.perf_counter() - start_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_over_imports_mib": (after.ru_maxrss - before.ru_maxrss) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[500_000, 5_000_000])
    parser.add_argument("--folder", type=Path, help="Plan what lies here, print JSON.")
    asked = parser.parse_args()
    if asked.folder:
        print(json.dumps(plan(asked.folder)))
        return
    for num_units in asked.units:
        with tempfile.TemporaryDirectory(prefix="qvl-plan-") as scratch:
            write_inputs(Path(scratch), num_units)
            command = [sys.executable, "-m", "tests.bench.bench_plan", "--folder", scratch]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
        listed = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
        print(f"{num_units:,} units in {PARTITIONS} partitions: {listed}", flush=True)


if __name__ == "__main__":
    main()
