"""(a) Packed against one by one, sorted and plain batches, on texts, pictures and clips.

    python -m tests.bench --only packing

All ways run on the same weights and the same prepared inputs; results are compared with one by one.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import numpy as np

from qvl_batch.model.prompt import PromptTokenizer
from tests.bench.beds import Bed, packed_prompts
from tests.bench.flops import cost_of, work
from tests.bench.inputs import mixed_inputs
from tests.bench.measure import (
    clock_name,
    interleaved,
    max_abs_diff,
    median_ratio,
    min_cosine,
    print_table,
    share,
)
from tests.bench.padded import PaddedEngine, by_length, in_order

BATCH = 8
PACKED = "packed"


@dataclass(frozen=True)
class PackingResult:
    """How far each way's vectors are from one by one, and its time as a multiple of packed."""

    max_abs_diff: dict[str, float]
    min_cosine: dict[str, float]
    times_packed: dict[str, float]


def bench_packing(bed: Bed, *, units: int, rounds: int, batch_tokens: int) -> PackingResult:
    """Measure and print one table."""
    inputs = mixed_inputs(units, seed=1)
    prompts = packed_prompts(PromptTokenizer(bed.folder), inputs)
    lengths = [prompt.num_tokens for prompt in prompts]
    grids = [vision.grid for prompt in prompts for vision in prompt.visions]
    plans = {
        "one by one": in_order(units, 1),
        f"sorted, batches of {BATCH}": by_length(lengths, BATCH),
        f"plain, batches of {BATCH}": in_order(units, BATCH),
        "plain, batches of 32": in_order(units, 32),
    }
    padded = PaddedEngine(bed.plain, bed.folder)
    calls = {
        name: functools.partial(padded.embed_vectors, inputs, batches)
        for name, batches in plans.items()
    }
    calls[PACKED] = functools.partial(bed.engine(batch_tokens).embed_vectors, inputs)
    vectors, seconds = interleaved(bed.device, calls, rounds)

    clock, cost, rows = clock_name(bed.device), cost_of(bed.shape), []
    alone = vectors["one by one"]
    for name in calls:
        # A pack has no padding, as if each were alone.
        plan = plans.get(name, plans["one by one"])
        done = work(cost, [[lengths[i] for i in batch] for batch in plan], grids)
        median = statistics.median(seconds[name])
        rows.append(
            (
                name,
                median,
                units / median,
                sum(lengths) / median,
                median_ratio(seconds[name], seconds[PACKED]),
                share(done.padded_positions),
                share(done.padded_flops),
                max_abs_diff(vectors[name], alone),
                f"{min_cosine(vectors[name], alone):.7f}",
            )
        )
    print_table(
        f"(a) Packing: {units} units (60 % texts, 30 % pictures, 10 % clips), "
        f"{sum(lengths):,} tokens (shortest {min(lengths)}, median "
        f"{int(np.median(lengths))}, longest {max(lengths)}); "
        f"median of {len(seconds[PACKED])} rounds",
        (
            "way",
            clock,
            f"units/{clock}",
            f"tokens/{clock}",
            "x packed",
            "padded positions",
            "padded FLOPs",
            "max |Δ| to one by one",
            "min cosine",
        ),
        rows,
    )
    return PackingResult(
        {name: max_abs_diff(vectors[name], alone) for name in calls},
        {name: min_cosine(vectors[name], alone) for name in calls},
        {name: median_ratio(seconds[name], seconds[PACKED]) for name in calls},
    )
