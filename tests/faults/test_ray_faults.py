"""Kills and storage faults through the whole Ray job; `tests.faults.ray_matrix` has all of them."""

from __future__ import annotations

import json
import sys
import time
import urllib.request

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore
from tests.conftest import serve
from tests.faults.matrix import Case
from tests.faults.ray_matrix import Embedding, prepared, run_case

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ready():
    with prepared(["local"]) as ready:
        yield ready


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        ("mid-decode", "append"),
        ("mid-embed", "upsert"),
        ("after-commit", "replace"),
        ("raylet", "upsert"),
        ("cluster", "replace"),
    ],
)
def test_a_kill_in_the_ray_job_loses_and_doubles_nothing(ready, tmp_path, place, mode) -> None:
    corpus, starts = ready
    result = run_case(Case(place, mode, "local", 1), corpus, starts, tmp_path)
    assert result.killed, "it did not come to the place"
    assert result.is_right, result
    if place.startswith("mid-"):
        assert result.reruns == 0, "the death of an actor ended the run"


def write_texts(path, count: int) -> str:
    texts = pa.table({"text": [f"a red circle with the number {n}" for n in range(count)]})
    pq.write_table(texts, path / "manifest.parquet")
    return str(path / "manifest.parquet")


def write_config(path, manifest: str, root: str, storage: Storage, **pools) -> str:
    values = {
        "input": {"manifest": manifest},
        "output": {"root": root},
        "model": {"path": str(embedding_dir()), "check": False},
        "recipe": DEMO_RECIPE,
        "pools": {"units_per_block": 32} | pools,
        "commit": {"interval_s": 1.0, "fragment_bytes": 2**16},
        "storage": {"endpoint_url": storage.endpoint_url, "region": storage.region},
    }
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_one_request_in_twenty_goes_wrong(s3, bucket, tmp_path) -> None:
    manifest = write_texts(tmp_path, 1000)
    command = [sys.executable, "-m", "tests.faults.proxy", s3.endpoint_url, "11", "0.05"]
    with serve(command, tmp_path / "proxy.log", timeout_s=60) as url:
        storage = Storage(endpoint_url=url, region="us-east-1")
        config = tmp_path / "config.yaml"
        write_config(config, manifest, bucket.uri("vectors"), storage)
        for run in range(1, 4):
            running = Embedding(config, tmp_path / "log.txt")
            code = running.wait()
            print(f"run {run} ended with {code}")
            if code == 0:
                break
            assert running.ended_clearly(), running.output()
        assert code == 0, running.output()
        with urllib.request.urlopen(f"{url}/-/faults") as answer:
            print(json.load(answer))
    checked = verify(bucket.uri("vectors"), bucket.storage, manifest=manifest)
    assert checked.problems == (), str(checked)
    assert checked.num_done == 1000


def test_the_death_of_a_second_node(tmp_path) -> None:
    from ray.cluster_utils import Cluster

    manifest = write_texts(tmp_path, 1000)
    root = str(tmp_path / "vectors")
    memory = {"object_store_memory": 200 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2} | memory)
    try:
        second = cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20)
        cluster.wait_for_nodes()
        config = tmp_path / "config.yaml"
        # More than one node holds.
        pools = {
            "address": cluster.address,
            "decode": {"actors": 2},
            "embed": {"actors": 1},
        }
        write_config(config, manifest, root, Storage(), **pools)
        running = Embedding(config, tmp_path / "log.txt")
        wait_for_first_rows(running, root)
        # Without a word: the raylet and what it started.
        raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        code = running.wait()
        print(f"with a node dead the run ended with {code}: {running.output()[-600:]}")
        if code:
            assert running.ended_clearly(), running.output()
            # The pools do not fit on what is left.
            cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20)
            cluster.wait_for_nodes()
            again = Embedding(config, tmp_path / "again.txt")
            assert again.wait() == 0, again.output()
    finally:
        cluster.shutdown()
    checked = verify(root, Storage(), manifest=manifest)
    assert checked.problems == (), str(checked)
    assert checked.num_done == 1000


def wait_for_first_rows(running: Embedding, root: str) -> None:
    store = TableStore(root)
    while running.process.poll() is None:
        dataset = store.open("media")
        if dataset is not None and dataset.count_rows():
            return
        time.sleep(0.05)
    raise AssertionError(f"it ended before anything was committed: {running.output()}")
