"""The memory formula against what a pass really allocates, and what fits by it."""

import pytest
import torch

from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.forward import PackedPrompt
from qvl_batch.model.memory import (
    CPU_TOKENS,
    LEAST_TOKENS,
    MOST_TOKENS,
    attempt,
    patch_bytes,
    prefix_bytes,
    token_bytes,
    tokens_that_fit,
)
from qvl_batch.units import EmbedInput
from tests.model.model_inputs import clip


def peak_bytes(compute):
    """The most memory that lives at once beyond what lived before, by torch's own record."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        compute()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_bounds_what_a_pass_allocates(embedding_folder, dtype):
    engine = EmbedEngine(embedding_folder, dtype=dtype)
    packed, video = engine._packed, clip(1, 1, 512, 512)
    prompt = engine.tokenizer.encode(EmbedInput(texts=("word " * 900,)))
    size, config = packed.dtype.itemsize, packed.model.config
    tokens = len(prompt.ids)
    cases = [
        (
            lambda: packed.last_states([PackedPrompt(prompt, ())]),
            tokens * token_bytes(config, size),
        ),
        (lambda: packed.tower.features([video]), 32 * 32 * patch_bytes(config, size)),
        (
            lambda: packed.prefixes([PackedPrompt(prompt, ())]),
            tokens * (token_bytes(config, size) + prefix_bytes(config, size)),
        ),
    ]
    for compute, bound in cases:
        compute()
        assert 0.3 * bound < peak_bytes(compute) < bound


def test_what_fits_grows_with_memory_between_the_ends(engine):
    config = engine._packed.model.config
    fitting = [tokens_that_fit(config, 2, free) for free in range(0, 2**32, 2**26)]
    assert fitting == sorted(fitting)
    assert fitting[0] == LEAST_TOKENS
    assert fitting[-1] == MOST_TOKENS
    assert len(set(fitting)) > 10
    free = 2**27
    assert tokens_that_fit(config, 2, free, prefixes=True) < tokens_that_fit(config, 2, free)
    assert tokens_that_fit(config, 4, free) < tokens_that_fit(config, 2, free)


def test_auto_is_fixed_on_a_cpu_and_bounds_the_tower(embedding_folder):
    engine = EmbedEngine(embedding_folder)
    assert engine.batch_tokens == CPU_TOKENS
    assert engine._packed.tower.max_patches == 4 * CPU_TOKENS
    assert EmbedEngine(embedding_folder, batch_tokens=300)._packed.tower.max_patches == 1200


def test_attempt_answers_none_only_for_memory():
    cpu = torch.device("cpu")

    def raise_it(error):
        raise error

    assert attempt(lambda: 7, cpu) == 7
    assert attempt(lambda: raise_it(torch.OutOfMemoryError("no")), cpu) is None
    # More than any machine has: the CPU allocator's own words.
    assert attempt(lambda: torch.empty(2**58, dtype=torch.uint8), cpu) is None
    with pytest.raises(RuntimeError, match="another"):
        attempt(lambda: raise_it(RuntimeError("another")), cpu)
