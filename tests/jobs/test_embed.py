"""The embed job through real local Ray, on the shipped checkpoint and real files."""

import json
import shutil

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qvl_batch.demo.corpus import write_corpus
from qvl_batch.errors import (
    ConfigError,
    ModelError,
    RecipeMismatchError,
    TooManyFailuresError,
    UnschedulableError,
)
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def vectors_of(rows, dim=128):
    values = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, dim).astype(np.float32)


def by_row_id(rows):
    return dict(zip(rows["row_id"].to_pylist(), vectors_of(rows), strict=True))


def test_a_corpus_becomes_tables_once_and_answers(corpus, make_job):
    from tests.demo_answers import answer

    job = make_job(str(corpus.media_dir))
    report = run_embed(job.config())
    assert report.embedded == len(corpus.files) - len(corpus.broken)
    assert report.failed == len(corpus.broken)
    assert report.num_rows == corpus.num_rows
    assert job.tables() == [f"media__dt-2026-01-0{day}" for day in (1, 2, 3)]
    checked = verify(job.root, job.storage, manifest=job.manifest)
    assert checked.problems == ()
    assert (checked.num_done, checked.num_failed) == (report.embedded, report.failed)

    lines = []
    again = run_embed(job.config(), echo=lines.append)
    assert again.embedded == 0
    assert again.skipped_done == report.embedded
    assert again.skipped_failed == report.failed
    assert any("Nothing to do" in line for line in lines)

    from qvl_batch.demo.queries import DEMO_QUERIES

    for query, hits in zip(DEMO_QUERIES, answer(job.root), strict=True):
        best = hits.slice(0, 1).to_pylist()[0]
        place = best["uri"].removeprefix(f"{corpus.media_dir.resolve()}/")
        assert (place, int(best["row_id"][-1])) in corpus.answers(query), query.text

    failures = job.rows("_qvl_failures").to_pylist()
    assert {row["uri"] for row in failures} == {
        str(corpus.media_dir.resolve() / path) for path in corpus.broken
    }
    assert {row["stage"] for row in failures} == {"decode"}
    assert all(row["message"] and not row["retryable"] for row in failures)

    catalog = job.rows("_qvl_catalog").to_pylist()
    assert [row["table"] for row in catalog] == job.tables()
    assert sum(row["num_rows"] for row in catalog) == corpus.num_rows
    assert sum(row["num_failures"] for row in catalog) == report.failed
    assert all(len(file["sha256"]) == 64 for row in catalog for file in row["files"])
    assert not any(file["recomputed"] for row in catalog for file in row["files"])
    assert json.loads(catalog[0]["partition"]) == {"dt": "2026-01-01"}


def test_plain_lancedb_reads_the_tables(corpus, make_job):
    job = make_job(str(corpus.media_dir))
    run_embed(job.config("recipe.encodings=[float16]", "recipe.dim=64"))
    database = lancedb.connect(job.root)
    table = database.open_table("media__dt-2026-01-01")
    frame = table.to_pandas()
    assert len(frame) == table.count_rows()
    assert set(frame["dt"]) == {"2026-01-01"}
    vector = np.asarray(frame["vector"][3], np.float32)
    assert vector.shape == (64,)
    np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-3)
    hit = table.search(vector).limit(1).to_arrow()
    assert hit["row_id"][0].as_py() == frame["row_id"][3]


