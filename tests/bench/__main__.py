"""Every benchmark in one command; prints tables and asserts nothing about time.

    python -m tests.bench --device cpu --config small
    python -m tests.bench --device cuda --config 2b
    python -m tests.bench --device cpu --config 2b --quick      (dry run in a shrunk shape)

Peers need the extra `bench` (`pip install -e '.[bench]'`); without it their rows say so. On a CPU
seconds are CPU seconds of one process, so that other work on the machine weighs less; on a GPU
they are wall seconds around synchronised calls.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

# Before numpy and torch start their thread pools: packed sequences on a CPU are small products.
if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.bench.beds import make_bed, num_parameters
from tests.bench.bench_device import bench_device
from tests.bench.bench_packing import bench_packing
from tests.bench.bench_peers import bench_peers
from tests.bench.bench_rerank import bench_rerank
from tests.bench.measure import print_machine, say
from tests.bench.shapes import SHAPES

BENCHES = ("packing", "peers", "rerank", "device")


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--config", default="small", choices=sorted(SHAPES))
    parser.add_argument("--quick", action="store_true", help="small inputs, one round")
    parser.add_argument("--only", choices=BENCHES, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5; 1 with --quick)")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads (1)")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory(prefix="qvl-bench-") as scratch:
        run(asked, Path(scratch))


def run(asked: argparse.Namespace, scratch: Path) -> None:
    """Run the benches one after the other."""
    start = time.perf_counter()
    device = torch.device(asked.device)
    on_gpu = device.type == "cuda"
    shape = SHAPES[asked.config]
    if shape.name == "2b" and not on_gpu:
        # The true shape takes minutes a unit on a CPU.
        shape = shape.shrunk()
    rounds = asked.rounds or (1 if asked.quick else 5)
    wanted = asked.only or BENCHES
    print_machine(device)
    bed = make_bed(shape, device, scratch / "bed")
    size = num_parameters(bed.plain) / 1e6
    say(f"Model {shape.name}: {size:,.1f} M parameters, {bed.plain.dtype}. {shape.note}.")
    batch_tokens = 16_384 if on_gpu else 4096
    if "packing" in wanted:
        units = 10 if asked.quick else 200 if on_gpu else 40
        bench_packing(bed, units=units, rounds=min(rounds, 3), batch_tokens=batch_tokens)
    if "peers" in wanted:
        # Two amounts: who sorts by length pads the less the more there is to sort.
        amounts = ((6, 4),) if asked.quick else ((120, 80),) if on_gpu else ((20, 9), (36, 24))
        for texts, pictures in amounts:
            bench_peers(
                bed,
                scratch / f"peers-{texts}",
                texts=texts,
                pictures=pictures,
                rounds=rounds,
                batch_tokens=batch_tokens,
            )
    if "rerank" in wanted:
        bench_rerank(
            bed,
            candidates=(4,) if asked.quick else (20, 100),
            side_px=96 if asked.quick else 640 if on_gpu else 192,
            rounds=min(rounds, 3),
            batch_tokens=batch_tokens,
        )
    if "device" in wanted:
        bench_device(
            bed,
            quick=asked.quick,
            rounds=min(rounds, 3),
            batch_tokens=(16_384, 32_768, 65_536)
            if on_gpu and not asked.quick
            else (batch_tokens,),
        )
    say(f"Took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
