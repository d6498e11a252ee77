"""The driver's own write and commit code in one plain process, without Ray.

    python -m tests.faults.plain_driver CONFIG

Plans, writes, commits, publishes and refreshes the catalog with the package's own parts; what Ray
would deliver is made here from the units' ids: a vector each, and a failure for each uri that ends
in ``bad``.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from qvl_batch import schema
from qvl_batch.config import EmbedConfig, load_config
from qvl_batch.errors import QvlError
from qvl_batch.jobs.cluster import Pools
from qvl_batch.jobs.commit_loop import CommitLoop
from qvl_batch.jobs.driver import Work
from qvl_batch.jobs.embed import work_of
from qvl_batch.jobs.embed_job import prepare
from qvl_batch.jobs.modes import publish_replaced
from qvl_batch.jobs.plan import cut_blocks
from qvl_batch.jobs.stages import Written
from qvl_batch.recipe import Recipe
from qvl_batch.tables import catalog

DIM = 16
POOLS = Pools(
    decode_actors=1, decode_cpus=1, embed_actors=1, embed_cpus=1, embed_gpus=0, write_tasks=2
)
_FAILURE = {
    "stage": "decode",
    "error_type": "CorruptMediaError",
    "message": "bad on purpose",
    "retryable": False,
}


class HashModel:
    """A model whose vectors are made from ids: `jobs.checkpoint.Model` without weights."""

    resize = "qvl_batch.model.resize:resize_frame"

    def digest(self) -> str:
        return "0" * 32

    def dim(self) -> int:
        return DIM

    def stated(self) -> dict[str, str]:
        # No path: nobody can load it again.
        return {}

    def load_engine(self, recipe: Recipe) -> Any:
        raise NotImplementedError("the plain driver embeds by itself")

    def load_counter(self, recipe: Recipe) -> Callable[..., int]:
        raise NotImplementedError("the plain driver embeds by itself")


def unit_rows(units: pa.Table, dim: int = DIM) -> pa.Table:
    """Return `schema.embedded` of units: what EmbedMedia would deliver."""
    rows, failures = [], []
    for uri, unit in zip(units["uri"].to_pylist(), units["unit_id"].to_pylist(), strict=True):
        is_bad = uri.endswith("bad")
        failures.append(_FAILURE if is_bad else None)
        rows.append([] if is_bad else [_row(unit, dim)])
    return (
        units.append_column(
            pa.field("_rows", pa.list_(schema.ROW)), pa.array(rows, pa.list_(schema.ROW))
        )
        .append_column(pa.field("_failure", schema.FAILURE), pa.array(failures, schema.FAILURE))
        .cast(schema.embedded(units.schema))
    )


def _row(unit: str, dim: int) -> dict[str, Any]:
    values = np.frombuffer(hashlib.shake_128(unit.encode()).digest(dim), np.int8)
    return {
        "segment": 0,
        "num_segments": 1,
        "num_tokens": 7,
        "truncated": False,
        "vector_int8": values.tobytes(),
        "vector_scale": 0.01,
        "vector_bits": np.packbits(values > 0).tobytes(),
    }


class DirectWrites:
    """`commit_loop.Writes` that writes at once."""

    def __init__(self, work: Work) -> None:
        self._work, self._is_ready = work, False
        self._written: list[Written] = []

    def start(self, blocks: Sequence[pa.Table], exclude: frozenset[int]) -> object:
        if not self._is_ready:
            self._work.create_tables()
            self._is_ready = True
        self._written.append(self._work.write(blocks, exclude))
        return len(self._written) - 1

    def finished(self, handles: Sequence[object], timeout_s: float) -> Mapping[object, Written]:
        return {handle: self._written[int(str(handle))] for handle in handles}


def run(config: EmbedConfig, pace_s: float = 0.0) -> int:
    """Run the job once, resting after each block; return how many units were embedded."""
    with contextlib.ExitStack() as held:
        job = prepare(config, held, model=HashModel())
        work = work_of(job, POOLS)
        job.remove_left_over()
        loop = CommitLoop(
            num_units=work.num_ordinals,
            writes=DirectWrites(work),
            tables=job.commits(),
            run_id=work.markers,
            interval_s=config.commit.interval_s,
            fragment_bytes=config.commit.fragment_bytes,
            max_writes=2,
            max_failure_rate=1.0,
            failure_rate_after_units=100,
        )
        for block in cut_blocks(job.plan.todo, {"image": config.pools.units_per_block or 8}):
            loop.add(unit_rows(block), block.nbytes)
            loop.flush()
            loop.poll()
            time.sleep(pace_s)
        loop.finish()
        known_files = loop.known_files
        if job.staged is not None:
            known_files = publish_replaced(job.target, sorted(job.plan.partitions))
        names = [name for name in job.plan.partitions if job.store.open(name) is not None]
        catalog.refresh(job.store, names, known_files, run_id=job.run_id)
        return loop.counts.embedded


if __name__ == "__main__":
    try:
        run(load_config(sys.argv[1]))
    except QvlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
