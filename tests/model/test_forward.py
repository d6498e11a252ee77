"""The packed pass against transformers' own padded pass, and against itself in any packing."""

import logging

import numpy as np
import pytest
import torch
from transformers import Qwen3VLModel

from qvl_batch.errors import EmbedFailedError
from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.patches import patch_rows
from qvl_batch.units import EmbedInput
from tests.model.model_inputs import mixed_inputs, picture


def transformers_vectors(folder, engine, inputs):
    """Embed one by one with plain transformers: Conv3d, SDPA, its own M-RoPE and DeepStack."""
    model = Qwen3VLModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    special = engine.tokenizer.special
    vectors = []
    for unit in inputs:
        ids = torch.from_numpy(engine.tokenizer.encode(unit).ids)[None]
        options = {}
        for key, visions in (("image", unit.images), ("video", unit.videos)):
            if visions:
                rows = [patch_rows(v.pixels, ids.device, torch.float32) for v in visions]
                suffix = "_videos" if key == "video" else ""
                options[f"pixel_values{suffix}"] = torch.cat(rows)
                options[f"{key}_grid_thw"] = torch.tensor([v.grid for v in visions])
        types = (ids == special["<|image_pad|>"]).int() + 2 * (
            ids == special["<|video_pad|>"]
        ).int()
        with torch.inference_mode():
            out = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **options)
        state = out.last_hidden_state[0, -1]
        vectors.append((state / state.norm()).numpy())
    return np.stack(vectors)


def test_packed_equals_transformers_one_by_one(engine, embedding_folder):
    inputs = mixed_inputs(12)
    ours = engine.embed_vectors(inputs)
    theirs = transformers_vectors(embedding_folder, engine, inputs)
    assert np.abs(ours - theirs).max() < 2e-6
    # The inputs are told apart by far more than the tolerance (random weights: all are alike).
    assert np.abs(theirs[0] - theirs[6]).max() > 1e-3


def test_vectors_do_not_depend_on_order_split_or_packing(engine, embedding_folder):
    inputs = mixed_inputs(64)
    whole = engine.embed_vectors(inputs)
    order = np.random.default_rng(5).permutation(64)
    shuffled = engine.embed_vectors([inputs[i] for i in order])
    assert np.abs(shuffled - whole[order]).max() < 1e-6
    small = EmbedEngine(embedding_folder, batch_tokens=300)
    split = np.concatenate([small.embed_vectors(inputs[i : i + 7]) for i in range(0, 64, 7)])
    assert np.abs(split - whole).max() < 1e-6
    alone = np.concatenate([small.embed_vectors([unit]) for unit in inputs[:12]])
    assert np.abs(alone - whole[:12]).max() < 1e-6


def test_bfloat16_stays_close(engine, embedding_folder):
    inputs = mixed_inputs(64)
    half = EmbedEngine(embedding_folder, dtype="bfloat16").embed_vectors(inputs)
    cosine = (half * engine.embed_vectors(inputs)).sum(axis=1)
    # Rounding this checkpoint's random float32 weights costs most of it.
    assert cosine.min() > 0.998
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)


def test_bfloat16_vectors_do_not_depend_on_order_split_or_packing(embedding_folder):
    inputs = mixed_inputs(64)
    whole = EmbedEngine(embedding_folder, dtype="bfloat16").embed_vectors(inputs)
    order = np.random.default_rng(6).permutation(64)
    shuffled = [inputs[i] for i in order]
    for batch_tokens, step in ((200, 64), (16_384, 7), (2048, 1)):
        other = EmbedEngine(embedding_folder, dtype="bfloat16", batch_tokens=batch_tokens)
        split = [other.embed_vectors(shuffled[i : i + step]) for i in range(0, 64, step)]
        assert (np.concatenate(split) * whole[order]).sum(axis=1).min() > 0.9999


def test_out_of_memory_halves_and_completes(engine, embedding_folder):
    inputs = mixed_inputs(24)
    short = EmbedEngine(embedding_folder, hard_limit_tokens=250)
    assert short.batch_tokens > 250
    assert np.abs(short.embed_vectors(inputs) - engine.embed_vectors(inputs)).max() < 1e-6
    assert short.batch_tokens <= 250


def test_a_unit_too_large_alone_fails_with_its_tokens_and_the_limit(engine, embedding_folder):
    inputs = mixed_inputs(6)
    inputs.insert(2, EmbedInput(texts=("word " * 400,), uri="big.txt"))
    short = EmbedEngine(embedding_folder, hard_limit_tokens=250)
    result = short.embed(inputs)
    assert list(result.failures) == [2]
    error = result.failures[2]
    assert isinstance(error, EmbedFailedError)
    assert error.uri == "big.txt"
    tokens = int(result.num_tokens[2])
    assert tokens > 400
    assert f"{tokens} tokens" in error.reason
    assert "250" in error.reason
    others = [i for i in range(7) if i != 2]
    expected = engine.embed_vectors([inputs[i] for i in others])
    assert np.abs(result.columns["vector"][others] - expected).max() < 1e-6


def test_an_image_too_large_for_the_tower_fails_alone(engine, embedding_folder):
    """The others of its pack go on in smaller passes."""
    inputs = mixed_inputs(6)
    inputs.insert(3, EmbedInput(images=(picture(9, 320, 320),), uri="big.png"))
    short = EmbedEngine(embedding_folder)
    short._packed.tower.hard_limit_patches = 100
    result = short.embed(inputs)
    assert list(result.failures) == [3]
    assert f"{result.num_tokens[3]} tokens do not fit" in result.failures[3].reason
    others = [i for i in range(7) if i != 3]
    expected = engine.embed_vectors([inputs[i] for i in others])
    assert np.abs(result.columns["vector"][others] - expected).max() < 1e-6


def test_the_tower_halves_without_halving_the_rest(engine, embedding_folder):
    inputs = mixed_inputs(24)
    short = EmbedEngine(embedding_folder)
    tower = short._packed.tower
    tower.hard_limit_patches = 50
    before = short.batch_tokens
    assert np.abs(short.embed_vectors(inputs) - engine.embed_vectors(inputs)).max() < 1e-6
    assert tower.max_patches <= 50
    assert short.batch_tokens == before


def test_the_kernel_is_logged_once(embedding_folder, caplog):
    with caplog.at_level(logging.INFO, "qvl_batch"):
        engine = EmbedEngine(embedding_folder)
        engine.embed(mixed_inputs(3))
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if f"attention by {engine.attention_kernel}" in line] == lines
    assert len(lines) == 1


def test_no_input_gives_no_row(engine):
    result = engine.embed([])
    assert result.columns["vector"].shape == (0, 64)
    assert not result.failures


@pytest.mark.parametrize("layout", ["unnested", "nested"])
def test_layouts_give_different_vectors_for_videos_only(embedding_folder, engine, layout):
    other = EmbedEngine(embedding_folder, token_layout=layout)
    inputs = mixed_inputs(4)
    same = np.abs(other.embed_vectors(inputs) - engine.embed_vectors(inputs)).max(axis=1) < 1e-6
    assert list(same) == [True, True, True, layout == "unnested"]
