"""`qvl-batch demo`: draw a corpus, embed it through local Ray, answer queries from the tables."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from qvl_batch.config import commented_yaml, load_config
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.demo.corpus import CorpusSummary, write_corpus
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.errors import StorageError
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.storage import Storage

TOP_K = 3


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
    _print_answers(console, root, summary)
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


def _print_answers(console: Console, root: str, summary: CorpusSummary) -> None:
    for query, hits in zip(DEMO_QUERIES, answer(root), strict=True):
        right = set(summary.answers(query))
        table = Table(title=f"“{query.text}”", title_justify="left", expand=False)
        table.add_column("score", justify="right")
        table.add_column("file", overflow="fold")
        table.add_column("what it shows", overflow="fold")
        table.add_column("right", justify="center")
        for hit in hits.to_pylist():
            path = str(Path(hit["uri"]).relative_to(summary.media_dir.resolve()))
            segment = int(hit["row_id"].rpartition(":")[2])
            file = next(file for file in summary.files if file.path == path)
            place = f"{path}, page {segment + 1}" if hit["kind"] == "document" else path
            mark = "yes" if (path, segment) in right else ""
            table.add_row(f"{hit['score']:.3f}", place, file.captions[segment], mark)
        console.print(table)
    console.print(f"files are under {summary.media_dir.resolve()}", soft_wrap=True)


def answer(root: str, top_k: int = TOP_K) -> list[pa.Table]:
    """Return the hits of every demo query, in order, from the tables under ``root``."""
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
    found = search(tables, vectors, top_k)
    return [found.filter(pc.equal(found["query"], i)) for i in range(len(vectors))]


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
