"""The pieces that graphs are made of: blocks in, one block out for each, on CPUs or on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from qvl_batch.jobs.cluster import Pools


def from_blocks(blocks: Sequence[pa.Table]) -> Dataset:
    """Return a dataset of exactly these blocks, and keep Ray Data from merging or cutting them."""
    context = DataContext.get_current()
    # One block in, one block out: a replayed task skips by index what it delivered before.
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    return ray.data.from_arrow(list(blocks))


def on_cpus(rows: Dataset, worker: type, stage: object, pools: Pools) -> Dataset:
    """Map blocks in the decode pool; ``worker`` is made of ``stage`` once an actor."""
    return rows.map_batches(
        worker,
        fn_constructor_args=(stage,),
        batch_size=None,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=pools.decode_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pools.decode_cpus,
    )


def on_gpus(rows: Dataset, worker: type, arguments: tuple[Any, ...], pools: Pools) -> Dataset:
    """Map blocks in the pool that holds the GPUs, if there are any."""
    # The public map_batches wants a number of rows a batch where there are GPUs; ours are whole
    # blocks, whose number of units depends on their kind.
    return rows.map_batches_internal(
        worker,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=pools.embed_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pools.embed_cpus,
        num_gpus=pools.embed_gpus or None,
    )


def beside(rows: Dataset, worker: type, stage: object, pools: Pools) -> Dataset:
    """Map blocks in actors that reserve no CPU: they work while those of `on_cpus` have little."""
    return rows.map_batches(
        worker,
        fn_constructor_args=(stage,),
        batch_size=None,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=pools.decode_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=0,
    )
