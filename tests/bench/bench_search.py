"""Search over generated vectors: bytes, CPU and recall of every way to store them.

    python -m tests.bench.bench_search --cache FOLDER --build-rq
    python -m tests.bench.bench_search --rows 20000 --queries 100

Tables and indexes stay in the cache folder (8 GB at 1,000,000 rows) and are used again. CPU is that
of all threads of this process. Recall@10 is measured against a float32 product in NumPy over all
queries; that of a scan is the recall of such a product over the column as it is stored.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import lance
import numpy as np
import numpy.typing as npt
import torch

from qvl_batch.model.encode import quantise_int8
from qvl_batch.tables.search import SHORTLIST, search
from tests.bench.measure import print_machine, print_table, say
from tests.bench.vectors import Source, Vectors, size_bytes, write_table

DIM = 1024
TOP_K = 10
LEAST_SHARE = 0.99
LADDER = ((50, 100, 200, 300, 400), (1, 2, 4, 8, 16))
# What refines the quantised index best for its cost (measured at 100,000 rows).
RQ_NPROBES, RQ_REFINE = 24, 5

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bed:
    """Tables of one size, the queries, and what is true of them."""

    rows: int
    folder: Path
    queries: Vectors
    truth: dict[str, Ids]

    # Open tables hold their metadata and index, as a reader's do.
    opened: dict[str, lance.LanceDataset] = field(default_factory=dict)

    def table(self, name: str) -> lance.LanceDataset:
        if name not in self.opened:
            self.opened[name] = lance.dataset(str(self.folder / f"{name}.lance"))
        return self.opened[name]

    def bytes_a_row(self, name: str, *, indexed: bool) -> float:
        path = self.folder / f"{name}.lance"
        left_out = 0 if indexed else size_bytes(path / "_indices")
        return (size_bytes(path) - left_out) / self.rows

    def recall(self, found: Ids) -> float:
        return recall(self.truth["float32"][: len(found)], found)


@dataclass(frozen=True)
class Line:
    """One way to search: CPU-ms a query, alone and of many in a call, and its recall."""

    name: str
    bytes_a_row: float
    alone_ms: float | None
    together_ms: float | None
    recall: float | None
    note: str = ""


def recall(truth: Ids, found: Ids) -> float:
    """Return the mean share of each row of ``truth`` that stands in the same row of ``found``."""
    pairs = zip(truth, found, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs]))


def make_bed(folder: Path, rows: int, num_queries: int, keep: int = DIM) -> Bed:
    """Return the tables of this size, cut to ``keep`` dimensions; what is not there is made."""
    folder = folder / f"{rows}x{keep}"
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(DIM, rows, keep=keep)
    for name, encodings in (
        ("ours", ("binary", "int8")),
        ("float16", ("float16",)),
        ("float32", ("float32",)),
    ):
        write_table(folder / f"{name}.lance", source, encodings)
    queries = source.queries(num_queries)
    kept = folder / f"truth-{num_queries}.npz"
    if not kept.exists():
        np.savez(kept, **true_neighbours(source.rows(), queries))
    with np.load(kept) as truth:
        return Bed(rows, folder, queries, dict(truth))


def true_neighbours(chunks: Iterator[Vectors], queries: Vectors) -> dict[str, Ids]:
    """Return the top 10 of an exhaustive scan of each column, as positions of rows (q, 10)."""
    kept: dict[str, tuple[Vectors, Ids]] = {}
    start = 0
    for vectors in chunks:
        ints, scale = (part.numpy() for part in quantise_int8(torch.from_numpy(vectors)))
        scores = {
            "float32": queries @ vectors.T,
            "float16": queries @ vectors.astype(np.float16).astype(np.float32).T,
            "int8": queries @ ints.astype(np.float32).T * scale,
        }
        rows = np.broadcast_to(np.arange(start, start + len(vectors)), scores["int8"].shape)
        for name, found in scores.items():
            before = kept.get(name, (found[:, :0], rows[:, :0]))
            all_scores = np.concatenate([before[0], found], axis=1)
            all_rows = np.concatenate([before[1], rows], axis=1)
            top = np.argpartition(-all_scores, TOP_K - 1, axis=1)[:, :TOP_K]
            kept[name] = tuple(
                np.take_along_axis(one, top, axis=1) for one in (all_scores, all_rows)
            )
        start += len(vectors)
    return {name: rows for name, (_, rows) in kept.items()}


def lists_of(rows: int) -> int:
    return max(2, rows // 2048)


def build_index(bed: Bed, name: str, column: str, kind: str, **options: Any) -> str:
    """Build an index unless it is there; return what it cost."""
    dataset = bed.table(name)
    if dataset.describe_indices():
        return ""
    start = time.process_time()
    dataset.create_index(
        column, kind, name=f"{column}_idx", num_partitions=lists_of(bed.rows), **options
    )
    return f"built in {time.process_time() - start:.0f} CPU-s"


def cpu_ms(call: Callable[[], Ids], queries: int) -> tuple[Ids, float]:
    """Return a call's result and its CPU-ms a query."""
    start = time.process_time()
    found = call()
    return found, 1000 * (time.process_time() - start) / queries


