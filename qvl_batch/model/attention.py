"""Block-diagonal attention for packed sequences, registered with transformers.

Several sequences lie behind each other in one row; each attends only to itself and no padding is
computed. Two ways, one function:

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


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each packed sequence; transformers' attention interface.

    Args:
        module: The attention layer (its ``is_causal`` holds unless given).
        query: Shape (1, heads, tokens, head_dim).
        key: Shape (1, kv_heads, tokens, head_dim).
        value: Shape (1, kv_heads, tokens, head_dim).
        attention_mask: Never given: boundaries say it all.
        scaling: Factor of the scores.
        cu_seq_lens_q: int32 (sequences + 1,): where sequences begin and end. None: one sequence.
        max_length_q: The longest sequence.
        is_causal: Whether a token sees only those before it.

    Returns:
        Shape (1, tokens, heads, head_dim), and no weights.
    """
    causal = bool(module.is_causal if is_causal is None else is_causal)
    tokens = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if cu_seq_lens_q is not None and _use_varlen(query.device, query.dtype):
        longest = int(max_length_q or tokens)
        output = varlen_kernel()(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=grouped,
            num_splits=1,
        )
        return output.unsqueeze(0), None
    edges = [0, tokens] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    output = query.new_empty(1, tokens, query.shape[1], query.shape[3])
    for start, end in itertools.pairwise(edges):
        part = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=causal,
            scale=scaling,
            enable_gqa=grouped,
        )
        output[:, start:end] = part.transpose(1, 2)
    return output, None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Make ``PACKED_ATTENTION`` known to transformers; may be called again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _no_mask)
