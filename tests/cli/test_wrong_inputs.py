"""What a new user gets wrong: one line with the remedy, exit code 2, and nothing done."""

import os
import subprocess
import sys

import pytest
import yaml

from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.demo.corpus import write_corpus


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "qvl_batch.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


def refused(result, *parts):
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus")).media_dir


@pytest.fixture
def config(media, tmp_path):
    """A configuration that would work, and a function that writes it with changes."""
    manifest = tmp_path / "manifest.parquet"
    assert run("manifest", media, manifest).returncode == 0
    values = {
        "input": {"manifest": str(manifest)},
        "output": {"root": str(tmp_path / "vectors")},
        "model": {"path": str(embedding_dir())},
        "recipe": DEMO_RECIPE,
    }
    path = tmp_path / "embed.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def embed(config, *sets, **environment):
    return run("embed", config, *[part for s in sets for part in ("--set", s)], **environment)


def test_a_typo_in_a_key(config):
    refused(embed(config, "recipe.encoding=[int8]"), "recipe.encoding", "recipe.encodings")


def test_a_typo_in_a_commands_option(config):
    result = run("embed", config, "--retry-fialed")
    assert result.returncode == 2
    assert "--retry-failed" in result.stderr


def test_no_such_configuration(tmp_path):
    refused(run("embed", tmp_path / "absent.yaml"), "absent.yaml", "qvl-batch init")


def test_no_such_manifest(config):
    refused(embed(config, "input.manifest=absent.parquet"), "absent.parquet", "qvl-batch manifest")


def test_a_manifest_that_is_no_parquet(config):
    refused(embed(config, f"input.manifest={config}"), "not a Parquet file")


def test_a_model_folder_without_weights(config, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((embedding_dir() / "config.json").read_bytes())
    refused(embed(config, f"model.path={folder}"), folder, "safetensors")


def test_a_model_that_is_not_there(config, tmp_path):
    refused(embed(config, f"model.path={tmp_path}/absent"), f"{tmp_path}/absent")


def test_a_hub_model_without_a_network(config):
    result = embed(config, "model.path=Qwen/Qwen3-VL-Embedding-2B", HF_HUB_OFFLINE="1")
    refused(result, "Qwen/Qwen3-VL-Embedding-2B")


def test_a_root_whose_parent_is_missing(config, tmp_path):
    refused(embed(config, f"output.root={tmp_path}/no/such/root"), f"{tmp_path}/no/such")


def test_a_root_that_is_a_file(config, tmp_path):
    (tmp_path / "file").write_text("")
    refused(embed(config, f"output.root={tmp_path}/file"), f"{tmp_path}/file", "directory")


def test_a_read_only_root(config):
    # /proc takes no files from anybody, root included.
    refused(embed(config, "output.root=/proc/qvl"), "/proc/qvl")


def test_a_bad_collection_name(config):
    refused(embed(config, "output.collection=a/b"), "output.collection", "a/b")


def test_a_partition_column_that_is_not_there(config):
    refused(embed(config, "output.partition_by=[day]"), "'day'", "dt")


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(run("manifest", tmp_path / "empty", tmp_path / "m.parquet"), tmp_path / "empty")
    assert not (tmp_path / "m.parquet").exists()


def test_a_folder_that_is_not_there(tmp_path):
    refused(run("manifest", tmp_path / "absent", tmp_path / "m.parquet"), tmp_path / "absent")


def test_a_bad_partition_rule(media, tmp_path):
    result = run("manifest", media, tmp_path / "m.parquet", "--partition-by", "regex:(")
    refused(result, "regex:(")


def test_verify_of_nothing(tmp_path):
    refused(run("verify", tmp_path), tmp_path)


def test_doctor_without_golden_outputs(tmp_path):
    result = run("doctor", "--model", embedding_dir(), "--golden", tmp_path / "absent")
    refused(result, tmp_path / "absent")


def test_init_does_not_overwrite(tmp_path):
    path = tmp_path / "embed.yaml"
    path.write_text("kept")
    refused(run("init", path), path)
    assert path.read_text() == "kept"


def test_a_bucket_that_is_not_there(s3, config):
    endpoint = {"AWS_ENDPOINT_URL": s3.endpoint_url}
    refused(run("manifest", "s3://no-such-bucket/x", "m.parquet", **endpoint), "no-such-bucket")
    refused(embed(config, "output.root=s3://no-such-bucket/v", **endpoint), "no-such-bucket")
    result = embed(config, "input.manifest=s3://no-such-bucket/m.parquet", **endpoint)
    refused(result, "no-such-bucket")
    refused(run("verify", "s3://no-such-bucket/v", **endpoint), "no-such-bucket")


def test_an_endpoint_that_does_not_answer(config):
    endpoint = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    refused(embed(config, "output.root=s3://bucket/v", **endpoint), "127.0.0.1:9", "endpoint")
    refused(run("manifest", "s3://bucket/x", "m.parquet", **endpoint), "127.0.0.1:9")


@pytest.mark.s3real
def test_wrong_credentials(rgw, real_bucket, config):
    wrong = {"AWS_ENDPOINT_URL": rgw.endpoint_url, "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    listed = run("manifest", real_bucket.uri("media"), "m.parquet", **wrong)
    embedded = embed(config, f"output.root={real_bucket.uri('v')}", **wrong)
    for result in (listed, embedded):
        refused(result, "credentials")
        assert "not-the-secret" not in result.stdout + result.stderr
