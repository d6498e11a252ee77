"""Packed attention against plain softmax attention under a dense block mask."""

import math

import pytest
import torch

from qvl_batch.model.attention import (
    kernel_name,
    packed_attention,
    takes_prefix,
    varlen_kernel,
)

LENGTHS = [5, 1, 9, 3]


class Layer(torch.nn.Module):
    is_causal = True


def random_heads(heads, kv_heads, tokens, dim=16, seed=0):
    torch.manual_seed(seed)
    shapes = [(1, heads, tokens, dim), (1, kv_heads, tokens, dim), (1, kv_heads, tokens, dim)]
    return [torch.randn(shape) for shape in shapes]


def dense(query, key, value, lengths, causal, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = owner[:, None] == owner[None, :]
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -math.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def edges(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_a_dense_block_mask(causal, kv_heads):
    query, key, value = random_heads(4, kv_heads, sum(LENGTHS))
    found, weights = packed_attention(
        *(Layer(), query, key, value),
        scaling=0.3,
        cu_seq_lens_q=edges(LENGTHS),
        max_length_q=max(LENGTHS),
        is_causal=None if causal else False,
    )
    assert weights is None
    expected = dense(query, key, value, LENGTHS, causal, 0.3)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-6


def test_bitwise_independent_of_neighbours():
    query, key, value = random_heads(4, 2, sum(LENGTHS))
    options = {"scaling": 0.25}
    whole, _ = packed_attention(Layer(), query, key, value, cu_seq_lens_q=edges(LENGTHS), **options)
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        alone, _ = packed_attention(
            Layer(), query[:, :, part], key[:, :, part], value[:, :, part], **options
        )
        assert torch.equal(whole[:, part], alone)
        start += length


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_more_keys_than_queries_are_a_prefix(kv_heads):
    """The last tokens of each sequence, asked alone, see what they see in the whole sequence."""
    query, key, value = random_heads(4, kv_heads, sum(LENGTHS))
    options = {"scaling": 0.3, "is_causal": True}
    whole, _ = packed_attention(Layer(), query, key, value, cu_seq_lens_q=edges(LENGTHS), **options)
    asked = [2, 1, 9, 1]
    places = torch.cat(
        [torch.arange(end - n, end) for end, n in zip(edges(LENGTHS)[1:], asked, strict=True)]
    )
    found, _ = packed_attention(
        *(Layer(), query[:, :, places], key, value),
        cu_seq_lens_q=edges(asked),
        cu_seq_lens_k=edges(LENGTHS),
        max_length_q=9,
        max_length_k=9,
        **options,
    )
    assert float((found - whole[:, places]).abs().max()) < 1e-6
    assert takes_prefix(torch.device("cpu"), torch.float32)


def test_the_cpu_uses_one_call_a_sequence():
    assert kernel_name(torch.device("cpu"), torch.bfloat16) == "SDPA per sequence"


def test_this_torch_has_the_options_that_the_gpu_path_needs():
    """Torch without them is served by SDPA; the newest allowed one must not fall back unseen."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        assert varlen_kernel() is None or callable(varlen_kernel())
    else:
        assert callable(varlen_kernel())
