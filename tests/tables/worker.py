"""What a process of its own does in the tests of kills and races: python -m … ACTION ROOT ID."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from qvl_batch.tables import catalog, commit, fragments, index, maintenance
from qvl_batch.tables.store import TableStore
from tests.tables import rows


def kill_after(store: TableStore, table: str, transaction: object) -> int:
    commit.commit_transaction(store, table, transaction)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def kill_after_compaction(dataset: object, results: object) -> None:
    maintenance.Compaction.commit(dataset, results)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when_there(path: str) -> None:
    while not os.path.exists(path) or not os.listdir(path):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def main(action: str, root: str, name: str) -> None:
    store = TableStore(root)
    if action == "failures":
        for i in range(4):
            found = rows.failures([f"{name}-{i}-a", f"{name}-{i}-b"], run_id=name)
            commit.append_failures(store, found, f"{name}:{i}", name)
    elif action == "die-before-commit":
        table = rows.table_rows(["a", "b"], rows.schema())
        fragments.write_fragments(root, None, "media", table)
        print("written", flush=True)
        time.sleep(60)
    elif action == "die-after-commit":
        table = rows.table_rows(["a", "b"], rows.schema())
        written = fragments.write_fragments(root, None, "media", table)
        commit.append(
            store, "media", written, marker="m", run_id="r", planned_version=1, commit=kill_after
        )
    elif action == "catalog":
        for i in range(4):
            table = f"media__dt-{name}"
            rows.add(store, table, rows.table_rows([f"{name}-{i}"], rows.schema()), f"{name}:{i}")
            catalog.refresh(store, [table], {}, run_id=name)
    elif action == "die-in-compaction":
        maintenance.compact(store, name, commit=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    elif action == "die-after-compaction":
        maintenance.compact(store, name, commit=kill_after_compaction)
    elif action == "die-in-index":
        path = store.uri(name) + "/_indices"
        threading.Thread(target=kill_when_there, args=(path,), daemon=True).start()
        index.refresh_index(store, name, index.IndexRules(min_rows=1000, num_queries=200))
    elif action == "die-before-publishing":
        index.refresh_index(store, name, index.IndexRules(min_rows=1000, num_queries=200))
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise SystemExit(f"unknown action {action}")


if __name__ == "__main__":
    main(*sys.argv[1:])
