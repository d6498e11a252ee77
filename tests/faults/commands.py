"""What a case of the matrix runs in processes of its own."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

from qvl_batch.config import load_config
from qvl_batch.errors import QvlError, RunFailedError
from qvl_batch.jobs.delete import run_delete
from qvl_batch.jobs.index import run_index
from qvl_batch.jobs.maintenance import run_compact
from qvl_batch.jobs.prune import run_prune
from qvl_batch.storage import Storage
from qvl_batch.tables.index import IndexRules
from qvl_batch.tables.store import TableStore
from tests.faults import plain_driver

# The tables of a case have some twenty rows.
RULES = IndexRules(min_rows=2, num_queries=8, recall=0.5)


def embed(config: str, pace_s: float = 0.0) -> None:
    """Run the plain driver, resting ``pace_s`` after each block."""
    plain_driver.run(load_config(config), pace_s)


def index(root: str, storage: Storage) -> None:
    """Run the index job in this process."""
    done = run_index(root, storage, local=True, rules=RULES)
    if done.exit_code:
        raise next(iter(done.errors.values()), RunFailedError(str(done)))


def compact(root: str, storage: Storage) -> None:
    """Run the compact command in this process."""
    done = run_compact(root, storage)
    for error in done.errors.values():
        raise error


def prune(config: str) -> None:
    """Run the prune job."""
    run_prune(load_config(config), yes=True)


def delete(root: str, storage: Storage, uris: list[str]) -> None:
    """Run the delete command."""
    run_delete(root, storage, uris)


def watch(root: str, storage: Storage, tables: list[str], found: str, pause_s: float) -> None:
    """Poll tables; append a line ``table unit_id,unit_id,…`` whenever one changes.

    Ends with the process that started it.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None
    store = TableStore(root, storage)
    last: dict[str, str] = {}
    with Path(found).open("a") as file:
        while starter.is_alive():
            for table in tables:
                try:
                    dataset = store.open(table)
                    rows = dataset.to_table(columns=["unit_id"]) if dataset else None
                    seen = ",".join(sorted(rows["unit_id"].to_pylist())) if rows else ""
                except (OSError, ValueError, RuntimeError, QvlError) as error:
                    seen = f"error: {error}".replace("\n", " ")
                if seen != last.get(table):
                    last[table] = seen
                    file.write(f"{table} {seen}\n")
                    file.flush()
            time.sleep(pause_s)
