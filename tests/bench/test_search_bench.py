"""The search benchmarks on a tiny size: right recalls, sizes and hits; nothing about time."""

import urllib.request

import numpy as np
import pytest

from tests.bench import bench_claims, bench_fanout, bench_search
from tests.bench.vectors import Source


@pytest.fixture(scope="module")
def beds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return [bench_search.make_bed(folder, 4096, 20, keep) for keep in (1024, 512)]


def test_recall_counts_what_was_found():
    truth = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert bench_search.recall(truth, np.array([[4, 3, 9, 9], [5, 6, 7, 8]])) == 0.75


def test_vectors_are_unit_and_the_same_again():
    source = Source(64, 25_000, keep=32)
    first, second = (np.concatenate(list(source.rows())) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (25_000, 32)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    energy = (first**2).mean(axis=0)
    assert energy[:16].sum() > energy[16:].sum()


def test_the_search_bench_ranks_the_ways(beds, capsys):
    bed = beds[0]
    lines = bench_search.bench(bed, build_rq=True, scan_queries=2)
    float32, float16, quantised, scan, indexed = lines
    assert float32.recall == 1
    assert float16.recall > 0.98
    # 4,096 rows in 200 or so: the shortlist is enough, and what is left out is int8's.
    assert scan.recall == pytest.approx(bed.recall(bed.truth["int8"]), abs=0.02)
    assert indexed.recall >= bench_search.LEAST_SHARE * bed.recall(bed.truth["int8"])
    assert quantised.recall > 0.9
    assert indexed.bytes_a_row < float32.bytes_a_row / 3 < float16.bytes_a_row
    assert scan.bytes_a_row < indexed.bytes_a_row
    assert "100.0 % are NumPy's" in capsys.readouterr().out


def test_the_claims_bench_prints_both(beds, capsys):
    bench_claims.bench(*beds, scan_queries=2)
    printed = capsys.readouterr().out
    assert "1,024 and 512 dimensions, 4,096 rows" in printed
    assert "int8 (with its signs) and float32" in printed


def test_the_fanout_bench_finds_what_the_union_holds(monkeypatch, capsys):
    for name, value in bench_fanout.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with bench_fanout.counted_server() as url:
        bucket = urllib.request.Request(f"{url}/bench-bucket", method="PUT")
        urllib.request.urlopen(bucket).close()
        found = bench_fanout.bench(url, "s3://bench-bucket/root", 4, 100, dim=64)
    assert found["split"].drop_columns("table").equals(found["union"].drop_columns("table"))
    lists = {row[0]: row[1] for row in found["rows"]}
    gets = {row[0]: row[2] for row in found["rows"]}
    # The root, the catalog and each table; what is not asked for is not opened.
    assert lists["ours, another query"] == 4 + 2
    assert lists["ours, another query, tables kept"] == 0
    assert gets["ours, the same again"] < gets["LanceDB, 4 x open and search, 16 threads"]
    assert "those of a search over the union: yes" in capsys.readouterr().out
