"""What reranking does to first stages of different strength, on the demo world's evaluation set.

    python -m tests.bench.bench_quality              (240 pictures, 60 clips; all are asked for)
    python -m tests.bench.bench_quality --families 20 5

Both models are the shipped checkpoints, in this process and without Ray. Queries are captions,
labels are graded (`qvl_batch.demo.evaluation`); MRR and recall ask for the very scene, nDCG counts
near misses too. Quality is deterministic for one machine and one version of torch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from qvl_batch import Embedder
from qvl_batch.api.reader import ItemReader, parse_items
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir, reranker_dir
from qvl_batch.demo.evaluation import EXACT, EvaluationSet, write_evaluation
from qvl_batch.media.queries import read_labels, read_queries
from qvl_batch.model.encode import encode, truncate
from qvl_batch.model.pairs import Pair
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.ranking import RankingMetrics, metrics
from qvl_batch.recipe import DEFAULT_INSTRUCTION, DocumentBudget, ImageBudget, VideoBudget
from qvl_batch.storage import Storage
from qvl_batch.tables.search import search
from qvl_batch.units import EmbedInput, media_id, row_id, unit_id
from tests.bench.measure import print_table, say

TOP_K = 20
BUDGETS = {
    "image": ImageBudget(**DEMO_RECIPE["image"]),
    "video": VideoBudget(**DEMO_RECIPE["video"]),
    "document": DocumentBudget(**DEMO_RECIPE["document"]),
}


@dataclass(frozen=True)
class FirstStage:
    """How the first stage stores vectors; one with bits alone can not rescore."""

    name: str
    dim: int
    encodings: tuple[str, ...]


WEAK = FirstStage("16 dims, binary", 16, ("binary",))
WEAKER_THAN_FULL = FirstStage("32 dims, binary", 32, ("binary",))
FULL = FirstStage("128 dims, binary + int8", 128, ("binary", "int8"))
STAGES = (WEAK, WEAKER_THAN_FULL, FULL)


@dataclass(frozen=True)
class Change:
    """Metrics of the first stage and after reranking its first `TOP_K`."""

    before: RankingMetrics
    after: RankingMetrics


def bench_quality(written: EvaluationSet, scratch: Path) -> dict[tuple[str, str], Change]:
    """Return what reranking changes, by first stage and by what is asked for.

    The latter is ``picture``, ``clip`` or ``all``; the collection holds both in every case.
    """
    queries = read_queries(str(written.queries_path), Storage()).rows
    labels = read_labels(str(written.labels_path), Storage()).rows
    texts = dict(zip(queries["query_id"].to_pylist(), queries["text"].to_pylist(), strict=True))
    documents, asked = embed(written, list(texts.values()))
    found = {}
    for stage in STAGES:
        table = write_table(written, documents, stage, scratch / f"{stage.dim}.lance")
        vectors = truncate(asked, stage.dim).numpy()
        hits = search({"media": table}, vectors, TOP_K)
        found[stage.name] = hits.append_column("query_id", queries["query_id"].take(hits["query"]))
    scored = rerank(written, texts, found.values())
    changes = {}
    for name, hits in found.items():
        ranked = rank_again(hits, scored)
        for sort in ("picture", "clip", "all"):
            wanted = [query for query in texts if sort == "all" or query.startswith(sort)]
            if wanted:
                ids = pa.array(wanted)
                changes[name, sort] = Change(
                    *(
                        metrics(ranked, labels, rank=rank, relevant_from=EXACT, query_ids=ids)
                        for rank in ("rank", "rank_after")
                    )
                )
    return changes


def embed(written: EvaluationSet, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the full vectors of the media and of the queries, float32 (n, 128)."""
    media = [_item(written, item.path) for item in written.items]
    with Embedder(
        embedding_dir(),
        # Trained with one instruction for both sides.
        instruction=DEFAULT_INSTRUCTION,
        max_tokens=DEMO_RECIPE["max_tokens"],
        **BUDGETS,
    ) as embedder:
        return torch.from_numpy(embedder.embed(media)), torch.from_numpy(embedder.embed(texts))


