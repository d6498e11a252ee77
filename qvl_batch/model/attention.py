"""Block-diagonal attention for packed sequences, registered with transformers.

Several sequences lie behind each other in one row; each attends only to itself and no padding is
computed. A sequence may have more keys than queries: those of a prefix that stands before it. Its
queries are then its last tokens. Two ways, one function:

* On CUDA in half precision: torch's own variable-length flash attention, where this torch has it,
  with split-KV off, so that a sequence's result does not depend on its neighbours.
* Anywhere else: one scaled dot-product attention per sequence, bitwise independent of neighbours.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# transformers' Qwen3-VL tower hands the whole packed row and its boundaries only to functions
# whose name contains "flash"; others it calls once per image in Python.
PACKED_ATTENTION = "qvl_packed_flash"


@functools.cache
def varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """Return ``torch.nn.attention.varlen.varlen_attn`` if it takes the options used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa", "num_splits"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernel packed attention uses there, for logs and reports."""
    return "varlen flash attention" if _use_varlen(device, dtype) else "SDPA per sequence"


@functools.cache
def _use_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.version.hip is None
        # Flash attention needs Ampere or newer.
        and torch.cuda.get_device_capability(device)[0] >= 8
        and varlen_kernel() is not None
    )


@functools.cache
def takes_prefix(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether causal attention with more keys than queries is right there.

    The per-sequence path states its mask. The flash kernel must align its causal window with the
    last key, as flash attention does since 2.1; three queries on five keys tell, tried once on the
    device itself.
    """
    if not _use_varlen(device, dtype):
        return True
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, tokens, 64, generator=draw).to(device, dtype) for tokens in (3, 5, 5)
    )
    edges = [torch.tensor([0, end], dtype=torch.int32, device=device) for end in (3, 5)]
    try:
        found = _varlen(query, key, value, *edges, 3, 5, scaling=0.125, causal=True)
    except RuntimeError:
        # A kernel that refuses other lengths says so this way; the plain path needs none.
        return False
    expected = F.scaled_dot_product_attention(
        *(part.float() for part in (query, key, value)),
        attn_mask=_causal_mask(3, 5, device),
        scale=0.125,
    )
    return bool((found.float() - expected.transpose(1, 2)).abs().max() < 0.05)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each packed sequence; transformers' attention interface.

    Args:
        module: The attention layer (its ``is_causal`` holds unless given).
        query: Shape (1, heads, tokens, head_dim).
        key: Shape (1, kv_heads, keys, head_dim).
        value: Shape (1, kv_heads, keys, head_dim).
        attention_mask: Never given: boundaries say it all.
        scaling: Factor of the scores.
        cu_seq_lens_q: int32 (sequences + 1,): where sequences begin and end. None: one sequence.
        cu_seq_lens_k: The same of the keys. None: as the queries'.
        max_length_q: The longest sequence.
        max_length_k: The most keys of a sequence.
        is_causal: Whether a token sees only the keys up to its own; the last query of a sequence
            stands at its last key.

    Returns:
        Shape (1, tokens, heads, head_dim), and no weights.
    """
    causal = bool(module.is_causal if is_causal is None else is_causal)
    edges_q, edges_k = cu_seq_lens_q, cu_seq_lens_k if cu_seq_lens_k is not None else cu_seq_lens_q
    if edges_q is not None and _use_varlen(query.device, query.dtype):
        longest = int(max_length_q or query.shape[2]), int(max_length_k or key.shape[2])
        output = _varlen(
            query, key, value, edges_q, edges_k, *longest, scaling=scaling, causal=causal
        )
        return output, None
    starts_q = [0, query.shape[2]] if edges_q is None else edges_q.tolist()
    starts_k = [0, key.shape[2]] if edges_k is None else edges_k.tolist()
    output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    for (start, end), (first, last) in zip(
        itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True
    ):
        queries, keys = end - start, last - first
        # Torch's own causal flag aligns with the first key; a single query sees every key anyway.
        shifted = causal and 1 < queries < keys
        part = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, first:last],
            value[:, :, first:last],
            attn_mask=_causal_mask(queries, keys, query.device) if shifted else None,
            is_causal=causal and queries == keys,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[:, start:end] = part.transpose(1, 2)
    return output, None


def _causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return allowed.tril(diagonal=keys - queries)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges_q: torch.Tensor,
    edges_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    output = varlen_kernel()(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        edges_q,
        edges_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
        num_splits=1,
    )
    return output.unsqueeze(0)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Make ``PACKED_ATTENTION`` known to transformers; may be called again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _no_mask)