def test_every_kind_is_described_by_its_row(corpus, make_job):
    job = make_job(str(corpus.media_dir))
    run_embed(job.config())
    rows = job.all_rows()
    pages = rows.filter(pc.equal(rows["kind"], "document")).sort_by("page")
    assert pages["page"].to_pylist() == list(range(6))
    assert set(pages["num_segments"].to_pylist()) == {6}
    clip = rows.filter(pc.equal(rows["kind"], "video")).slice(0, 1).to_pylist()[0]
    assert (clip["start_s"], clip["end_s"], clip["num_frames"]) == (0.0, 4.0, 8)
    assert (clip["width_px"], clip["height_px"]) == (64, 64)
    note = rows.filter(pc.equal(rows["kind"], "text")).slice(0, 1).to_pylist()[0]
    assert note["text"].startswith(("a ", "an ", "two", "three", "four", "five"))
    assert note["width_px"] is None
    bits = rows["vector_bits"].combine_chunks().flatten().to_numpy().reshape(-1, 16)
    int8 = rows["vector_int8"].combine_chunks().flatten().to_numpy().reshape(-1, 128)
    assert rows["vector_scale"].null_count == 0
    # A component that rounds to 0 may have either sign.
    clear = int8 != 0
    np.testing.assert_array_equal((np.unpackbits(bits, axis=1) == 1)[clear], (int8 > 0)[clear])


def test_blocks_batches_and_pools_do_not_change_vectors(corpus, make_job, tmp_path):
    job = make_job(str(corpus.media_dir))
    exact = "recipe.encodings=[float32]"
    run_embed(job.config(exact))
    other = job.at(str(tmp_path / "other"))
    run_embed(
        other.config(
            exact,
            "pools.units_per_block=7",
            "pools.embed.batch_tokens=300",
            "pools.decode.actors=2",
            "pools.decode.cpus=0.5",
            "pools.embed.actors=2",
            "pools.embed.cpus=0.5",
            "commit.interval_s=0.5",
            "commit.fragment_bytes=65536",
        )
    )
    ours, theirs = by_row_id(job.all_rows()), by_row_id(other.all_rows())
    assert ours.keys() == theirs.keys()
    cosines = [float(ours[key] @ theirs[key]) for key in ours]
    assert min(cosines) >= 0.99999


def test_bad_files_are_failures_and_harm_nobody(corpus, make_job, tmp_path):
    good = tmp_path / "media"
    shutil.copytree(corpus.media_dir / "dt=2026-01-01", good)
    for path in good.rglob("*"):
        if str(path.relative_to(good)) in {p.partition("/")[2] for p in corpus.broken}:
            path.unlink()
    clean = make_job(str(good), str(tmp_path / "clean"))
    exact = "recipe.encodings=[float32]"
    run_embed(clean.config(exact))

    pictures = sorted(good.glob("pictures/*"))
    (good / "zero.jpg").write_bytes(b"")
    (good / "truncated.png").write_bytes(pictures[0].read_bytes()[:200])
    (good / "really_a_clip.png").write_bytes(next(good.glob("clips/*.mp4")).read_bytes())
    (good / "wrong_name.webp").write_bytes(
        next(p for p in pictures if p.suffix == ".png").read_bytes()
    )
    (good / "blank.txt").write_text(" \n")
    (good / "gone.png").write_bytes(pictures[0].read_bytes())
    (good / "changed.png").write_bytes(pictures[0].read_bytes())
    dirty = make_job(str(good), str(tmp_path / "dirty"))
    # The manifest of an object store takes the extension's word for the kind.
    manifest = pq.read_table(dirty.manifest)
    is_clip = pc.ends_with(manifest["uri"], "really_a_clip.png")
    kinds = pc.if_else(is_clip, "image", manifest["kind"])
    place = manifest.column_names.index("kind")
    pq.write_table(manifest.set_column(place, "kind", kinds), dirty.manifest)
    (good / "gone.png").unlink()
    (good / "changed.png").write_bytes(pictures[1].read_bytes())

    report = run_embed(dirty.config(exact))
    failures = {
        row["uri"].rpartition("/")[2]: (row["stage"], row["error_type"], row["message"])
        for row in dirty.rows("_qvl_failures").to_pylist()
    }
    reasons = {name: error for name, (_, error, _) in failures.items()}
    assert reasons == {
        "zero.jpg": "EmptyMediaError",
        "truncated.png": "CorruptMediaError",
        "really_a_clip.png": "KindMismatchError",
        "blank.txt": "EmptyMediaError",
        "gone.png": "MissingMediaError",
        "changed.png": "ChangedMediaError",
    }
    assert all(stage in ("fetch", "decode") and message for stage, _, message in failures.values())
    assert report.failures_by_reason["EmptyMediaError"] == 2
    clean_rows, dirty_rows = by_row_id(clean.all_rows()), by_row_id(dirty.all_rows())
    assert len(dirty_rows) == len(clean_rows) + 1
    for key, vector in clean_rows.items():
        np.testing.assert_allclose(dirty_rows[key], vector, atol=1e-6)
    assert verify(dirty.root, dirty.storage, manifest=dirty.manifest).problems == ()


