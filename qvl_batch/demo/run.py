"""`qvl-batch demo`: draw a corpus, embed it on local Ray, search it, rerank, write a gallery."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from qvl_batch.rerank_config import commented_rerank_yaml, load_rerank_config
from qvl_batch.storage import Storage

TOP_K = 10
PRINTED = 3
_BUDGETS = ("image", "video", "document")


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
    from qvl_batch.jobs.index import run_index
    from qvl_batch.jobs.rerank import run_rerank
    from qvl_batch.jobs.verify import verify

    report = run_embed(load_config(str(config)), echo=lambda line: step(line))
    if report.exit_code:
        return report.exit_code
    root = str(out / "vectors")
    checked = verify(root, Storage(), manifest=str(manifest))
    step(str(checked).replace("\n", "; "))
    run_index(root, Storage(), local=True, echo=step)
    ranking = out / "rerank.yaml"
    ranking.write_text(commented_rerank_yaml(_ranking(out, root)), encoding="utf-8")
    step(f"searching for {len(DEMO_QUERIES)} queries and reranking with {ranking} …")
    reranked_by = run_rerank(load_rerank_config(str(ranking)), echo=step)
    if reranked_by.exit_code:
        return reranked_by.exit_code
    hits = read_hits(root)
    _print_answers(console, hits, summary)
    gallery, counts = out / "gallery.html", first_hits(hits, summary)
    write_page(gallery, hits, {"Vectors": summary.num_rows, "First hit right": counts})
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


def _ranking(out: Path, root: str) -> dict[str, Any]:
    """Write the demo's queries as a list, and return the rerank job's settings."""
    queries = out / "queries.jsonl"
    lines = [
        json.dumps({"query_id": str(number), "text": query.text})
        for number, query in enumerate(DEMO_QUERIES)
    ]
    queries.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "input": {"queries": str(queries)},
        "search": {"root": root, "top_k": TOP_K},
        "model": {"path": str(reranker_dir()), **{k: DEMO_RECIPE[k] for k in _BUDGETS}},
    }


def read_hits(root: str) -> list[pa.Table]:
    """Return what the rerank job made of every demo query, in order, best search score first."""
    from qvl_batch.tables.rows import read_scores
    from qvl_batch.tables.store import TableStore

    scores = read_scores(TableStore(root, Storage()), "scores", "media")
    scores = scores.rename_columns({"rank_after": "rank"})
    return [
        scores.filter(pc.equal(scores["query_id"], str(number))).sort_by("rank_before")
        for number in range(len(DEMO_QUERIES))
    ]


def _print_answers(console: Console, hits: Sequence[pa.Table], summary: CorpusSummary) -> None:
    for query, found in zip(DEMO_QUERIES, hits, strict=True):
        right = set(summary.answers(query))
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
                f"{hit['first_score']:.3f}",
                f"{hit['rerank_score']:.3f}",
                f"{path}, page {segment + 1}" if hit["kind"] == "document" else path,
                file.captions[segment],
                "yes" if (path, segment) in right else "",
            )
        console.print(table)
    console.print(f"files are under {summary.media_dir.resolve()}", soft_wrap=True)


def first_hits(hits: Sequence[pa.Table], summary: CorpusSummary) -> str:
    """Return how often the first hit is a right one, by search and after reranking, as counted."""

    def count(rank: str) -> int:
        return sum(
            _place(found.sort_by(rank).slice(0, 1).to_pylist()[0], summary)
            in summary.answers(query)
            for query, found in zip(DEMO_QUERIES, hits, strict=True)
        )

    return f"{count('rank_before')} of {len(hits)} by search, {count('rank')} after reranking"


def _place(hit: Mapping[str, Any], summary: CorpusSummary) -> tuple[str, int]:
    """Return (path within the media, segment) of a hit, as the corpus names its answers."""
    path = str(Path(hit["uri"]).relative_to(summary.media_dir.resolve()))
    return path, int(hit["row_id"].rpartition(":")[2])


def write_page(path: Path, hits: Sequence[pa.Table], facts: Mapping[str, object]) -> None:
    """Write the gallery of the hits of every demo query."""
    from qvl_batch.api.gallery import GallerySection, write_gallery

    stored = f"{' and '.join(DEMO_RECIPE['encodings'])}, {DEMO_RECIPE['dim']} dimensions"
    write_gallery(
        path,
        [
            GallerySection(query=query.text, hits=found.sort_by("rank"))
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
  qvl-batch index {root}
  qvl-batch rerank {out / "rerank.yaml"}
  qvl-batch search {root} "two red circles" --html hits.html
With your own media and the real model (on a machine or cluster with a GPU):
  qvl-batch manifest s3://your-bucket/prefix manifest.parquet
  qvl-batch init embed.yaml --manifest manifest.parquet --root s3://your-bucket/vectors \\
      --model Qwen/Qwen3-VL-Embedding-2B
  qvl-batch embed embed.yaml"""
