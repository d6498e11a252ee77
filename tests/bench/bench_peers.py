"""(b) Ours against the official algorithm and sentence-transformers: one run, same checkpoint.

    python -m tests.bench --only peers

Everybody begins with the same texts and JPEG files in the same order, works in one process, and
takes turns. sentence-transformers sorts what it gets: texts by their characters and open pictures
by their pixels, but pictures given as paths by the characters of the path; both are measured. The
lengths that peers batch are read off their calls of the model. A peer that can not run here has its
reason below the table. Peers are the extra ``bench``: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qvl_batch.model.prompt import PromptTokenizer
from tests.bench.beds import Bed, packed_prompts
from tests.bench.flops import cost_of, work
from tests.bench.inputs import prepare, texts_and_pictures
from tests.bench.measure import (
    Result,
    clock_name,
    interleaved,
    max_abs_diff,
    median_ratio,
    min_cosine,
    print_table,
    say,
    share,
)

if TYPE_CHECKING:
    from tests.bench.peers import Peer

BATCH = 8
OURS = "ours, packed"
PREPARED = "ours, decoded before (as in a job)"
PLAIN = f"plain transformers, by {BATCH}"
SENTENCE_OPEN = f"sentence-transformers, open, by {BATCH}"
SENTENCE_PATHS = f"sentence-transformers, paths, by {BATCH}"
# What `encode` does unless it is told otherwise.
DEFAULT_BATCH = 32
SENTENCE_OPEN_DEFAULT = f"sentence-transformers, open, by {DEFAULT_BATCH} (its default)"
SENTENCE_PATHS_DEFAULT = f"sentence-transformers, paths, by {DEFAULT_BATCH} (its default)"
# Each with its batch size and whether pictures are given as paths.
SENTENCE_WAYS = {
    SENTENCE_OPEN: (BATCH, False),
    SENTENCE_PATHS: (BATCH, True),
    SENTENCE_OPEN_DEFAULT: (DEFAULT_BATCH, False),
    SENTENCE_PATHS_DEFAULT: (DEFAULT_BATCH, True),
}


@dataclass(frozen=True)
class PeersResult:
    """Times as multiples of ours, agreement with the official way, and why a peer is missing."""

    times_ours: dict[str, float]
    min_cosine: dict[str, float]
    max_abs_diff: dict[str, float]
    missing: dict[str, str]


def bench_peers(
    bed: Bed, scratch: Path, *, texts: int, pictures: int, rounds: int, batch_tokens: int
) -> PeersResult:
    """Measure and print one table."""
    items = texts_and_pictures(scratch / "pictures", texts, pictures, seed=2)
    inputs = prepare(items)
    prompts = packed_prompts(PromptTokenizer(bed.folder), inputs)
    lengths = [prompt.num_tokens for prompt in prompts]
    grids = [vision.grid for prompt in prompts for vision in prompt.visions]
    engine = bed.engine(batch_tokens)
    calls: dict[str, Callable[[], Result]] = {
        OURS: lambda: engine.embed_vectors(prepare(items)),
        PREPARED: functools.partial(engine.embed_vectors, inputs),
    }
    peers, missing = _peers(bed, scratch)
    calls |= {name: functools.partial(peer.embed, items) for name, peer in peers.items()}
    batches = {name: [[length] for length in lengths] for name in (OURS, PREPARED)}
    batches |= {name: lengths_batched(peer.model, calls[name]) for name, peer in peers.items()}
    vectors, seconds = interleaved(bed.device, calls, rounds)

    clock, cost = clock_name(bed.device), cost_of(bed.shape)
    reference = vectors.get(PLAIN, vectors[OURS])
    rows: list[Sequence[Any]] = []
    for name in calls:
        done = work(cost, batches[name], grids)
        median = statistics.median(seconds[name])
        rows.append(
            (
                name,
                median,
                len(items) / median,
                sum(lengths) / median,
                f"{median_ratio(seconds[name], seconds[OURS]):.2f}",
                share(done.padded_positions),
                share(done.padded_flops),
                f"{min_cosine(vectors[name], reference):.7f}",
                max_abs_diff(vectors[name], reference),
            )
        )
    rows += [(name, *["not run"] * 8) for name in missing]
    print_table(
        f"(b) Peers: {texts} texts and {pictures} JPEGs, {sum(lengths):,} tokens "
        f"(shortest {min(lengths)}, longest {max(lengths)}); "
        f"median of {len(seconds[OURS])} interleaved rounds",
        (
            "who",
            clock,
            f"units/{clock}",
            f"tokens/{clock}",
            "x ours",
            "padded positions",
            "padded FLOPs",
            "min cosine to official",
            "max |Δ|",
        ),
        rows,
    )
    for name, peer in peers.items():
        tokens = sum(map(sum, batches[name]))
        say(f"{name}: {type(peer.processor.image_processor).__name__}, {tokens:,} tokens")
    for name, reason in missing.items():
        say(f"{name} did not run: {reason}")
    return PeersResult(
        {name: median_ratio(seconds[name], seconds[OURS]) for name in calls},
        {name: min_cosine(vectors[name], reference) for name in calls},
        {name: max_abs_diff(vectors[name], reference) for name in calls},
        missing,
    )


def _peers(bed: Bed, scratch: Path) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers that load here, and why others do not."""
    found, missing = {}, {}
    for name in (PLAIN, *SENTENCE_WAYS):
        try:
            from tests.bench.peers import PlainTransformers, SentenceTransformersPeer

            if name == PLAIN:
                found[name] = PlainTransformers(bed, BATCH)
            else:
                batch, paths = SENTENCE_WAYS[name]
                found[name] = SentenceTransformersPeer(bed, scratch, batch, paths=paths)
        # A peer's stack may fail at import or load in any way, torchvision's wheel with a
        # RuntimeError for one, and the others must still be measured.
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            missing[name] = f"{type(error).__name__}: {first[0]}"
    return found, missing


def lengths_batched(model: torch.nn.Module, call: Callable[[], Any]) -> list[list[int]]:
    """Return the sequence lengths of every batch that a call gives to the model."""
    seen: list[list[int]] = []

    def note(_: torch.nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen.append(given["attention_mask"].sum(dim=1).tolist())

    # sentence-transformers calls the whole model's `forward`, past any hook on it.
    handle = model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return seen
