"""Tables of the shipped corpus, made by the embed job's own stages in this process, without Ray."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl_batch.config import parse_config
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.demo.corpus import CorpusSummary, write_corpus
from qvl_batch.jobs.embed_job import EmbedJob, prepare
from qvl_batch.jobs.limits import decode_limits, fetch_limits
from qvl_batch.jobs.stages import DecodeMedia, EmbedMedia, WriteRows
from qvl_batch.media.manifest import build_manifest
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.storage import Storage
from qvl_batch.tables import catalog, commit
from qvl_batch.tables.layout import partition_json

BLOCK_UNITS = 64


@dataclass(frozen=True)
class EmbeddedRoot:
    """A corpus with its manifest, and the root that holds its tables."""

    corpus: CorpusSummary
    manifest: str
    root: str
    storage: Storage = field(default_factory=Storage)

    def path(self, relative: str) -> Path:
        return self.corpus.media_dir.resolve() / relative

    def uris(self, relative: tuple[str, ...]) -> set[str]:
        return {str(self.path(path)) for path in relative}


def embed_corpus(folder: Path) -> EmbeddedRoot:
    """Draw the demo's corpus and embed it to ``folder/vectors``, three partitions by day."""
    corpus = write_corpus(folder)
    manifest = str(folder / "manifest.parquet")
    build_manifest(str(corpus.media_dir), manifest, storage=Storage(), partition_from=None)
    made = EmbeddedRoot(corpus, manifest, str(folder / "vectors"))
    embed_into(made)
    return made


def embed_into(made: EmbeddedRoot, **sections: dict[str, Any]) -> None:
    """Embed the manifest into the root; ``sections`` are values of the job's configuration."""
    values: dict[str, dict[str, Any]] = {
        "input": {"manifest": made.manifest},
        "output": {"root": made.root},
        "model": {
            "path": str(embedding_dir()),
            "query_instruction": DEFAULT_INSTRUCTION,
            "check": False,
        },
        "recipe": dict(DEMO_RECIPE),
        "storage": {"endpoint_url": made.storage.endpoint_url, "region": made.storage.region},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    with contextlib.ExitStack() as held:
        _embed(prepare(parse_config(values), held))


def _embed(job: EmbedJob) -> None:
    decode = DecodeMedia(
        storage=job.storage,
        recipe=job.recipe,
        fetch_limits=fetch_limits(job.config.limits),
        decode_limits=decode_limits(job.config.limits),
        resize=job.model.resize,
        load_counter=lambda: job.model.load_counter(job.recipe),
    ).open()
    embed = EmbedMedia(lambda: job.model.load_engine(job.recipe))
    todo = job.plan.todo
    for name in todo["_table"].unique().to_pylist():
        job.store.create(name, job.schemas[name])
    blocks = [embed(decode(todo.slice(i, BLOCK_UNITS))) for i in range(0, len(todo), BLOCK_UNITS)]
    decode.close()
    collection = job.config.output.collection
    write = WriteRows(
        root=job.store.root,
        storage=job.storage,
        collection=collection,
        schemas=job.schemas,
        partitions={name: partition_json(of) for name, of in job.plan.partitions.items()},
        run_id=job.run_id,
    )
    written = write(blocks, frozenset())
    files = {}
    for name, fragments in written.fragments.items():
        commit.append(job.store, name, fragments, marker=f"{job.run_id}:{name}", run_id=job.run_id)
        files[name] = [file for fragment in fragments for file in fragment["files"]]
    commit.append_failures(job.store, written.failures, f"{job.run_id}:failures", job.run_id)
    catalog.refresh(job.store, job.plan.partitions, files, run_id=job.run_id)