def inline_texts(tmp_path, texts, **columns):
    path = str(tmp_path / "texts.parquet")
    pq.write_table(pa.table({"text": texts} | columns), path)
    return path


def test_inline_texts_carry_metadata_and_equal_rows_collapse(make_job, tmp_path, corpus):
    manifest = inline_texts(
        tmp_path, ["a red ring", "a blue star", "a red ring"], label=[1, 2, 1], lang=["en"] * 3
    )
    job = make_job(str(corpus.media_dir)).at(str(tmp_path / "texts"))
    job = type(job)(manifest=manifest, root=job.root)
    report = run_embed(job.config("output.partition_by=[lang]", "output.collection=notes"))
    assert (report.num_units, report.num_duplicates, report.embedded) == (2, 1, 2)
    rows = job.rows("notes__lang-en")
    assert sorted(zip(rows["text"].to_pylist(), rows["label"].to_pylist(), strict=True)) == [
        ("a blue star", 2),
        ("a red ring", 1),
    ]


def test_captions_instructions_and_frame_options_of_a_unit_count(corpus, tmp_path, make_job):
    picture = str(next((corpus.media_dir / "dt=2026-01-01/pictures").glob("*.png")))
    clip = str(next((corpus.media_dir / "dt=2026-01-01/clips").glob("*.mp4")))
    units = [
        {"uri": picture, "kind": "image"},
        {"uri": picture, "kind": "image", "text": "a red ring"},
        {"uri": picture, "kind": "mixed", "text": "a blue ring"},
        {"uri": clip, "kind": "video"},
        {"uri": clip, "kind": "video", "max_frames": 4, "text": "four"},
        {"uri": clip, "kind": "mixed", "text": "a clip"},
        {"uri": None, "kind": "text", "text": "hello"},
        {"uri": "note-1", "kind": "text", "text": "hello", "instruction": "Find a greeting"},
        {"uri": clip, "kind": "video", "fps": 0.25, "text": "slow"},
    ]
    manifest = str(tmp_path / "units.parquet")
    table = pa.Table.from_pylist(
        [{"instruction": None, "fps": None, "max_frames": None, "text": None} | u for u in units]
    )
    pq.write_table(table, manifest)
    job = type(make_job(str(corpus.media_dir)))(manifest=manifest, root=str(tmp_path / "units"))
    report = run_embed(job.config("recipe.encodings=[float32]"))
    assert (report.embedded, report.failed) == (9, 0)
    rows = {(row["uri"], row["text"]): row for row in job.rows("media").to_pylist()}
    frames = {text: rows[clip, text]["num_frames"] for text in (None, "four", "a clip", "slow")}
    assert frames == {None: 8, "four": 4, "a clip": 8, "slow": 4}
    vectors = np.array([row["vector"] for row in rows.values()])
    cosines = vectors @ vectors.T - np.eye(len(vectors))
    assert cosines.max() < 0.9999, "an option did not count"


def test_limit_takes_the_first_units_and_a_rerun_the_rest(corpus, make_job):
    job = make_job(str(corpus.media_dir))
    first = run_embed(job.config("input.limit=10"))
    assert first.embedded + first.failed == 10
    assert first.held_back == first.num_units - 10
    rest = run_embed(job.config())
    assert rest.embedded + rest.failed == first.num_units - 10
    assert verify(job.root, job.storage, manifest=job.manifest).problems == ()


