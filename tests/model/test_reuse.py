"""Reuse changes what is computed, never a score: against the plain path, pair by pair."""

import itertools
import logging
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from qvl_batch.errors import EmbedFailedError, ModelError
from qvl_batch.model.pairs import Pair, shared_prefix
from qvl_batch.model.prompt import PromptIds, Span
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.units import EmbedInput, Vision
from tests.model.model_inputs import clip, edit_json, picture


def queries():
    return [
        EmbedInput(texts=("two red circles",)),
        EmbedInput(images=(picture(11, 64, 128),)),
        EmbedInput(texts=("like this clip",), videos=(clip(12, 2),)),
        EmbedInput(texts=("and this",), images=(picture(13, 32, 32),), videos=(clip(14, 1),)),
        EmbedInput(),
    ]


def documents():
    return [
        EmbedInput(texts=("a page that says tiger",)),
        EmbedInput(texts=("a page that says lion, and more",)),
        EmbedInput(texts=("\n: starts oddly",)),
        EmbedInput(images=(picture(1),)),
        EmbedInput(images=(picture(2),)),
        EmbedInput(texts=("caption",), images=(picture(3, 32, 32), picture(4))),
        EmbedInput(videos=(clip(5, 3),)),
        EmbedInput(texts=("a talk",), images=(picture(6),), videos=(clip(7, 1), clip(8, 2))),
        EmbedInput(),
        EmbedInput(texts=("",)),
    ]


