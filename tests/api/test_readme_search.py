"""The README's snippets for analysts, run as they stand on tables of the shipped corpus."""

import re
import shutil
from pathlib import Path

from qvl_batch.demo.checkpoint import reranker_dir

README = Path(__file__).parents[2] / "README.md"


def test_the_snippets_run(embedded, tmp_path, monkeypatch):
    section = README.read_text().partition("## For analysts: search")[2].partition("\n## ")[0]
    snippets = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    assert len(snippets) == 2
    shutil.copy(embedded.path("dt=2026-01-01/pictures/0058.png"), tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    there: dict = {}
    for snippet in snippets:
        code = snippet.replace('"vectors"', repr(embedded.root)).replace(
            '"Qwen/Qwen3-VL-Reranker-2B"', repr(str(reranker_dir()))
        )
        exec(compile(code, str(README), "exec"), there)
    assert there["hits"].num_rows == 10
    assert set(there["hits"]["kind"].to_pylist()) == {"image"}
    assert there["hits"]["row_id"][0] not in there["alike"]["row_id"]
    assert there["best"]["rerank_score"].is_monotonic_decreasing
    assert len(there["near"]) == 10
    there["root"].close()