def numbers(row_ids: list[str], queries: int) -> Ids:
    """Return the positions that stand in generated row_ids, one row a query."""
    return np.array([int(one.split(":")[0], 16) for one in row_ids]).reshape(queries, -1)


def float_line(bed: Bed, name: str, queries: int, **nearest: Any) -> tuple[Ids, float, float]:
    """Search a float table with Lance: rows found, CPU-ms alone and of 16 in one call."""
    dataset = bed.table(name)
    settings = {"column": "vector", "k": TOP_K, "metric": "dot"} | nearest
    columns = ["row_id", "_distance", "uri", "kind", "page", "start_s", "end_s", "text"]

    def ask(query: Vectors) -> list[str]:
        found = dataset.to_table(columns=columns, nearest=settings | {"q": query})
        return found["row_id"].to_pylist()

    ask(bed.queries[0])
    some = bed.queries[:queries]

    def one_by_one() -> Ids:
        return np.concatenate([numbers(ask(query), 1) for query in some])

    found, alone = cpu_ms(one_by_one, len(some))
    few = bed.queries[:16]
    _, together = cpu_ms(lambda: numbers(ask(few), len(few)), len(few))
    return found, alone, together


def ours(bed: Bed, queries: Vectors, **options: Any) -> Ids:
    found = search({"t": bed.table("ours")}, queries, TOP_K, **options)
    return numbers(found["row_id"].to_pylist(), len(queries))


def our_line(bed: Bed, name: str, singles: int, **options: Any) -> Line:
    """Search our table: all queries in one call, and some of them alone."""
    ours(bed, bed.queries[:1], **options)
    found, together = cpu_ms(lambda: ours(bed, bed.queries, **options), len(bed.queries))

    def one_by_one() -> Ids:
        return np.concatenate(
            [ours(bed, query, **options) for query in bed.queries[:singles, None]]
        )

    _, alone = cpu_ms(one_by_one, singles)
    size = bed.bytes_a_row("ours", indexed="nprobes" in options)
    return Line(name, size, alone, together, bed.recall(found))


