"""Clocks, interleaved rounds, and tables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

Result = npt.NDArray[np.float32]
MAX_ROUNDS_S = 120.0
# Wide enough for every table, so that none is cut when the output goes to a file.
_CONSOLE = Console(width=150, highlight=False)


def seconds_of(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its cost: CPU seconds of all threads, or wall seconds on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(device)
        return result, time.perf_counter() - start
    # Other work on the machine moves wall seconds, CPU seconds much less.
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def clock_name(device: torch.device) -> str:
    return "s" if device.type == "cuda" else "CPU s"


def interleaved(
    device: torch.device, calls: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run every call once to warm up and then ``rounds`` times, taking turns.

    There are fewer rounds, at least one, where a GPU would take longer than ``MAX_ROUNDS_S``: a
    peer can be very slow on a device (bfloat16 Conv3d has no fast kernel on several GPUs).

    Returns:
        The warm-up's results, and the seconds of every round by name.
    """
    start = time.perf_counter()
    results = {name: call() for name, call in calls.items()}
    if device.type == "cuda":
        rounds = max(1, min(rounds, int(MAX_ROUNDS_S / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        # Each begins a round as often as the others.
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            seconds[name].append(seconds_of(device, calls[name])[1])
    return results, seconds


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the median over rounds of how much longer one took than the other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def max_abs_diff(a: Result, b: Result) -> float:
    return float(np.abs(a - b).max())


def min_cosine(a: Result, b: Result) -> float:
    """Return the smallest cosine of corresponding rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    _CONSOLE.print(table)


def say(text: str) -> None:
    _CONSOLE.print(text, markup=False)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def share(part: float) -> str:
    return f"{100 * part:.1f} %"


def print_machine(device: torch.device) -> None:
    """Print what ran: processor, device, threads, load and versions."""
    rows = [
        ("CPU", f"{_cpu_name()}, {os.cpu_count()} logical"),
        ("threads", f"torch {torch.get_num_threads()}"),
        ("load at start", " ".join(f"{load:.1f}" for load in os.getloadavg())),
        ("Python", platform.python_version()),
    ]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.insert(1, ("GPU", f"{properties.name}, {memory}, CUDA {torch.version.cuda}"))
    for package in ("torch", "transformers", "sentence-transformers", "torchvision", "pillow"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    print_table("Machine", ["", ""], rows)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
