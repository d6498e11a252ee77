"""Rerank jobs on the tables that an embed job of the shipped checkpoint made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import yaml

from qvl_batch.demo.checkpoint import DEMO_RECIPE, reranker_dir
from qvl_batch.rerank_config import RerankConfig, parse_rerank_config
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore

# The shipped reranker was trained on this look, and with this line.
RERANKER = {
    "path": str(reranker_dir()),
    **{name: DEMO_RECIPE[name] for name in ("image", "video", "document")},
}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@dataclass(frozen=True, kw_only=True)
class RerankRun:
    """A root that is searched, queries, and the configuration that joins them."""

    queries: str
    root: str
    out: str | None = None
    storage: Storage = field(default_factory=Storage)

    def values(self) -> dict[str, Any]:
        return {
            "input": {"queries": self.queries},
            "search": {"root": self.root, "top_k": 10},
            "output": {"root": self.out},
            "model": RERANKER,
            "storage": {"endpoint_url": self.storage.endpoint_url, "region": self.storage.region},
        }

    def config(self, *overrides: str) -> RerankConfig:
        return parse_rerank_config(self.values(), overrides)

    def write(self, path: Path) -> str:
        path.write_text(yaml.safe_dump(self.values()))
        return str(path)

    @property
    def store(self) -> TableStore:
        return TableStore(self.out or self.root, self.storage)

    def rows(self, name: str = "scores") -> pa.Table:
        """Return all rows of a scores collection, or of any other table or collection."""
        names = [
            found for found in self.store.names() if found == name or found.startswith(f"{name}__")
        ]
        return pa.concat_tables(
            lance.dataset(self.store.uri(one), storage_options=self.store.options).to_table()
            for one in names
        )
