"""The Ray cluster: connecting to it, and pools that fit into it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import ray

from qvl_batch.config import PoolsSection
from qvl_batch.errors import StorageError, UnschedulableError
from qvl_batch.rerank_config import RerankPools

LOCAL_OBJECT_STORE_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one machine of the cluster offers."""

    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Sizes of the actor pools and the number of write tasks at a time."""

    decode_actors: int
    decode_cpus: float
    embed_actors: int
    embed_cpus: float
    embed_gpus: float
    write_tasks: int
    # What the pool of the GPUs is called in the configuration.
    gpu_pool: str = "embed"

    @property
    def cpus(self) -> float:
        return self.decode_actors * self.decode_cpus + self.embed_actors * self.embed_cpus

    @property
    def gpus(self) -> float:
        return self.embed_actors * self.embed_gpus

    def __str__(self) -> str:
        embed = f"{self.embed_actors} {self.gpu_pool} x {self.embed_cpus:g} CPU"
        if self.embed_gpus:
            embed += f" + {self.embed_gpus:g} GPU"
        return f"{self.decode_actors} decode x {self.decode_cpus:g} CPU, {embed}"


def choose_pools(section: PoolsSection | RerankPools, nodes: list[Node]) -> Pools:
    """Return the configured pools, with what is not set taken from the cluster.

    The pool of the GPUs (``embed`` or ``rerank``) comes first: one actor a GPU, or one actor where
    there is none. The decode pool gets the CPUs that are left. Writing is waiting for storage and
    reserves no CPU.

    Raises:
        UnschedulableError: If the sum, or one actor, does not fit.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    gpu_pool, engine = (
        ("rerank", section.rerank) if isinstance(section, RerankPools) else ("embed", section.embed)
    )
    embed_gpus = engine.gpus
    if embed_gpus is None:
        embed_gpus = 1.0 if gpus >= 1 else 0.0
    embed_actors = engine.actors or (max(1, int(gpus / embed_gpus)) if embed_gpus else 1)
    left = cpus - embed_actors * engine.cpus
    decode_actors = section.decode.actors or max(1, int(left / section.decode.cpus))
    pools = Pools(
        decode_actors=decode_actors,
        decode_cpus=section.decode.cpus,
        embed_actors=embed_actors,
        embed_cpus=engine.cpus,
        embed_gpus=embed_gpus,
        write_tasks=section.write.tasks or max(2, embed_actors),
        gpu_pool=gpu_pool,
    )
    there = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node(s)"
    if pools.cpus > cpus or pools.gpus > gpus:
        raise UnschedulableError(
            f"The pools need {pools.cpus:g} CPUs and {pools.gpus:g} GPUs ({pools}); {there}.",
            f"Lower pools.decode.actors, pools.{gpu_pool}.actors or their cpus and gpus.",
        )
    for name, need in (
        ("pools.decode", Node(cpus=pools.decode_cpus, gpus=0)),
        (f"pools.{gpu_pool}", Node(cpus=pools.embed_cpus, gpus=pools.embed_gpus)),
    ):
        if not any(node.cpus >= need.cpus and node.gpus >= need.gpus for node in nodes):
            raise UnschedulableError(
                f"One actor of {name} needs {need.cpus:g} CPUs and {need.gpus:g} GPUs, no node has "
                f"both; {there}.",
                f"Lower {name}.cpus or gpus.",
            )
    return pools


def connect(address: str | None) -> list[Node]:
    """Connect to the cluster at this address, at RAY_ADDRESS, or start a local one.

    Returns:
        The nodes that are alive.

    Raises:
        StorageError: If there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its errors reach us as exceptions; what the core prints besides is for its developers.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for handler in logging.getLogger("ray.data").handlers:
        # Files keep everything; the terminal gets our own account of what went wrong.
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
    if not ray.is_initialized():
        with warnings.catch_warnings(), _own_sigterm():
            # Ray forks and executes its servers at once; no forked process touches Lance.
            warnings.filterwarnings("ignore", message="lance is not fork-safe")
            _start(address or os.environ.get("RAY_ADDRESS") or "local")
    return [
        Node(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _start(address: str) -> None:
    quiet = {"logging_level": "error", "log_to_driver": False}
    if address == "local":
        memory = psutil.virtual_memory().total
        with _silent_stderr():
            ray.init(
                address="local",
                # Two pools need two CPUs, also on a machine that has one.
                num_cpus=max(2, os.cpu_count() or 1),
                object_store_memory=min(LOCAL_OBJECT_STORE_BYTES, memory // 4),
                include_dashboard=False,
                **quiet,
            )
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise StorageError(
            f"There is no Ray cluster at {address} ({str(error).splitlines()[0]}).",
            "Check pools.address or RAY_ADDRESS, and RAY_AUTH_MODE / RAY_AUTH_TOKEN_PATH if the "
            "cluster asks for a token.",
        ) from None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what Ray's core prints while it starts off the terminal; its errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our SIGTERM handler: Ray puts its own in place, which exits with the bare number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)
