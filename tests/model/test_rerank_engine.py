"""Scores against the stored ones, the plain formula, and themselves in any packing."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from qvl_batch.errors import EmbedFailedError
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.units import EmbedInput
from tests.model.model_inputs import clip, edit_json, picture

QUERY = EmbedInput(texts=("two red circles",))


def documents():
    return [
        EmbedInput(texts=("a page that says tiger",)),
        EmbedInput(images=(picture(1),)),
        EmbedInput(texts=("caption",), images=(picture(2, 32, 32), picture(3))),
        EmbedInput(videos=(clip(4, 2),)),
        EmbedInput(),
        EmbedInput(texts=("",)),
    ]


@pytest.mark.parametrize("name", ["rr_text", "rr_instr"])
def test_equals_the_official_scores(reranker, golden, name):
    case = json.loads((golden / "golden.json").read_text())["cases"][name]
    fed = case["input"]
    query = EmbedInput(texts=(fed["query"]["text"],))
    units = [EmbedInput(texts=(document["text"],)) for document in fed["documents"]]
    scores = reranker.score(query, units, instruction=fed.get("instruction"))
    np.testing.assert_allclose(scores, case["scores"], atol=1e-6)


def test_equals_yes_and_no_logits_of_the_whole_head(reranker, reranker_folder):
    """Text pairs through plain transformers with its full head: sigmoid of the difference."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(reranker_folder, dtype=torch.float32)
    yes, no = (reranker.tokenizer.vocabulary_id(word) for word in ("yes", "no"))
    texts = [unit for unit in documents() if not (unit.images or unit.videos)]
    for unit, score in zip(texts, reranker.score(QUERY, texts), strict=True):
        ids = reranker.tokenizer.encode_pair(reranker.instruction, QUERY, unit).ids
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
        assert score == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-6)


def test_scores_do_not_depend_on_neighbours(reranker, reranker_folder):
    units = documents()
    whole = reranker.score(QUERY, units)
    alone = [reranker.score(QUERY, [unit])[0] for unit in units]
    np.testing.assert_allclose(whole, alone, atol=1e-6)
    small = RerankEngine(reranker_folder, batch_tokens=150)
    np.testing.assert_allclose(small.score(QUERY, units[::-1]), whole[::-1], atol=1e-6)
    assert len({round(score, 6) for score in whole}) == len(units)


def test_query_and_document_may_both_be_pictures(reranker):
    query = EmbedInput(images=(picture(7),), videos=(clip(8, 1),))
    same, other = reranker.score(query, [documents()[2], documents()[3]])
    assert 0 < same < 1
    assert 0 < other < 1
    swapped = reranker.score(documents()[2], [query])[0]
    assert abs(swapped - same) > 1e-6


def test_one_bad_document_fails_alone(reranker):
    bad = EmbedInput(texts=("\ud800",), uri="bad")
    units = [*documents()[:2], bad, documents()[4]]
    scores = reranker.score(QUERY, units)
    assert isinstance(scores[2], EmbedFailedError)
    expected = reranker.score(QUERY, [unit for unit in units if unit is not bad])
    np.testing.assert_allclose([s for s in scores if isinstance(s, float)], expected, atol=1e-6)


def test_no_documents(reranker):
    assert reranker.score(QUERY, []) == []


def test_untied_head(tmp_path, reranker_folder, reranker):
    """With a head of twice the embedding, the log-odds are twice those of the tied one."""
    folder = tmp_path / "untied"
    folder.mkdir()
    for path in reranker_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = 2 * weights["model.language_model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def untie(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    edit_json(folder / "config.json", untie)
    tied = np.array(reranker.score(QUERY, documents()))
    untied = np.array(RerankEngine(folder).score(QUERY, documents()))
    np.testing.assert_allclose(
        np.log(untied / (1 - untied)), 2 * np.log(tied / (1 - tied)), rtol=1e-4
    )