def crossed(query_list, document_list, **fields):
    """All pairs of the same objects."""
    return [Pair(q, d, **fields) for q, d in itertools.product(query_list, document_list)]


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory, reranker_folder):
    """The reranker with a head of its own, unlike its embedding."""
    folder = tmp_path_factory.mktemp("untied") / "reranker"
    shutil.copytree(reranker_folder, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.language_model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.roll(3, dims=0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def untie(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    edit_json(folder / "config.json", untie)
    return folder


def exact_engine(folder, **options):
    """An engine in float64, where rounding can hide nothing.

    In float32 this checkpoint's scores of random pictures are 2e-6 away from those in float64,
    whichever way and in whatever company they are computed.
    """
    engine = RerankEngine(folder, **options)
    engine._packed.model.double()
    engine._direction = engine._direction.double()
    return engine


def plain_engine(folder, **options):
    return exact_engine(folder, reuse_vision=False, reuse_prefix=False, **options)


@pytest.fixture(scope="module")
def plain(reranker_folder):
    return plain_engine(reranker_folder)


@pytest.fixture(scope="module")
def exact(reranker_folder):
    return exact_engine(reranker_folder)


def assert_equal(found, expected):
    # The sigmoid is taken in float32.
    np.testing.assert_allclose(found, expected, atol=1.2e-7, rtol=0)


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("layout", ["unnested", "nested"])
def test_equals_one_pair_at_a_time(reranker_folder, untied_folder, head, layout):
    """Text, images and videos on either side, in any order."""
    folder = reranker_folder if head == "tied" else untied_folder
    pairs = crossed(queries(), documents())
    pairs = [pairs[i] for i in np.random.default_rng(3).permutation(len(pairs))]
    plain = plain_engine(folder, token_layout=layout)
    expected = [plain.score_pairs([pair])[0] for pair in pairs]
    engine = exact_engine(folder, token_layout=layout)
    found = engine.score_pairs(pairs)
    assert_equal(found, expected)
    assert len({round(score, 6) for score in expected}) > len(pairs) / 2
    assert engine.counts.prefix_tokens_saved > 0.3 * engine.counts.num_tokens


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_each_reuse_alone(reranker_folder, plain, vision, prefix):
    pairs = crossed(queries()[:3], documents())
    engine = exact_engine(reranker_folder, reuse_vision=vision, reuse_prefix=prefix)
    assert_equal(engine.score_pairs(pairs), plain.score_pairs(pairs))
    counts = engine.counts
    # 8 of the documents' and 2 of the queries' are different objects.
    assert counts.num_pairs == 30
    assert counts.num_visions == 3 * 8 + 2 * 10
    if vision:
        assert counts.num_visions_encoded == 10
    else:
        assert counts.num_visions_encoded == 3 * 8 + 2 * (1 if prefix else 10)
    assert (counts.prefix_tokens_saved > 0) == prefix


def test_the_prefix_ends_at_the_document(exact):
    """All of system, instruction and query is shared, but for what a text may join with."""
    before = exact.counts.prefix_tokens_saved
    query, units = queries()[2], documents()
    exact.score(query, units)
    saved = (exact.counts.prefix_tokens_saved - before) / (len(units) - 1)
    alone = exact.tokenizer.encode_pair(exact.instruction, query, EmbedInput(texts=("",)))
    # The tail has 5 tokens; what stands between the query's clip and the document has fewer.
    assert len(alone.ids) - 5 - 4 <= saved <= len(alone.ids) - 5


def test_other_instructions_share_nothing_they_differ_in(exact, plain):
    query, units = queries()[0], documents()[:3]
    pairs = [
        *crossed([query], units, instruction="Find pages about animals"),
        *crossed([query], units, instruction="Find anything else"),
        *crossed([query], units),
    ]
    found = exact.score_pairs(pairs)
    assert_equal(found, plain.score_pairs(pairs))
    assert abs(found[0] - found[3]) > 1e-6


def test_truncated_pairs_are_computed_plainly(reranker_folder):
    """Their cut may fall into the prefix; the others of the query still share theirs."""
    units = [
        *documents()[:4],
        EmbedInput(texts=("long " * 300,)),
        EmbedInput(texts=("word " * 400,)),
    ]
    pairs = crossed([queries()[2]], units)
    engine = exact_engine(reranker_folder, max_tokens=160)
    plain = plain_engine(reranker_folder, max_tokens=160)
    assert_equal(engine.score_pairs(pairs), plain.score_pairs(pairs))
    tokenizer = engine.tokenizer
    cut = [
        tokenizer.encode_pair(engine.instruction, pair.query, pair.document).truncated
        for pair in pairs
    ]
    assert cut == [False] * 4 + [True] * 2
    long_query = crossed([EmbedInput(texts=("what " * 300,))], units[:3])
    assert_equal(engine.score_pairs(long_query), plain.score_pairs(long_query))


def test_small_passes_and_out_of_memory_change_nothing(reranker_folder, plain):
    pairs = crossed(queries(), documents())
    expected = plain.score_pairs(pairs)
    small = exact_engine(reranker_folder, batch_tokens=150)
    assert_equal(small.score_pairs(pairs), expected)
    longest = max(
        len(plain.tokenizer.encode_pair(plain.instruction, pair.query, pair.document).ids)
        for pair in pairs
    )
    short = exact_engine(reranker_folder, hard_limit_tokens=longest)
    assert_equal(short.score_pairs(pairs), expected)
    assert short.batch_tokens <= longest


def test_a_pair_too_large_alone_fails_alone(reranker_folder, plain):
    big = EmbedInput(texts=("word " * 600,), uri="big.txt")
    pairs = crossed([queries()[1]], [documents()[0], big, documents()[3]])
    scores = exact_engine(reranker_folder, hard_limit_tokens=250).score_pairs(pairs)
    assert isinstance(scores[1], EmbedFailedError)
    assert scores[1].uri == "big.txt"
    assert "the limit is 250" in scores[1].reason
    expected = plain.score_pairs([pairs[0], pairs[2]])
    assert_equal([scores[0], scores[2]], expected)


def test_keys_keep_features_between_calls(reranker_folder, plain):
    units = [documents()[i] for i in (3, 5, 6)]
    engine = exact_engine(reranker_folder)

    def call(query):
        # New objects with equal frames, as another read of the same media gives.
        copies = [
            EmbedInput(
                unit.texts,
                tuple(Vision(v.pixels.copy(), v.seconds) for v in unit.images),
                tuple(Vision(v.pixels.copy(), v.seconds) for v in unit.videos),
            )
            for unit in units
        ]
        pairs = [Pair(query, unit, document_key=i) for i, unit in enumerate(copies)]
        return engine.score_pairs(pairs)

    for query in queries()[:3]:
        assert_equal(call(query), plain.score(query, units))
    # 4 of the documents', once; 1 of the second query and 1 of the third, in one prefix each.
    assert engine.counts.num_visions_encoded == 4 + 2
    assert engine.score(queries()[0], units)
    assert engine.counts.num_visions_encoded == 4 + 2 + 4


def test_features_that_do_not_fit_are_computed_anew(reranker_folder, plain):
    pairs = crossed(queries()[:2], documents())
    expected = plain.score_pairs(pairs)
    for limit in (0, 20_000):
        engine = exact_engine(reranker_folder, vision_cache_bytes=limit, batch_tokens=300)
        assert_equal(engine.score_pairs(pairs), expected)
        assert engine._store.size_bytes == 0
    # Both passes over the documents encode what was not kept.
    assert 9 < engine.counts.num_visions_encoded <= 8 * 2 + 1


def test_float32_and_bfloat16_stay_close(reranker_folder, plain):
    """Rounding moves scores no more than it does on the plain path."""
    pairs = crossed(queries(), documents())
    expected = np.array(plain.score_pairs(pairs))
    for dtype, largest in (("float32", 1e-5), ("bfloat16", 0.5)):
        off = {"reuse_vision": False, "reuse_prefix": False}
        plainly = RerankEngine(reranker_folder, dtype=dtype, **off).score_pairs(pairs)
        found = RerankEngine(reranker_folder, dtype=dtype).score_pairs(pairs)
        errors = [np.abs(np.array(scores) - expected) for scores in (found, plainly)]
        assert errors[0].max() < largest
        assert np.sqrt((errors[0] ** 2).mean()) < 1.5 * np.sqrt((errors[1] ** 2).mean())


def test_one_bad_pair_fails_alone(exact, plain):
    bad = EmbedInput(texts=("\ud800",), uri="bad")
    pairs = crossed(queries()[:2], [documents()[0], bad, documents()[3]])
    scores = exact.score_pairs(pairs)
    assert [isinstance(score, EmbedFailedError) for score in scores] == [False, True, False] * 2
    good = [i for i in range(6) if i % 3 != 1]
    expected = plain.score_pairs([pairs[i] for i in good])
    assert_equal([scores[i] for i in good], expected)


def test_a_reranker_needs_no_endoftext(tmp_path, reranker_folder, exact):
    """It reads its score at the last token of the prompt, whatever that is not followed by."""
    folder = shutil.copytree(reranker_folder, tmp_path / "reranker")
    edit_json(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    query, units = queries()[0], documents()[:2]
    assert_equal(exact_engine(folder).score(query, units), exact.score(query, units))


@pytest.mark.parametrize("what", ["missing", "pickle", "shape"])
def test_wrong_weights_are_refused(tmp_path, reranker_folder, what):
    folder = shutil.copytree(reranker_folder, tmp_path / "reranker")
    path = folder / "model.safetensors"
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    if what == "pickle":
        path.rename(folder / "pytorch_model.bin")
    else:
        weights = load_file(path)
        if what == "missing":
            del weights[name]
        else:
            weights[name] = weights[name][:-1].contiguous()
        save_file(weights, path, metadata={"format": "pt"})
    words = {"missing": "1 missing", "pickle": "only pickle weights", "shape": "1 of another shape"}
    with pytest.raises(ModelError, match=words[what]):
        RerankEngine(folder)


def test_the_kernel_is_logged_once(reranker_folder, caplog):
    with caplog.at_level(logging.INFO, "qvl_batch"):
        engine = exact_engine(reranker_folder, batch_tokens=512)
        engine.score(queries()[0], documents()[:3])
    lines = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert len(lines) == 1
    assert engine.attention_kernel == "SDPA per sequence"
    assert "attention by SDPA per sequence, 512 tokens a pass" in lines[0]
    assert "cpu in float32" in lines[0]


def ids_of(*numbers, spans=()):
    return PromptIds(np.array(numbers, np.int64), tuple(spans), len(numbers))


def test_equal_pads_are_not_equal_frames():
    """Two documents' pads have one id; only the query's frames may be shared."""
    query, document = Span(1, 1, 2), Span(5, 1, 2)
    prompts = [ids_of(1, 9, 9, 2, 3, 9, 9, n, 5, spans=[query, document]) for n in (6, 7)]
    assert shared_prefix(prompts, 1) == 5


def test_the_prefix_leaves_a_token_of_every_prompt():
    assert shared_prefix([ids_of(1, 2, 3), ids_of(1, 2, 3)], 0) == 2
    assert shared_prefix([ids_of(1, 2, 3, 4), ids_of(1, 2)], 0) == 1
    assert shared_prefix([ids_of(1, 2), ids_of(4, 2)], 0) == 0


def test_a_cut_into_the_querys_frames_shares_nothing():
    prompts = [ids_of(1, 9, 9, 9, n, 5, spans=[Span(1, 1, 3)]) for n in (6, 7)]
    assert shared_prefix(prompts, 1) == 4
    prompts = [ids_of(1, 9, n, 9, 4, 5, spans=[Span(1, 1, 3)]) for n in (6, 7)]
    assert shared_prefix(prompts, 1) == 0
