"""Where checkpoints come from, and which are refused with what words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl_batch.errors import ModelError
from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.load import (
    check_folder,
    choose_dtype,
    full_dim,
    load_checkpoint,
    load_head_rows,
    resolve_model,
    weights_digest,
)
from qvl_batch.storage import Storage
from qvl_batch.units import EmbedInput
from tests.model.model_inputs import edit_json
from tests.moto_in_process import moto_server

CPU = torch.device("cpu")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    return load_checkpoint(folder, dtype=torch.float32, device=CPU)


def test_local_folder(embedding_folder):
    assert resolve_model(str(embedding_folder), None, Storage()) == embedding_folder
    assert resolve_model(f"file://{embedding_folder}", None, Storage()) == embedding_folder


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no model folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"only pickle weights \(pytorch_model.bin\); only safetensors are loaded",
        ),
        (
            lambda folder: edit_json(
                folder / "config.json", lambda config: config.update(model_type="qwen2_vl")
            ),
            "type 'qwen2_vl', not 'qwen3_vl'",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
            ),
            "lacks model-00002-of-00002.safetensors",
        ),
    ],
)
def test_refused_folders(checkpoint_copy, spoil, words):
    spoil(checkpoint_copy)
    with pytest.raises(ModelError, match=words):
        resolve_model(str(checkpoint_copy), None, Storage())


def test_a_revision_belongs_to_the_hub_only(embedding_folder):
    with pytest.raises(ModelError, match="revision"):
        resolve_model(str(embedding_folder), "main", Storage())


def test_an_unreachable_hub_is_one_clear_error(monkeypatch, tmp_path):
    from huggingface_hub import constants

    # Port 9 answers nowhere: as on a machine without a network.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no folder some/model, and the hub can not be reached"):
        resolve_model("some/model", None, Storage())


def test_missing_weights_are_never_random(checkpoint_copy):
    name = "model.visual.blocks.3.attn.qkv.weight"
    change_weights(checkpoint_copy, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=r"1 missing \(visual\.blocks\.3\.attn\.qkv\.weight\)"):
        load(checkpoint_copy)


def test_unknown_weights_are_refused_but_a_head_is_not(checkpoint_copy):
    change_weights(checkpoint_copy, lambda w: w.update({"lm_head.weight": torch.zeros(1536, 64)}))
    load(checkpoint_copy)
    change_weights(checkpoint_copy, lambda w: w.update({"model.extra.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match="1 unknown"):
        load(checkpoint_copy)


def test_weights_of_another_shape_are_refused(checkpoint_copy):
    name = "model.language_model.norm.weight"
    change_weights(checkpoint_copy, lambda weights: weights.update({name: torch.ones(65)}))
    words = (
        r"1 of another shape \(language_model\.norm\.weight is \(65,\) in the file, "
        r"config\.json asks for \(64,\)\).*from one checkpoint"
    )
    with pytest.raises(ModelError, match=words):
        load(checkpoint_copy)


def test_damaged_weights_are_refused(checkpoint_copy):
    path = checkpoint_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="can not be loaded"):
        load(checkpoint_copy)


def test_engine_refuses_a_tokenizer_without_endoftext(checkpoint_copy):
    edit_json(checkpoint_copy / "tokenizer.json", lambda t: t.update(post_processor=None))
    with pytest.raises(ModelError, match="endoftext"):
        EmbedEngine(checkpoint_copy)


def test_dimension_larger_than_the_model(embedding_folder):
    assert full_dim(embedding_folder) == 64
    with pytest.raises(ModelError, match=r"dim is 128.* has 64 dimensions"):
        EmbedEngine(embedding_folder, dim=128)


def test_one_nan_weight_harms_only_who_uses_it(checkpoint_copy, engine):
    tokens = engine.tokenizer.encode(EmbedInput(texts=("Q",))).ids
    others = engine.tokenizer.encode(EmbedInput(texts=("w",))).ids
    (row,) = set(tokens.tolist()) - set(others.tolist())
    name = "model.language_model.embed_tokens.weight"
    change_weights(checkpoint_copy, lambda weights: weights[name][row].fill_(float("nan")))
    spoiled = EmbedEngine(checkpoint_copy)
    units = [EmbedInput(texts=(text,), uri=text) for text in ("w", "Q", "v")]
    result = spoiled.embed(units)
    assert list(result.failures) == [1]
    assert type(result.failures[1]).__name__ == "BadVectorError"
    assert result.failures[1].uri == "Q"
    assert "64 of 64 values are NaN or Inf" in result.failures[1].reason
    healthy = engine.embed_vectors([units[0], units[2]])
    assert abs(result.columns["vector"][[0, 2]] - healthy).max() < 1e-6
    with pytest.raises(type(result.failures[1])):
        spoiled.embed_vectors(units)


def test_digest_knows_weights_config_and_tokenizer_only(checkpoint_copy, embedding_folder):
    before = weights_digest(embedding_folder)
    assert weights_digest(checkpoint_copy) == before
    (checkpoint_copy / "README.md").write_text("other words")
    assert weights_digest(checkpoint_copy) == before
    edit_json(checkpoint_copy / "config.json", lambda config: config.update(note=1))
    changed = weights_digest(checkpoint_copy)
    assert changed != before
    change_weights(checkpoint_copy, lambda w: w["model.language_model.norm.weight"].add_(1e-3))
    assert weights_digest(checkpoint_copy) not in (before, changed)


def test_auto_dtype():
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ModelError, match="float8"):
        choose_dtype("float8", CPU)


def test_head_rows_tied_and_untied(checkpoint_copy):
    weights = load_file(checkpoint_copy / "model.safetensors")
    tied = weights["model.language_model.embed_tokens.weight"][[285, 280]]
    assert torch.equal(load_head_rows(checkpoint_copy, [285, 280]), tied)

    def untie(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    edit_json(checkpoint_copy / "config.json", untie)
    change_weights(checkpoint_copy, lambda w: w.pop("lm_head.weight", None))
    with pytest.raises(ModelError, match=r"no lm_head\.weight"):
        load_head_rows(checkpoint_copy, [285, 280])
    head = torch.randn(1536, 64)
    change_weights(checkpoint_copy, lambda w: w.update({"lm_head.weight": head}))
    assert torch.equal(load_head_rows(checkpoint_copy, [285, 280]), head[[285, 280]])


@pytest.fixture(scope="module")
def s3_endpoint():
    """A real S3 server on loopback."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint, embedding_folder, monkeypatch):
    """The checkpoint on S3, with what must not be fetched beside it: (url, storage, files)."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    storage = Storage(endpoint_url=s3_endpoint, region="us-east-1")
    files = storage.filesystem("s3://models")
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="models")
    for path in embedding_folder.iterdir():
        files.pipe_file(f"models/tiny/{path.name}", path.read_bytes())
    files.pipe_file("models/tiny/pytorch_model.bin", b"pickle")
    files.pipe_file("models/tiny/code.py", b"print()")
    files.invalidate_cache()
    return "s3://models/tiny", storage, files


def test_object_store_folder_is_fetched_once(bucket, tmp_path, embedding_folder):
    url, storage, files = bucket
    folder = resolve_model(url, None, storage, str(tmp_path))
    assert {path.name for path in folder.iterdir()} == {p.name for p in embedding_folder.iterdir()}
    assert weights_digest(folder) == weights_digest(embedding_folder)
    written = (folder / "config.json").stat().st_mtime_ns
    assert resolve_model(url + "/", None, storage, str(tmp_path)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    files.pipe_file("models/tiny/config.json", b'{"model_type": "other"}')
    with pytest.raises(ModelError, match="'other'"):
        resolve_model(url, None, storage, str(tmp_path))


def test_leftovers_of_a_killed_copy_go(bucket, tmp_path):
    url, storage, _ = bucket
    first = resolve_model(url, None, storage, str(tmp_path))
    shutil.rmtree(first)
    (tmp_path / f".{first.name}-killed").mkdir()
    (tmp_path / f".{first.name}-killed" / "half").write_text("x")
    resolve_model(url, None, storage, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, f"{first.name}.lock"]


def test_several_processes_at_once_get_one_copy(bucket, tmp_path):
    url, storage, _ = bucket
    code = (
        "import sys; from qvl_batch.model.load import resolve_model;"
        "from qvl_batch.storage import Storage;"
        "storage = Storage(endpoint_url=sys.argv[2], region='us-east-1');"
        "print(resolve_model(sys.argv[1], None, storage, sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, url, storage.endpoint_url, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {worker.communicate(timeout=120)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    (folder,) = folders
    check_folder(Path(folder))
    assert len(list(tmp_path.iterdir())) == 2  # the copy and its lock


def test_a_missing_object_store_folder(bucket, tmp_path):
    _, storage, _ = bucket
    for url in ("s3://models/none", "s3://no-such-bucket/x"):
        with pytest.raises(ModelError, match=url):
            resolve_model(url, None, storage, str(tmp_path))
