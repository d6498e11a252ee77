"""An instruction computed once changes no vector: against the plain path, unit by unit."""

import numpy as np
import pytest

from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.instruction_prefix import MOST_KEPT, MOST_TOKENS
from qvl_batch.units import EmbedInput
from tests.model.model_inputs import mixed_inputs, picture


def text(words, instruction=None):
    return EmbedInput(texts=(words,), instruction=instruction)


@pytest.fixture(scope="module")
def plain(embedding_folder):
    return EmbedEngine(embedding_folder, reuse_prefix=False)


@pytest.fixture
def sharing(embedding_folder):
    return EmbedEngine(embedding_folder)


def shared_tokens(engine, unit):
    return engine.tokenizer.num_instruction_tokens(engine.tokenizer.encode(unit))


def largest_difference(engine, plain, units):
    return np.abs(engine.embed_vectors(units) - plain.embed_vectors(units)).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_plain_path(embedding_folder, plain, dtype):
    units = mixed_inputs(30)
    found = EmbedEngine(embedding_folder, dtype=dtype)
    if dtype == "float32":
        assert largest_difference(found, plain, units) < 1e-6
        return
    exact = plain.embed_vectors(units)
    plainly = EmbedEngine(embedding_folder, dtype=dtype, reuse_prefix=False)
    errors = [np.abs(engine.embed_vectors(units) - exact) for engine in (found, plainly)]
    assert np.sqrt((errors[0] ** 2).mean()) < 1.5 * np.sqrt((errors[1] ** 2).mean())


def test_the_shared_tokens_are_the_instructions(engine):
    units = [text("one"), text(" two"), EmbedInput(), EmbedInput(images=(picture(1),))]
    prompts = [engine.tokenizer.encode(unit) for unit in units]
    (count,) = {engine.tokenizer.num_instruction_tokens(prompt) for prompt in prompts}
    assert count > 10
    assert len({prompt.ids[:count].tobytes() for prompt in prompts}) == 1
    assert shared_tokens(engine, text("one", "Find the clip that shows it")) > count


def test_a_text_that_changes_the_header_shares_nothing(sharing, plain):
    units = [text("\nbegins oddly"), text("\n\n\n"), text("plain")]
    assert [shared_tokens(sharing, unit) > 0 for unit in units] == [False, False, True]
    assert largest_difference(sharing, plain, units) < 1e-6


def test_only_what_is_short_behind_its_instruction_shares(sharing):
    short, long = text("word " * 40), text("word " * 300)
    assert len(sharing.tokenizer.encode(long).ids) > 300
    sharing.embed_vectors([long])
    assert sharing._prefixes.num_tokens == 0
    sharing.embed_vectors([short, long])
    assert sharing._prefixes.num_tokens == shared_tokens(sharing, short)


def test_any_number_of_instructions_within_bounds(sharing, plain):
    kinds = [f"Find the page about item {i} " + "and so on " * i for i in range(40)]
    units = [text(f"note {i}", kinds[i % 40]) for i in range(60)]
    assert sum(shared_tokens(sharing, unit) for unit in units[:40]) > MOST_TOKENS
    for _ in range(2):
        assert largest_difference(sharing, plain, units) < 1e-6
        assert len(sharing._prefixes._kept) <= MOST_KEPT
        assert 0 < sharing._prefixes.num_tokens <= MOST_TOKENS


def test_an_instruction_is_computed_once(sharing):
    kept = []
    for words in ("a", "b", "c"):
        sharing.embed_vectors([text(words), text(words * 2), text(words, "Find it")])
        kept.append([id(prefix) for _, prefix in sorted(sharing._prefixes._kept.items())])
    assert len(kept[0]) == 2
    assert kept[0] == kept[1] == kept[2]


def test_cut_prompts_equal_the_plain_path(embedding_folder):
    options = {"max_tokens": 40}
    units = [text("short"), text("word " * 60), text("word", "so long " * 60)]
    sharing = EmbedEngine(embedding_folder, **options)
    plain = EmbedEngine(embedding_folder, reuse_prefix=False, **options)
    assert largest_difference(sharing, plain, units) < 1e-6
    result = sharing.embed(units)
    assert list(result.truncated) == [False, True, True]
    assert list(result.num_tokens) == list(plain.embed(units).num_tokens)


def test_instructions_that_do_not_fit_are_computed_plainly(embedding_folder, plain):
    units = [text(f"note {i}", "Find " + "it " * 40) for i in range(4)]
    tokens = len(plain.tokenizer.encode(units[0]).ids)
    short = EmbedEngine(embedding_folder, hard_limit_tokens=tokens)
    assert largest_difference(short, plain, units) < 1e-6
    tiny = EmbedEngine(embedding_folder, hard_limit_tokens=12)
    assert sorted(tiny.embed(units).failures) == [0, 1, 2, 3]
