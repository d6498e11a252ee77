"""What a forward pass needs of a device's memory, and what to do when there is too little."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from qvl_batch.budget import FRAME_FACTOR, MERGE, PATCH_PX

Result = TypeVar("Result")

# On a CPU short passes stay nearer to the caches: of 16,384 tokens' CPU time, passes of 4,096 took
# 0.88 and of 2,048 or 1,024 0.83 (4 layers of 64, one thread, medians of paired rounds).
CPU_TOKENS = 2048
# Enough to keep a GPU's matrix units busy by its sizes; not measured on one.
MOST_TOKENS = 32_768
# Below this a pass is too short to be worth trying; a unit may need more anyway.
LEAST_TOKENS = 1024
# The rest is for kept features, the allocator's gaps, kernels' workspaces and other processes.
USABLE_SHARE = 0.8
FEATURE_SHARE = 0.1
CPU_FEATURE_BYTES = 2**30


def attempt(compute: Callable[[], Result], device: torch.device) -> Result | None:
    """Return what ``compute`` returns, or None if the device's memory ran out.

    What the failed attempt held is freed by then.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        # How the CPU allocator says it.
        if "can't allocate memory" not in str(error):
            raise
    # Outside the handlers, whose traceback would keep the failed pass's tensors alive.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def token_bytes(config: PreTrainedConfig, element_bytes: int) -> int:
    """Return the peak memory of one language-model token in a forward pass without gradients.

    Counted from transformers' Qwen3-VL decoder layer, which runs unfused; only one layer's
    intermediates live at a time. In elements: the MLP's gate, its activation and the product
    (3 x intermediate); the residual, its normalised copy in the model's type and twice in float32,
    and the sum (6 x hidden at 2 bytes an element); queries, keys and values before and after
    rotation (2 x all heads x head_dim). To these come the token's features if it is visual: the
    embedding and one deepstack row a deepstack layer. An upper bound: at the 2B model's widths in
    bfloat16 it says 94 kB a token, and a CPU's record of allocations 54 kB.
    """
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    layer = 3 * text.intermediate_size + 6 * text.hidden_size + 2 * heads * text.head_dim
    features = (1 + len(vision.deepstack_visual_indexes)) * text.hidden_size
    return element_bytes * (layer + features)


def prefix_bytes(config: PreTrainedConfig, element_bytes: int) -> int:
    """Return the memory of one token's keys and values in all layers."""
    text = config.text_config
    per_layer = 2 * text.num_key_value_heads * text.head_dim
    return element_bytes * text.num_hidden_layers * per_layer


def patch_bytes(config: PreTrainedConfig, element_bytes: int) -> int:
    """Return the peak memory of one tower patch in a forward pass without gradients.

    Counted from transformers' Qwen3-VL vision block: the MLP before and after its activation
    (2 x intermediate); the residual, its normalised copy, queries, keys and values, attention's
    output and the sum (8 x hidden); and the rotation, which is done in float32 whatever the type:
    queries and keys, their halves turned and their products (6 x hidden x 4 bytes). At the 2B
    model's widths in bfloat16 it says 57 kB a patch, and a CPU's record of allocations 47 kB.

    In a tower narrower than that the frames themselves are the peak: a pair of frames' values as
    uint8, twice in float32, and twice in the model's type.
    """
    vision = config.vision_config
    block = 2 * vision.intermediate_size + 8 * vision.hidden_size
    values = 3 * FRAME_FACTOR * PATCH_PX * PATCH_PX
    return max(
        element_bytes * block + 4 * 6 * vision.hidden_size,
        (1 + 2 * 4 + 2 * element_bytes) * values,
    )


def tokens_that_fit(
    config: PreTrainedConfig, element_bytes: int, free_bytes: int, *, prefixes: bool = False
) -> int:
    """Return the tokens of one forward pass for which ``free_bytes`` are enough.

    Every token is taken to be visual, with its 4 patches in the tower in the same pass: an upper
    bound, since the tower is done before the language model begins.

    Args:
        config: Of the whole model, whose weights are already in memory.
        element_bytes: Bytes of one value of the model's type.
        free_bytes: The device's free memory.
        prefixes: Whether as many tokens' keys and values are kept besides (reranking).
    """
    each = token_bytes(config, element_bytes)
    each += MERGE * MERGE * patch_bytes(config, element_bytes)
    if prefixes:
        each += prefix_bytes(config, element_bytes)
    fitting = int(free_bytes * USABLE_SHARE) // each
    return max(LEAST_TOKENS, min(MOST_TOKENS, fitting))


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device, those included that torch holds but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + held


def feature_bytes(device: torch.device) -> int:
    """Return how much memory vision features may hold that are kept for later prompts."""
    if device.type != "cuda":
        return CPU_FEATURE_BYTES
    return int(free_memory(device) * FEATURE_SHARE)
