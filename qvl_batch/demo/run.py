"""`qvl-batch demo`: draw a corpus, embed it on local Ray, search it, rerank, write a gallery."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from qvl_batch.config import commented_yaml, load_config
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir, reranker_dir
from qvl_batch.demo.corpus import CorpusSummary, write_corpus
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.errors import StorageError
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.storage import Storage

TOP_K = 10
PRINTED = 3


def run_demo(out: Path) -> int:
    """Run the whole demo under ``out``, which may hold an earlier one; return the exit code.

    Raises:
        StorageError: If the folder can not be written.
        QvlError: Whatever the embed job raises.
    """
    console = Console()
    started_s = time.monotonic()

    def step(text: str) -> None:
        console.print(
            f"[bold cyan]{time.monotonic() - started_s:5.1f} s[/]  {text}", soft_wrap=True
        )

    try:
        out.mkdir(parents=True, exist_ok=True)
        summary = write_corpus(out)
    except OSError as error:
        raise StorageError(
            f"{out} can not be written ({error.strerror}).", "Choose another folder with --out."
        ) from None
    step(
        f"drew {len(summary.files)} files (pictures, pages, clips, notes, a PDF, "
        f"{len(summary.broken)} broken on purpose) in {summary.media_dir}"
    )
    manifest, config = out / "manifest.parquet", out / "embed.yaml"
    _write_manifest(summary, manifest)
    step(f"listed them in {manifest}")
    config.write_text(commented_yaml(_settings(out, manifest)), encoding="utf-8")
    step(f"embedding with {config} through local Ray (starting it takes a while) …")

    from qvl_batch.jobs.embed import run_embed
    from qvl_batch.jobs.verify import verify

    report = run_embed(load_config(str(config)), echo=lambda line: step(line))
    if report.exit_code:
        return report.exit_code
    root = str(out / "vectors")
    checked = verify(root, Storage(), manifest=str(manifest))
    step(str(checked).replace("\n", "; "))
    found = answer(root)
    step(f"searched the tables for {len(DEMO_QUERIES)} queries, the best {TOP_K} rows of each")
    reranked = rerank(found)
    step("scored each of them once more with the shipped reranker")
    _print_answers(console, found, reranked, summary)
    gallery, counts = out / "gallery.html", first_hits(found, reranked, summary)
    write_page(gallery, reranked, {"Vectors": summary.num_rows, "First hit right": counts})
    step(f"first hit right: {counts} (a toy reranker, weaker than the embedder at full precision)")
    step(f"pages, pictures and key frames to look at: {gallery.resolve()}")
    step("the same by hand:")
    console.print(_how_to_go_on(out, manifest, config, root), soft_wrap=True, highlight=False)
    return 1 if checked.problems else 0


def _write_manifest(summary: CorpusSummary, manifest: Path) -> None:
    from qvl_batch.media.manifest import build_manifest

    build_manifest(str(summary.media_dir), str(manifest), storage=Storage(), partition_from=None)


def _settings(out: Path, manifest: Path) -> dict[str, Any]:
    return {
        "input": {"manifest": str(manifest)},
        "output": {"root": str(out / "vectors")},
        # The shipped checkpoint was trained with one instruction for both sides.
        "model": {"path": str(embedding_dir()), "query_instruction": DEFAULT_INSTRUCTION},
        "recipe": DEMO_RECIPE,
    }


def _print_answers(
    console: Console,
    hits: Sequence[pa.Table],
    reranked: Sequence[pa.Table],
    summary: CorpusSummary,
) -> None:
    for query, found, again in zip(DEMO_QUERIES, hits, reranked, strict=True):
        right = set(summary.answers(query))
        second = {hit["row_id"]: hit["rerank_score"] for hit in again.to_pylist()}
        table = Table(title=f"“{query.text}”", title_justify="left", expand=False)
        table.add_column("score", justify="right")
        table.add_column("rerank", justify="right")
        table.add_column("file", overflow="fold")
        table.add_column("what it shows", overflow="fold")
        table.add_column("right", justify="center")
        for hit in found.slice(0, PRINTED).to_pylist():
            path, segment = _place(hit, summary)
            file = next(file for file in summary.files if file.path == path)
            table.add_row(
                f"{hit['score']:.3f}",
                f"{second[hit['row_id']]:.3f}",
                f"{path}, page {segment + 1}" if hit["kind"] == "document" else path,
                file.captions[segment],
                "yes" if (path, segment) in right else "",
            )
        console.print(table)
    console.print(f"files are under {summary.media_dir.resolve()}", soft_wrap=True)


def first_hits(
    before: Sequence[pa.Table], after: Sequence[pa.Table], summary: CorpusSummary
) -> str:
    """Return how often the first hit is a right one, by search and after reranking, as counted."""

    def count(hits: Sequence[pa.Table]) -> int:
        return sum(
            _place(found.slice(0, 1).to_pylist()[0], summary) in summary.answers(query)
            for query, found in zip(DEMO_QUERIES, hits, strict=True)
        )

    return f"{count(before)} of {len(before)} by search, {count(after)} after reranking"


def _place(hit: Mapping[str, Any], summary: CorpusSummary) -> tuple[str, int]:
    """Return (path within the media, segment) of a hit, as the corpus names its answers."""
    path = str(Path(hit["uri"]).relative_to(summary.media_dir.resolve()))
    return path, int(hit["row_id"].rpartition(":")[2])


def answer(root: str, top_k: int = TOP_K) -> list[pa.Table]:
    """Return the hits of every demo query, in order, from the tables under ``root``."""
    from qvl_batch.api.gallery import GALLERY_COLUMNS
    from qvl_batch.model.engine import EmbedEngine
    from qvl_batch.tables.search import search
    from qvl_batch.tables.store import TableStore
    from qvl_batch.units import EmbedInput

    store = TableStore(root, Storage())
    tables = {name: store.open(name) for name in store.names() if not name.startswith("_")}
    engine = EmbedEngine(
        embedding_dir(),
        dim=DEMO_RECIPE["dim"],
        encodings=("float32",),
        instruction=DEFAULT_INSTRUCTION,
        max_tokens=DEMO_RECIPE["max_tokens"],
        token_layout="unnested",
    )
    vectors = engine.embed_vectors([EmbedInput(texts=(query.text,)) for query in DEMO_QUERIES])
    found = search(tables, vectors, top_k, columns=GALLERY_COLUMNS)
    return [found.filter(pc.equal(found["query"], i)) for i in range(len(vectors))]


def rerank(hits: Sequence[pa.Table]) -> list[pa.Table]:
    """Return the hits of every demo query by falling score of the shipped reranker.

    ``score`` becomes ``first_score``; ``rerank_score``, ``rank_before`` and ``rank`` are new. A
    document that can not be read any more has no score and comes last.
    """
    from qvl_batch.api.reranker import Reranker

    budgets = {name: DEMO_RECIPE[name] for name in ("image", "video", "document")}
    reranked = []
    with Reranker(reranker_dir(), **budgets) as reranker:
        for query, found in zip(DEMO_QUERIES, hits, strict=True):
            items = [_item(hit) for hit in found.to_pylist()]
            scores, _ = reranker.score(query.text, items, errors="return")
            reranked.append(_reordered(found, scores))
    return reranked


def _item(hit: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the reranker takes it."""
    if hit["kind"] == "text":
        return {"text": hit["text"]}
    if hit["kind"] == "document":
        return {"document": hit["uri"], "page": hit["page"]}
    return {hit["kind"]: hit["uri"]}