def test_too_many_failures_end_the_run_and_keep_what_is_committed(make_job, tmp_path, corpus):
    media = tmp_path / "media"
    media.mkdir()
    for i in range(30):
        (media / f"{i:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([i]) * (i + 20))
    (media / "good.png").write_bytes(
        next((corpus.media_dir / "dt=2026-01-01/pictures").glob("*.png")).read_bytes()
    )
    job = make_job(str(media))
    strict = (
        "limits.failure_rate_after_units=5",
        "pools.units_per_block=4",
        "commit.interval_s=0.1",
    )
    with pytest.raises(TooManyFailuresError, match=r"max_failure_rate"):
        run_embed(job.config(*strict))
    assert job.rows("_qvl_failures").num_rows >= 5
    finished = run_embed(job.config())
    assert finished.skipped_failed >= 5
    assert finished.embedded + finished.skipped_done == 1
    # --retry-failed takes up again what failed for good.
    retried = run_embed(job.config(), retry_failed=True)
    assert (retried.failed, retried.skipped_done) == (30, 1)
    assert set(job.rows("_qvl_failures")["attempt"].to_pylist()) == {1, 2}


def test_another_recipe_is_refused_with_the_fields_that_differ(corpus, make_job):
    job = make_job(str(corpus.media_dir))
    run_embed(job.config("input.limit=3"))
    with pytest.raises(RecipeMismatchError, match=r"dim is 128 there, 64 here") as error:
        run_embed(job.config("recipe.dim=64"))
    assert "output.collection" in str(error.value)
    run_embed(job.config("recipe.dim=64", "output.collection=small", "input.limit=3"))
    assert verify(job.root, job.storage, collection="small").num_rows >= 3


def test_what_can_not_be_scheduled_is_refused_with_the_sum(corpus, make_job):
    job = make_job(str(corpus.media_dir))
    with pytest.raises(UnschedulableError, match=r"65 CPUs.*has 2 CPUs"):
        run_embed(job.config("pools.decode.actors=64"))
    with pytest.raises(UnschedulableError, match="GPU"):
        run_embed(job.config("pools.embed.gpus=1"))


def test_a_model_folder_without_weights_is_refused_before_anything_runs(corpus, make_job, tmp_path):
    job = make_job(str(corpus.media_dir))
    empty = tmp_path / "model"
    empty.mkdir()
    with pytest.raises(ModelError, match=str(empty)):
        run_embed(job.config(f"model.path={empty}"))
    with pytest.raises(ConfigError, match=r"recipe\.dim is 256.*128"):
        run_embed(job.config("recipe.dim=256"))
    assert job.tables() == []


def test_a_video_by_segments_has_a_row_a_segment(corpus, make_job, tmp_path):
    clips = tmp_path / "clips"
    shutil.copytree(corpus.media_dir / "dt=2026-01-02/clips", clips)
    job = make_job(str(clips))
    run_embed(job.config("recipe.segmentation.video_s=2"))
    rows = job.all_rows().to_pylist()
    whole = [row for row in rows if row["segment"] == 1]
    assert whole
    assert {(row["start_s"], row["end_s"], row["num_frames"]) for row in whole} == {(2.0, 4.0, 4)}
    assert verify(job.root, job.storage, manifest=job.manifest).problems == ()


@pytest.mark.s3real
def test_the_whole_job_against_a_real_s3_server(rgw, real_bucket, corpus, make_job, monkeypatch):
    # The local Ray has the keys that were in the environment when it started: those of the server.
    monkeypatch.setenv("AWS_ENDPOINT_URL", rgw.endpoint_url)
    real_bucket.fs().put(f"{corpus.media_dir}/", f"{real_bucket.name}/media", recursive=True)
    job = make_job(real_bucket.uri("media"), real_bucket.uri("vectors"))
    report = run_embed(job.config())
    assert report.num_rows == corpus.num_rows
    assert run_embed(job.config()).embedded == 0
    assert verify(job.root, job.storage, manifest=job.manifest).problems == ()