def write_table(
    written: EvaluationSet, vectors: torch.Tensor, stage: FirstStage, path: Path
) -> lance.LanceDataset:
    """Write the media's vectors as the first stage stores them."""
    columns = encode(vectors, stage.dim, stage.encodings)
    uris = [str(written.media_dir / item.path) for item in written.items]
    # Of the path in the set, not on this disk: equal Hamming distances are ordered by row_id.
    ids = [row_id(unit_id(media_id(item.path), None), 0) for item in written.items]
    nothing = pa.nulls(len(uris), pa.float64())
    rows = {
        "row_id": pa.array(ids),
        "uri": pa.array(uris),
        "kind": pa.array([path.split("/")[0] for path in uris]),
        "page": nothing.cast(pa.int32()),
        "start_s": nothing,
        "end_s": nothing,
        "text": nothing.cast(pa.string()),
    }
    return lance.write_dataset(
        pa.table(rows | {name: _column(values) for name, values in columns.items()}), str(path)
    )


def _column(values: npt.NDArray[np.generic]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def rerank(
    written: EvaluationSet, texts: dict[str, str], found: Sequence[pa.Table]
) -> dict[tuple[str, str], float]:
    """Return the score of every (query_id, uri) that any first stage found, each scored once.

    Raises:
        UnitError: If a pair failed.
    """
    engine = RerankEngine(reranker_dir(), max_tokens=DEMO_RECIPE["max_tokens"])
    reader = ItemReader(engine.tokenizer, storage=Storage(), **BUDGETS)
    paths = {str(written.media_dir / item.path): item.path for item in written.items}
    try:
        documents = {
            uri: reader.read(parse_items([_item(written, path)], "document")[0], fit=False)
            for uri, path in paths.items()
        }
    finally:
        reader.close()
    asked = {query: EmbedInput(texts=(text,)) for query, text in texts.items()}
    wanted = sorted(
        {
            pair
            for hits in found
            for pair in zip(hits["query_id"].to_pylist(), hits["uri"].to_pylist(), strict=True)
        }
    )
    scores = engine.score_pairs([Pair(asked[query], documents[uri]) for query, uri in wanted])
    for score in scores:
        if not isinstance(score, float):
            raise score
    say(
        f"{engine.counts.num_pairs:,} pairs of {len(asked)} queries; "
        f"{engine.counts.num_visions_encoded} pictures and clips encoded for "
        f"{engine.counts.num_visions:,} uses."
    )
    return dict(zip(wanted, scores, strict=True))


def rank_again(hits: pa.Table, scored: dict[tuple[str, str], float]) -> pa.Table:
    """Return the hits with ``rank_after``: by falling score, equal ones as they were."""
    pairs = zip(hits["query_id"].to_pylist(), hits["uri"].to_pylist(), strict=True)
    scores = np.array([scored[pair] for pair in pairs])
    query = hits["query"].to_numpy()
    order = np.lexsort((hits["rank"].to_numpy(), -scores, query))
    begins = np.searchsorted(query, query)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order)) - begins + 1
    return hits.append_column("rank_after", pa.array(rank))


def _item(written: EvaluationSet, path: str) -> dict[str, Path]:
    return {"video" if path.endswith(".mp4") else "image": written.media_dir / path}


def print_changes(written: EvaluationSet, changes: dict[tuple[str, str], Change]) -> None:
    rows = []
    for (stage, sort), change in changes.items():
        pairs = [
            (change.before.recall_at_1, change.after.recall_at_1),
            (change.before.ndcg_at_10, change.after.ndcg_at_10),
            (change.before.mrr_at_10, change.after.mrr_at_10),
            (change.before.recall_at_10, change.after.recall_at_10),
        ]
        rows.append(
            (
                stage,
                sort,
                change.before.num_queries,
                *(f"{before:.3f} → {after:.3f}" for before, after in pairs),
                f"{change.before.recall_at_k[TOP_K]:.3f}",
            )
        )
    scenes = pc.value_counts(
        pa.array([type(item.scene).__name__.lower() for item in written.items])
    )
    mix = ", ".join(f"{row['counts'].as_py()} {row['values'].as_py()}" for row in scenes)
    print_table(
        f"Reranking the first {TOP_K} of a collection of {len(written.items)} held-out scenes "
        f"({mix}), families of four hard negatives",
        (
            "first stage",
            "asked for",
            "queries",
            "recall@1",
            "nDCG@10",
            "MRR@10",
            "recall@10",
            f"recall@{TOP_K}",
        ),
        rows,
    )


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", type=int, nargs=2, default=(60, 15), metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qvl-quality-") as scratch:
        pictures, clips = asked.families
        written = write_evaluation(
            Path(scratch) / "set", picture_families=pictures, clip_families=clips, seed=asked.seed
        )
        print_changes(written, bench_quality(written, Path(scratch)))
    say(f"Took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
