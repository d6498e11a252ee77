"""What half of the dimensions and what int8 save, and what they cost.

    python -m tests.bench.bench_claims --cache FOLDER

The tables are those of `bench_search`; 512 dimensions are the first half of 1,024, renormalised.
Recall@10 is against an exact float32 search with all 1,024 dimensions.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from qvl_batch.tables.search import SHORTLIST
from tests.bench.bench_search import (
    DIM,
    RQ_NPROBES,
    RQ_REFINE,
    Bed,
    Line,
    build_index,
    float_line,
    make_bed,
    our_line,
    recall,
)
from tests.bench.measure import print_machine, print_table, say

NPROBES = 8


def lines_of(bed: Bed, whole: Bed, scan_queries: int) -> list[Line]:
    """Measure every way to store the vectors of a bed; recall is against those of ``whole``."""
    lines = []
    truth = whole.truth["float32"]
    for name in ("float32", "float16"):
        _, alone, together = float_line(bed, name, scan_queries, use_index=False)
        size, share = bed.bytes_a_row(name, indexed=False), recall(truth, bed.truth[name])
        lines.append(Line(f"{name} scan", size, alone, together, share))
    build_index(bed, "float16", "vector", "IVF_RQ", metric="dot", num_bits=1)
    options = {"nprobes": RQ_NPROBES, "refine_factor": RQ_REFINE}
    found, alone, together = float_line(bed, "float16", len(bed.queries), **options)
    size = bed.bytes_a_row("float16", indexed=True)
    lines.append(Line("float16 IVF_RQ", size, alone, together, recall(truth, found)))
    build_index(bed, "ours", "vector_bits", "IVF_FLAT", metric="hamming")
    known = Bed(bed.rows, bed.folder, bed.queries, whole.truth)
    lines.append(our_line(known, "binary + int8, scan", scan_queries))
    lines.append(our_line(known, "binary + int8, index", 100, nprobes={"t": NPROBES}))
    return lines


def bench(whole: Bed, half: Bed, scan_queries: int) -> None:
    """Measure and print both claims."""
    big, small = (lines_of(bed, whole, scan_queries) for bed in (whole, half))
    print_table(
        f"1,024 and 512 dimensions, {whole.rows:,} rows; CPU-ms a query, alone and in a call",
        (
            "",
            *("bytes/row", "512", "times less"),
            *("alone", "512", "times less"),
            *("in a call", "512", "times less"),
            *("recall@10", "512"),
        ),
        [
            (
                a.name,
                *(a.bytes_a_row, b.bytes_a_row, a.bytes_a_row / b.bytes_a_row),
                *(a.alone_ms, b.alone_ms, a.alone_ms / b.alone_ms),
                *(a.together_ms, b.together_ms, a.together_ms / b.together_ms),
                *(f"{a.recall:.4f}", f"{b.recall:.4f}"),
            )
            for a, b in zip(big, small, strict=True)
        ],
    )
    scan, int8 = big[0], big[3]
    exhaustive = recall(whole.truth["float32"], whole.truth["int8"])
    print_table(
        f"int8 (with its signs) and float32, {whole.rows:,} x {DIM}",
        ("", "float32", "binary + int8", "times less"),
        [
            ("bytes/row", scan.bytes_a_row, int8.bytes_a_row, scan.bytes_a_row / int8.bytes_a_row),
            ("scan, CPU-ms alone", scan.alone_ms, int8.alone_ms, scan.alone_ms / int8.alone_ms),
            (
                "scan, CPU-ms in a call",
                *(scan.together_ms, int8.together_ms, scan.together_ms / int8.together_ms),
            ),
            ("recall@10, all rows scored", "1.0000", f"{exhaustive:.4f}", "-"),
            (f"recall@10, shortlist {SHORTLIST}", "1.0000", f"{int8.recall:.4f}", "-"),
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--scan-queries", type=int, default=10, help="of a scan, alone (10)")
    parser.add_argument("--cache", type=Path, help="where tables stay; else a temporary folder")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    print_machine(torch.device("cpu"))
    folder = asked.cache or Path(tempfile.mkdtemp(prefix="qvl-bench-"))
    try:
        beds = [make_bed(folder, asked.rows, asked.queries, keep) for keep in (DIM, DIM // 2)]
        bench(*beds, asked.scan_queries)
    finally:
        if asked.cache is None:
            shutil.rmtree(folder)
    say(f"Load at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