def _reordered(found: pa.Table, scores: np.ndarray) -> pa.Table:
    """Return the hits with their second scores, sorted by them, NaN last."""
    ranks = pa.array(range(1, found.num_rows + 1), pa.int32())
    names = [name for name in found.column_names if name != "rank"]
    rows = found.select(names).rename_columns({"score": "first_score"})
    rows = rows.append_column("rank_before", ranks)
    rows = rows.append_column("rerank_score", pa.array(scores, pa.float32()))
    order = pc.sort_indices(
        rows, sort_keys=[("rerank_score", "descending"), ("rank_before", "ascending")]
    )
    return rows.take(order).append_column("rank", ranks)


def write_page(path: Path, hits: Sequence[pa.Table], facts: Mapping[str, object]) -> None:
    """Write the gallery of the hits of every demo query."""
    from qvl_batch.api.gallery import GallerySection, write_gallery

    stored = f"{' and '.join(DEMO_RECIPE['encodings'])}, {DEMO_RECIPE['dim']} dimensions"
    write_gallery(
        path,
        [
            GallerySection(query=query.text, hits=found)
            for query, found in zip(DEMO_QUERIES, hits, strict=True)
        ],
        title="What the demo found",
        facts={"Models": "the shipped demo checkpoints", "Stored as": stored, **facts},
        storage=Storage(),
    )


def _how_to_go_on(out: Path, manifest: Path, config: Path, root: str) -> str:
    return f"""\
  qvl-batch manifest {out / "media"} {manifest}
  qvl-batch embed {config}
  qvl-batch verify {root} --manifest {manifest}
With your own media and the real model (on a machine or cluster with a GPU):
  qvl-batch manifest s3://your-bucket/prefix manifest.parquet
  qvl-batch init embed.yaml --manifest manifest.parquet --root s3://your-bucket/vectors \\
      --model Qwen/Qwen3-VL-Embedding-2B
  qvl-batch embed embed.yaml"""
