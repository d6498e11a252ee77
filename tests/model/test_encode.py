"""Encodings against a plain numpy statement of each."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_batch.model.encode import encode, is_bad, pack_signs, quantise_int8, truncate


def vectors(rows, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.sampled_from([8, 16, 64]), st.integers(0, 10_000))
def test_equals_numpy(rows, dim, seed):
    full = vectors(rows, 64, seed)
    found = encode(torch.from_numpy(full), dim, ("float32", "int8", "binary"))
    head = full[:, :dim]
    unit = head / np.linalg.norm(head, axis=1, keepdims=True)
    np.testing.assert_allclose(found["vector"], unit, atol=1e-6)
    scale = np.abs(found["vector"]).max(axis=1, initial=0) / np.float32(127)
    np.testing.assert_array_equal(found["vector_scale"], scale)
    steps = np.rint(found["vector"] / np.where(scale > 0, scale, 1)[:, None])
    np.testing.assert_array_equal(found["vector_int8"], np.clip(steps, -127, 127).astype(np.int8))
    np.testing.assert_array_equal(found["vector_bits"], np.packbits(found["vector"] > 0, axis=1))


def test_types_and_shapes():
    found = encode(torch.from_numpy(vectors(3, 32)), 16, ("float16", "int8", "binary"))
    assert {name: (column.dtype.name, column.shape) for name, column in found.items()} == {
        "vector": ("float16", (3, 16)),
        "vector_int8": ("int8", (3, 16)),
        "vector_scale": ("float32", (3,)),
        "vector_bits": ("uint8", (3, 2)),
    }


def test_int8_gives_values_back_within_half_a_step():
    full = torch.from_numpy(vectors(50, 64))
    steps, scale = quantise_int8(full)
    assert int(steps.abs().max()) == 127
    assert int(steps.min()) >= -127
    error = (steps.float() * scale[:, None] - full).abs()
    assert bool((error <= scale[:, None] * 0.5001).all())


def test_zero_is_no_set_bit():
    assert pack_signs(torch.tensor([[0.0, 1, -1, 0, 0, 0, 0, 2]])).tolist() == [[0b01000001]]


def test_bfloat16_is_normalised_in_float32():
    found = truncate(torch.from_numpy(vectors(20, 64)).to(torch.bfloat16), 64)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.norm(dim=1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        ([1.0, 0, 0, 0], False),
        ([float("nan"), 1, 1, 1], True),
        ([float("inf"), 1, 1, 1], True),
        ([1e-9, 0, 0, 0], True),
        # What is cut off does not count, neither for better nor for worse.
        ([0.0, 0, 5, 0], True),
        ([1.0, 0, float("nan"), 0], False),
    ],
)
def test_bad_vectors(row, bad):
    assert is_bad(torch.tensor([row]), 2).tolist() == [bad]
