"""What search alone says to the demo's queries."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.model.engine import EmbedEngine
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.storage import Storage
from qvl_batch.tables.search import search
from qvl_batch.tables.store import TableStore
from qvl_batch.units import EmbedInput


def answer(root: str, top_k: int = 10) -> list[pa.Table]:
    """Return the hits of every demo query, in order, from the tables ``media`` under a root."""
    store = TableStore(root, Storage())
    tables = {name: store.open(name) for name in store.names() if name.startswith("media")}
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
