"""`qvl-batch rerank` and its configuration file: what is wrong is told in one line."""

import os
import subprocess
import sys

import pytest

from qvl_batch.demo.checkpoint import reranker_dir
from qvl_batch.rerank_config import load_rerank_config


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "qvl_batch.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd())},
        check=False,
    )


def refused(result, *parts):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"text": "two red circles"}\n')
    made = run("init", "--job", "rerank", "--model", reranker_dir(), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "qvl-batch rerank rerank.yaml" in made.stdout
    return tmp_path / "rerank.yaml"


def test_init_writes_a_file_that_loads(config):
    loaded = load_rerank_config(str(config))
    assert (loaded.input.queries, loaded.search.root) == ("queries.jsonl", "vectors")
    assert loaded.model.path == str(reranker_dir())


def test_init_knows_its_jobs(tmp_path):
    refused(run("init", "--job", "train", cwd=tmp_path), "'train'", "rerank")


def test_what_is_not_there(config):
    folder = config.parent
    refused(run("rerank", "absent.yaml", cwd=folder), "absent.yaml", "init --job rerank")
    refused(run("rerank", config, cwd=folder), "no collection 'media'")
    no_queries = run("rerank", config, "--set", "input.queries=none.jsonl", cwd=folder)
    refused(no_queries, "none.jsonl")
    refused(run("rerank", config, "--set", "search.topk=3", cwd=folder), "search.top_k")
    assert not (folder / "vectors").exists()