def bench(bed: Bed, *, build_rq: bool, scan_queries: int) -> list[Line]:
    """Measure every way and print it; return the lines."""
    lines = []
    for name in ("float32", "float16"):
        found, alone, together = float_line(bed, name, scan_queries, use_index=False)
        same = recall(bed.truth[name][: len(found)], found)
        note = f"{len(found)} queries alone, 16 in a call; {100 * same:.1f} % are NumPy's"
        size = bed.bytes_a_row(name, indexed=False)
        lines.append(Line(f"{name} scan", size, alone, together, bed.recall(bed.truth[name]), note))
    name = f"float16 IVF_RQ, {RQ_NPROBES} probes, refine {RQ_REFINE}"
    if build_rq or bed.table("float16").describe_indices():
        note = build_index(bed, "float16", "vector", "IVF_RQ", metric="dot", num_bits=1)
        options = {"nprobes": RQ_NPROBES, "refine_factor": RQ_REFINE}
        found, alone, together = float_line(bed, "float16", len(bed.queries), **options)
        size = bed.bytes_a_row("float16", indexed=True)
        lines.append(Line(name, size, alone, together, bed.recall(found), note))
    else:
        lines.append(Line(name, 0.0, None, None, None, "not built (--build-rq)"))
    lines.append(our_line(bed, f"ours, scan, shortlist {SHORTLIST}", scan_queries))
    note = build_index(bed, "ours", "vector_bits", "IVF_FLAT", metric="hamming")
    best = ladder(bed)
    singles = min(100, len(bed.queries))
    line = our_line(
        bed, f"ours, index, shortlist {SHORTLIST}, {best} probes", singles, nprobes={"t": best}
    )
    lines.append(Line(**(vars(line) | {"note": note})))
    exhaustive = bed.recall(bed.truth["int8"])
    float16_ms, float32_bytes = lines[1].alone_ms, lines[0].bytes_a_row
    print_table(
        f"{bed.rows:,} x {bed.queries.shape[1]}, {len(bed.queries)} queries. Recall@10 of an "
        f"exhaustive scan of the int8 column: {exhaustive:.4f}",
        (
            "",
            "bytes/row",
            "of float32",
            "CPU-ms alone",
            "float16 / it",
            "in a call",
            "recall@10",
            "",
        ),
        [
            (
                line.name,
                line.bytes_a_row,
                line.bytes_a_row / float32_bytes,
                "-" if line.alone_ms is None else line.alone_ms,
                "-" if line.alone_ms is None else float16_ms / line.alone_ms,
                "-" if line.together_ms is None else line.together_ms,
                "-" if line.recall is None else f"{line.recall:.4f}",
                line.note,
            )
            for line in lines
        ],
    )
    return lines


def ladder(bed: Bed) -> int:
    """Print recall and CPU by shortlist and probes; return the fewest probes that suffice.

    They suffice with `LEAST_SHARE` of the recall of an exhaustive scan of the int8 column, at the
    default shortlist.
    """
    shortlists, probes = LADDER
    exhaustive = bed.recall(bed.truth["int8"])
    rows, enough = [], 0
    for nprobes in (*probes, None):
        used = {} if nprobes is None else {"nprobes": {"t": nprobes}}
        cells = []
        for shortlist in shortlists:
            found, spent = cpu_ms(
                lambda used=used, shortlist=shortlist: ours(
                    bed, bed.queries, shortlist=shortlist, **used
                ),
                len(bed.queries),
            )
            share = bed.recall(found) / exhaustive
            cells.append(f"{bed.recall(found):.4f} = {share:.4f}, {spent:.2f}")
            if nprobes and shortlist == SHORTLIST and share >= LEAST_SHARE:
                enough = enough or nprobes
        rows.append((nprobes or "scan", *cells))
    print_table(
        f"{bed.rows:,} rows: recall@10 = share of the int8 scan's, CPU-ms a query of "
        f"{len(bed.queries)} in a call",
        ("probes", *(f"shortlist {shortlist}" for shortlist in shortlists)),
        rows,
    )
    return enough or probes[-1]


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--scan-queries", type=int, default=10, help="of a scan, alone (10)")
    parser.add_argument("--cache", type=Path, help="where tables stay; else a temporary folder")
    parser.add_argument("--build-rq", action="store_true", help="80 CPU-s at 1,000,000 rows")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    print_machine(torch.device("cpu"))
    folder = asked.cache or Path(tempfile.mkdtemp(prefix="qvl-bench-"))
    try:
        found = {}
        for rows in asked.rows:
            bed = make_bed(folder, rows, asked.queries)
            found[rows] = bench(bed, build_rq=asked.build_rq, scan_queries=asked.scan_queries)
    finally:
        if asked.cache is None:
            shutil.rmtree(folder)
    if len(found) > 1:
        few, many = min(found), max(found)
        print_table(
            f"Growth: CPU-ms a query alone, {few:,} and {many:,} rows",
            ("", f"{few:,}", f"{many:,}", "times"),
            [
                (small.name, small.alone_ms, big.alone_ms, big.alone_ms / small.alone_ms)
                for small, big in zip(found[few], found[many], strict=True)
                if small.alone_ms and big.alone_ms
            ],
        )
    say(f"Load at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
