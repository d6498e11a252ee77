"""Roots that the driver's own code has filled, without Ray: partitions by day, a text a medium."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.config import EmbedConfig, load_config
from qvl_batch.tables.store import TableStore
from tests.faults import plain_driver, scenario

DAYS = ("2026-01-01", "2026-01-02")


@dataclass(frozen=True)
class Root:
    """A place for tables and the folder with its manifests and configurations."""

    store: TableStore
    folder: Path

    def manifest(self, listed: Mapping[str, Iterable[str]]) -> Path:
        """Write a manifest of these names by day; a name that ends in ``bad`` fails."""
        rows = [
            {
                "uri": uri_of(name),
                "kind": "image",
                "etag": "v1",
                "text": f"words about {name}",
                "dt": day,
            }
            for day, names in listed.items()
            for name in names
        ]
        path = self.folder / f"manifest-{len(list(self.folder.glob('manifest-*')))}.parquet"
        fields = [(name, pa.string()) for name in ("uri", "kind", "etag", "text", "dt")]
        table = pa.Table.from_pylist(rows, pa.schema(fields))
        pq.write_table(table.replace_schema_metadata({"qvl.partition_by": '["dt"]'}), path)
        return path

    def config(self, manifest: Path, mode: str = "append") -> EmbedConfig:
        path = self.config_file(manifest, mode)
        return load_config(str(path))

    def config_file(self, manifest: Path, mode: str = "append") -> Path:
        path = manifest.with_suffix(f".{mode}.yaml")
        scenario.write_config(path, manifest, self.store.root, self.store.storage, mode)
        return path

    def embed(self, listed: Mapping[str, Iterable[str]], mode: str = "append") -> Path:
        """Embed a manifest of these names; return its path."""
        manifest = self.manifest(listed)
        plain_driver.run(self.config(manifest, mode))
        return manifest

    def names(self, day: str) -> list[str]:
        """Return the names whose rows a day's table holds, sorted."""
        rows = self.store.open(table_of(day)).to_table(columns=["uri"])["uri"].to_pylist()
        return sorted(uri.rsplit("/", 1)[-1] for uri in rows)

    def holding(self, words: str, *, but: str = "_qvl_leases") -> list[str]:
        """Return the files under the root, by path, that hold these bytes."""
        fs = self.store.storage.filesystem(self.store.root)
        fs.invalidate_cache()
        top = fs._strip_protocol(self.store.root)
        paths = [path.removeprefix(f"{top}/") for path in fs.find(top)]
        return [
            path
            for path in sorted(paths)
            if not path.startswith(but) and words.encode() in fs.cat_file(f"{top}/{path}")
        ]


def uri_of(name: str) -> str:
    return f"s3://media/pictures/{name}"


def table_of(day: str) -> str:
    return f"media__dt-{day}"


def many(prefix: str, count: int = 20) -> list[str]:
    return [f"{prefix}{number:03d}" for number in range(count)]
