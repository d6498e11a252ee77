"""A local Ray for the tests of this room, and jobs on the shipped checkpoint."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import yaml

from qvl_batch.config import EmbedConfig, parse_config
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.media.manifest import build_manifest
from qvl_batch.storage import Storage, is_local
from qvl_batch.tables.store import TableStore
from tests.jobs.upkeep_roots import Root


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One local Ray for a module: starting it takes longer than most jobs."""
    import ray

    from qvl_batch.jobs.cluster import connect

    connect("local")
    yield
    ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A manifest and a root, and the configuration that joins them."""

    manifest: str
    root: str
    storage: Storage = field(default_factory=Storage)

    def values(self) -> dict[str, Any]:
        return {
            "input": {"manifest": self.manifest},
            "output": {"root": self.root},
            "model": {"path": str(embedding_dir())},
            "recipe": DEMO_RECIPE,
            "storage": {"endpoint_url": self.storage.endpoint_url, "region": self.storage.region},
        }

    def config(self, *overrides: str) -> EmbedConfig:
        return parse_config(self.values(), overrides)

    def write(self, path: Path) -> str:
        path.write_text(yaml.safe_dump(self.values()))
        return str(path)

    def at(self, root: str) -> Job:
        return replace(self, root=root)

    def rows(self, name: str) -> pa.Table:
        return lance.dataset(
            f"{self.root}/{name}.lance", storage_options=self.storage.lance_options(self.root)
        ).to_table()

    def tables(self) -> list[str]:
        from qvl_batch.tables.store import TableStore

        names = TableStore(self.root, self.storage).names()
        return [name for name in names if not name.startswith("_")]

    def all_rows(self) -> pa.Table:
        return pa.concat_tables([self.rows(name) for name in self.tables()]).sort_by("row_id")


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """Return a function that lists a source and returns the job on it."""

    def make(source: str, root: str | None = None) -> Job:
        storage = Storage.of()
        manifest = str(tmp_path / f"manifest-{uuid.uuid4().hex[:8]}.parquet")
        build_manifest(source, manifest, storage=storage, partition_from=None)
        root = root or str(tmp_path / "vectors")
        return Job(manifest=manifest, root=root, storage=Storage() if is_local(root) else storage)

    return make


@pytest.fixture(params=["local", "s3"])
def plain_root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    """An empty root on disk and on S3 for `upkeep_roots`."""
    if request.param == "local":
        store = TableStore(str(tmp_path / "root"))
    else:
        bucket = request.getfixturevalue("bucket")
        store = TableStore(bucket.uri("root"), bucket.storage)
    return Root(store, tmp_path)
