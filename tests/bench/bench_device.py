"""(d) What a device gives: tokens, pictures and clips a second, and FLOP/s against its matmuls.

    python -m tests.bench --device cuda --config 2b

MFU here is the FLOPs that are computed (``tests.bench.flops``: no padding, causal attention counted
once, the last layer only where it is needed) over time, as a share of what a large matrix product
in the same type reaches on the same device in the same run. Tokenising, patches and copying vectors
back are in the time; decoding files is not.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.units import EmbedInput
from tests.bench.beds import Bed, num_parameters, packed_prompts
from tests.bench.flops import cost_of, work
from tests.bench.inputs import clip_input, mixed_inputs, picture_input, text_of
from tests.bench.measure import clock_name, print_table, seconds_of, share


@dataclass(frozen=True)
class Load:
    """Inputs of one kind, all prepared."""

    name: str
    inputs: list[EmbedInput]


def loads(quick: bool, on_gpu: bool) -> list[Load]:
    """Return what is embedded: sizes as in the model's documentation, small ones for a dry run."""
    rng = random.Random(4)
    if not on_gpu or quick:
        count, clips, words, picture, clip = 4, 1, 60, (160, 128), (8, 96, 64)
    else:
        count, clips, words, picture, clip = 128, 16, 480, (1280, 1024), (64, 640, 352)
    pictures = [picture_input(*picture, seed=number) for number in range(count)]
    tokens = picture[0] // 32 * (picture[1] // 32)
    return [
        Load(f"texts of {words} words", [_text(words, rng) for _ in range(4 * count)]),
        Load(f"pictures of {tokens:,} tokens", pictures),
        Load(f"clips of {clip[0]} frames", [clip_input(*clip, seed=i) for i in range(clips)]),
        Load("60 % texts, 30 % pictures, 10 % clips", mixed_inputs(5 * count, seed=5)),
    ]


def _text(words: int, rng: random.Random) -> EmbedInput:
    return EmbedInput(texts=(text_of(words, rng),))


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square product: 8192 wide on a GPU, 1024 on a CPU; best of 5 runs."""
    side, repeats = (8192, 20) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    products()
    fastest = min(seconds_of(device, products)[1] for _ in range(5))
    return repeats * 2 * side**3 / fastest


def bench_device(
    bed: Bed, *, quick: bool, rounds: int, batch_tokens: Sequence[int]
) -> dict[tuple[str, int], float]:
    """Measure and print one table; return MFU by load and token budget, 0..1."""
    device, dtype = bed.device, bed.plain.dtype
    ceiling = matmul_flops_per_s(device, dtype)
    cost, clock = cost_of(bed.shape), clock_name(device)
    tokenizer = PromptTokenizer(bed.folder)
    rows, found = [], {}
    for budget in batch_tokens:
        engine = bed.engine(budget)
        for load in loads(quick, device.type == "cuda"):
            prompts = packed_prompts(tokenizer, load.inputs)
            lengths = [prompt.num_tokens for prompt in prompts]
            grids = [vision.grid for prompt in prompts for vision in prompt.visions]
            flops = work(cost, [[length] for length in lengths], grids).flops
            flops -= sum(map(cost.left_out, lengths))
            engine.embed_vectors(load.inputs)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = statistics.median(
                seconds_of(device, lambda: engine.embed_vectors(load.inputs))[1]  # noqa: B023
                for _ in range(rounds)
            )
            peak = "-"
            if device.type == "cuda":
                peak = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"
            mfu = flops / seconds / ceiling
            found[load.name, budget] = mfu
            rows.append(
                (
                    load.name,
                    f"{budget:,}",
                    len(load.inputs) / seconds,
                    sum(lengths) / seconds,
                    flops / seconds / 1e12,
                    share(mfu),
                    peak,
                )
            )
    print_table(
        f"(d) {bed.shape.name} ({num_parameters(bed.plain) / 1e6:,.1f} M parameters, {dtype}) on "
        f"{device}; matmul ceiling {ceiling / 1e12:.3g} TFLOP/s; median of {rounds} rounds",
        (
            "units",
            "pack, tokens",
            f"units/{clock}",
            f"tokens/{clock}",
            "TFLOP/s",
            "of ceiling (MFU)",
            "peak GiB",
        ),
        rows,
    )
    return found
