"""The check of the installation before a run: stated in tables, kept, and refusing to write."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lance
import pytest

import qvl_batch
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.embed_job import prepare

CERTIFICATE = b"qvl.certificate"


@pytest.fixture
def job(tmp_path, make_job):
    media = tmp_path / "media"
    media.mkdir()
    (media / "note.txt").write_text("a red circle")
    return make_job(str(media))


def stated(job):
    (name,) = job.tables()
    return lance.dataset(f"{job.root}/{name}.lance").schema.metadata


@pytest.mark.usefixtures("local_ray")
def test_a_run_states_its_certificate_and_keeps_it(job):
    report = run_embed(job.config())
    folder = Path(job.root, "_qvl_runs")
    content = (folder / f"{report.run_id}.certificate.json").read_bytes()
    assert stated(job)[CERTIFICATE].decode() == hashlib.sha256(content).hexdigest()
    certificate = json.loads(content)
    assert certificate["holds"]
    assert [case["case"] for case in certificate["cases"]] == ["text", "image", "page", "video"]
    assert (folder / f"{report.run_id}.json").exists()

    again = run_embed(job.config())
    # Nothing was left to do, so nothing was checked and nothing is left beside the report.
    assert len(list(folder.iterdir())) == 2
    assert again.embedded == 0


@pytest.mark.usefixtures("local_ray")
def test_a_run_without_the_check_states_none(job):
    report = run_embed(job.config("model.check=false"))
    assert report.embedded == 1
    assert CERTIFICATE not in stated(job)
    assert [path.name for path in Path(job.root, "_qvl_runs").iterdir()] == [
        f"{report.run_id}.json"
    ]


def test_the_plan_holds_the_certificate(job):
    with contextlib.ExitStack() as held:
        assert prepare(job.config(), held).certificate.holds
    with contextlib.ExitStack() as held:
        assert prepare(job.config("model.check=false"), held).certificate is None


def test_a_broken_installation_refuses_to_write(job, tmp_path):
    """A copy of the package whose stored values are other ones: Ray is not even started."""
    shutil.copytree(Path(qvl_batch.__file__).parent, tmp_path / "broken" / "qvl_batch")
    path = tmp_path / "broken" / "qvl_batch" / "api" / "stack_check" / "stored.json"
    stored = json.loads(path.read_text())
    stored["video"]["pixels"] = stored["image"]["pixels"]
    stored["text"]["vector"][5] += 3e-4
    path.write_text(json.dumps(stored))

    command = "from qvl_batch.cli import main; main()"
    refused = subprocess.run(
        [sys.executable, "-c", command, "embed", job.write(tmp_path / "embed.yaml")],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "broken")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2, refused.stderr
    assert "vector of the text; pixels of the video (with qvl-batch " in refused.stderr
    assert "model.check: false" in refused.stderr
    assert job.tables() == []
    assert "Ray" not in refused.stdout + refused.stderr
