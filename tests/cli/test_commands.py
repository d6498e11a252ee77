"""The commands as the README shows them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qvl_batch.demo.queries import DEMO_QUERIES

REPOSITORY = Path(__file__).parents[2]


def run(*arguments, cwd, code=0, script=("-m", "qvl_batch.cli"), **environment):
    result = subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "160"} | environment,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, run once; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("demo", cwd=folder)


def test_the_demo_answers_every_query_rightly(demo):
    _, printed = demo
    for query in DEMO_QUERIES:
        after = printed.partition(f"“{query.text}”")[2].partition("“")[0]
        first = next(line for line in after.splitlines() if re.search(r"│ 0\.\d+ ", line))
        assert query.answer in first
        assert "yes" in first
    assert "verified: every unit is there once" in printed
    assert "2 CorruptMediaError" in printed


def test_the_demo_writes_a_gallery_and_says_what_it_counted(demo):
    folder, printed = demo
    counted = re.search(r"first hit right: (\d of 7 by search, \d after reranking)", printed)[1]
    assert str(folder.resolve() / "qvl-demo/gallery.html") in printed
    page = (folder / "qvl-demo/gallery.html").read_text()
    assert counted in page
    assert page.count("<article>") == 10 * len(DEMO_QUERIES)
    assert page.count('src="data:image/jpeg;base64,') > 7 * len(DEMO_QUERIES)
    assert 'class="stage reason"' not in page
    for words in ("Page 2 of 6", "Video · 4 s", "→ 1st", *(query.text for query in DEMO_QUERIES)):
        assert words in page


def test_the_demo_can_be_run_again_and_embeds_nothing(demo):
    folder, _ = demo
    again = run("demo", cwd=folder)
    assert "Nothing to do" in again
    assert "115 done before" in again
    assert "“two red circles”" in again


def test_the_commands_that_the_demo_names_work(demo):
    folder, printed = demo
    named = [line.strip() for line in printed.splitlines() if line.startswith("  qvl-batch ")]
    for line in named[:6]:
        run(*shlex.split(line)[1:], cwd=folder)
    steps = ["manifest", "embed", "verify", "index", "rerank", "search"]
    assert [line.split()[1] for line in named[:6]] == steps
    assert (folder / "hits.html").exists()


def test_the_script_for_ray_jobs_is_the_same_job(demo):
    folder, _ = demo
    script = (str(REPOSITORY / "pipelines/embed.py"),)
    printed = run(
        "qvl-demo/embed.yaml",
        "--set",
        "output.collection=again",
        "--limit",
        "5",
        cwd=folder,
        script=script,
    )
    assert "5 to do" in printed
    checked = json.loads(
        run("verify", "qvl-demo/vectors", "--collection", "again", "--json", cwd=folder)
    )
    assert checked["ok"]
    assert checked["num_done"] + checked["num_failed"] == 5


def test_verify_needs_to_know_which_collection(demo):
    folder, _ = demo
    run("verify", "qvl-demo/vectors", "--collection", "absent", cwd=folder, code=2)


def test_manifest_lists_what_is_left_out(demo, tmp_path):
    folder, _ = demo
    (folder / "qvl-demo/media/dt=2026-01-01/readme.bin").write_bytes(bytes(range(256)))
    try:
        printed = run("manifest", "qvl-demo/media", tmp_path / "m.parquet", cwd=folder)
    finally:
        (folder / "qvl-demo/media/dt=2026-01-01/readme.bin").unlink()
    assert "readme.bin" in printed
    assert "117 units (1 document, 77 image, 24 text, 15 video)" in printed
    assert "partitioned by dt" in printed
    assert "left out, " in printed
    assert "ManifestReport(" not in printed
    manifest = pq.read_table(tmp_path / "m.parquet")
    assert manifest.num_rows == 117
    assert set(manifest["kind"].to_pylist()) == {"image", "text", "document", "video"}


def test_init_writes_a_configuration_that_names_what_was_given(tmp_path):
    run("init", "embed.yaml", "--manifest", "m.parquet", "--root", "out", cwd=tmp_path)
    text = (tmp_path / "embed.yaml").read_text()
    assert "manifest: m.parquet" in text
    assert "path: Qwen/Qwen3-VL-Embedding-2B" in text


def test_every_command_has_help(tmp_path):
    overview = run("--help", cwd=tmp_path)
    for command in ("manifest", "init", "embed", "verify", "doctor", "demo"):
        assert command in overview
        assert "Usage:" in run(command, "--help", cwd=tmp_path)
