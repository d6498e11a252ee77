"""The notebook and the snippets beside it, run on tables that the embed job wrote."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qvl_batch.demo.checkpoint import DEMO_RECIPE, reranker_dir
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.rerank_config import parse_rerank_config
from tests.embedded_root import embed_corpus

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "infra" / "notebooks" / "explore.py"
README = NOTEBOOK.with_name("README.md")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """Tables of the demo's corpus with a partition a day and two failures, and scores."""
    import ray

    from qvl_batch.jobs.cluster import connect
    from qvl_batch.jobs.rerank import run_rerank

    folder = tmp_path_factory.mktemp("notebook")
    root = embed_corpus(folder).root
    queries = folder / "queries.jsonl"
    queries.write_text("".join(json.dumps({"text": q.text}) + "\n" for q in DEMO_QUERIES))
    reranking = {
        "input": {"queries": str(queries)},
        "search": {"root": root, "top_k": 6},
        "model": {
            "path": str(reranker_dir()),
            **{name: DEMO_RECIPE[name] for name in ("image", "video", "document")},
        },
    }
    connect("local")
    run_rerank(parse_rerank_config(reranking))
    ray.shutdown()
    return root


def test_the_notebook_runs_and_says_what_it_should(root, tmp_path) -> None:
    notebook = jupytext.read(NOTEBOOK)
    settings = {"QVL_ROOT": root, "QVL_RERANKER": str(reranker_dir())}
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env=os.environ | settings)

    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    said = "".join(
        output.get("text") or output["data"].get("text/markdown", "") + "\n" for output in outputs
    )
    # A warning in a notebook is the first thing that a reader asks about.
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert "120 rows of 115 units in 3 tables, 2 failures" in said
    assert "no problems found" in said
    assert "rows as questions to all rows; short list of 24" in said
    assert "42 pairs of 7 queries" in said
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 8
    tables = [output["data"]["text/html"] for output in outputs if _is_table(output)]
    assert len(tables) == 9
    hits = next(table for table in tables if "0058.png" in table)
    assert hits.index("0058.png") < hits.index("0064.webp")
    assert all("rerank_score" in table for table in tables[-4:-1])


def _is_table(output) -> bool:
    return "<table" in output.get("data", {}).get("text/html", "")


def test_the_notebook_is_kept_without_outputs_and_titles_every_section() -> None:
    text = NOTEBOOK.read_text()
    assert "image/png" not in text
    cells = jupytext.read(NOTEBOOK).cells
    assert cells[0].source.startswith("# What is in these tables?")
    # A reader always comes from text to code.
    assert cells[0].cell_type == "markdown"
    assert sum(cell.cell_type == "markdown" for cell in cells) >= 10


def test_every_snippet_of_the_readme_runs(root) -> None:
    places = {
        '"vectors"': repr(root),
        '"Qwen/Qwen3-VL-Reranker-2B"': repr(str(reranker_dir())),
    }
    there: dict = {}
    seen = []
    for snippet in SNIPPETS:
        for example, place in places.items():
            snippet = snippet.replace(example, place)
        exec(compile(snippet, str(README), "exec"), there)
        if "hits" in snippet:
            seen.append(there["hits"])
    plain, rescored, reranked = seen
    assert "_distance" in plain
    assert {len(plain), len(rescored)} == {10}
    assert rescored["_relevance_score"].is_monotonic_decreasing
    assert set(rescored["kind"]) == {"image"}
    assert reranked["_relevance_score"].is_monotonic_decreasing
    assert len(reranked) == 20
    table = there["table"]
    assert there["counts"]["rows"].sum() == table.count_rows() == len(there["everything"])
    assert there["sizes"]["len"].sum() == table.count_rows("kind = 'image'")
    # By SQL over all rows: the order of the two-tier search.
    images = there["best"][there["best"]["kind"] == "image"]
    assert list(images["uri"]) == list(rescored["uri"][: len(images)])
    assert len(there["failures"]) == 2
    there["reranker"].close()


@pytest.mark.parametrize("source", [NOTEBOOK.read_text(), *SNIPPETS])
def test_nothing_but_the_documented_extra_is_imported(source) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["notebook"]]
    allowed = {canonicalize_name(Requirement(line).name) for line in lines} | {"qvl-batch"}
    # What ipykernel brings by its nature.
    allowed.add("ipython")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    owners = importlib.metadata.packages_distributions() | {"qvl_batch": ["qvl-batch"]}
    unknown = {
        name
        for name in names - set(sys.stdlib_module_names)
        if not {canonicalize_name(owner) for owner in owners.get(name, [])} & allowed
    }
    assert unknown == set()


def test_the_snippets_are_found() -> None:
    assert len(SNIPPETS) == 6
