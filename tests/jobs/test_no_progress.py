"""A graph from which nothing comes any more ends the run, and what is done stays."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

import pytest

from qvl_batch.config import load_config
from qvl_batch.errors import RunFailedError
from qvl_batch.jobs.driver import Run
from qvl_batch.jobs.embed import work_of
from qvl_batch.jobs.embed_job import prepare
from qvl_batch.jobs.graph import from_blocks
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore
from tests.faults.plain_driver import POOLS, HashModel, run, unit_rows
from tests.jobs.upkeep_roots import DAYS, Root, many


def test_a_graph_that_hangs_ends_the_run_in_time(local_ray, tmp_path):
    root = Root(TableStore(str(tmp_path / "root")), tmp_path)
    manifest = root.manifest({DAYS[0]: many("a", 20)})
    file = root.config_file(manifest)
    config = load_config(str(file), ["limits.no_progress_s=2", "commit.interval_s=60"])
    never = threading.Event()
    with contextlib.ExitStack() as held:
        job = prepare(config, held, model=HashModel())

        def hangs(control):
            first = unit_rows(job.plan.todo.slice(0, 8))
            yield from from_blocks([first]).iter_internal_ref_bundles()
            never.wait()

        work = dataclasses.replace(work_of(job, POOLS), graph=hangs)
        started_s = time.monotonic()
        with pytest.raises(RunFailedError, match=r"limits\.no_progress_s") as ended:
            Run(work, lambda _: None).drive()
        assert time.monotonic() - started_s < 60
    never.set()
    assert ended.value.exit_code == 1
    assert "\n" not in str(ended.value)
    # What came is committed; the next run does the rest, and only that.
    assert len(root.names(DAYS[0])) == 8
    assert run(root.config(manifest)) == 12
    assert verify(root.store.root, Storage(), manifest=str(manifest)).problems == ()
