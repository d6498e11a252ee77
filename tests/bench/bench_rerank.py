"""(c) The reranker with and without reuse of vision features and of a query's prefix.

    python -m tests.bench --only rerank

Three queries meet the same documents, as a reranking job has it: most queries of a batch share
candidates. Documents are half texts, half pictures; scores are compared with those of the engine
that reuses nothing.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvl_batch.model.pairs import Pair
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.units import EmbedInput
from tests.bench.beds import Bed
from tests.bench.inputs import picture_input, text_of
from tests.bench.measure import (
    clock_name,
    interleaved,
    max_abs_diff,
    median_ratio,
    print_table,
)

NOTHING = "nothing reused"
WAYS: dict[str, dict[str, bool]] = {
    NOTHING: {"reuse_vision": False, "reuse_prefix": False},
    "vision features": {"reuse_vision": True, "reuse_prefix": False},
    "query prefix": {"reuse_vision": False, "reuse_prefix": True},
    "both": {"reuse_vision": True, "reuse_prefix": True},
}
QUERIES = 3


@dataclass(frozen=True)
class RerankResult:
    """By number of candidates and way: speed as a multiple of no reuse, and |Δ score| to it."""

    speed_up: dict[tuple[int, str], float]
    max_abs_diff: dict[tuple[int, str], float]


def bench_rerank(
    bed: Bed, *, candidates: tuple[int, ...], side_px: int, rounds: int, batch_tokens: int
) -> RerankResult:
    """Measure and print one table; documents are pictures of ``side_px`` squared and texts."""
    rows: list[tuple[Any, ...]] = []
    speed_up, differences = {}, {}
    clock = clock_name(bed.device)
    for count in candidates:
        queries, documents = _pairs(count, side_px)
        # An engine of its own for each way: whatever one keeps must not serve another.
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(
                _scores, bed.reranker(batch_tokens, **options), queries, documents
            )
            for name, options in WAYS.items()
        }
        scores, seconds = interleaved(bed.device, calls, rounds)
        for name in calls:
            median = statistics.median(seconds[name])
            ratio = median_ratio(seconds[NOTHING], seconds[name])
            difference = max_abs_diff(scores[name], scores[NOTHING])
            rows.append((count, name, median, QUERIES * count / median, f"{ratio:.2f}", difference))
            speed_up[count, name], differences[count, name] = ratio, difference
    print_table(
        f"(c) Reranking: {QUERIES} queries (one with a picture) x candidates (half texts, half "
        f"pictures of {side_px}x{side_px} px); median of at most {rounds} rounds",
        ("candidates", "reused", clock, f"pairs/{clock}", "x faster", "max |Δ score|"),
        rows,
    )
    return RerankResult(speed_up, differences)


def _pairs(count: int, side_px: int) -> tuple[list[EmbedInput], list[EmbedInput]]:
    rng = random.Random(3)
    queries = [EmbedInput(texts=(text_of(20, rng),)) for _ in range(QUERIES - 1)]
    queries.append(picture_input(side_px, side_px, seed=999))
    documents = [
        picture_input(side_px, side_px, seed=number)
        if number % 2
        else EmbedInput(texts=(text_of(rng.randint(60, 200), rng),))
        for number in range(count)
    ]
    return queries, documents


def _scores(
    engine: RerankEngine, queries: list[EmbedInput], documents: list[EmbedInput]
) -> np.ndarray:
    """Return float32 scores, shape (queries, documents).

    Raises:
        UnitError: If a pair failed.
    """
    scores = engine.score_pairs([Pair(q, document) for q in queries for document in documents])
    failures = [score for score in scores if not isinstance(score, float)]
    if failures:
        raise failures[0]
    return np.array(scores, np.float32).reshape(len(queries), len(documents))
