"""The shipped checkpoint: all files there, unchanged, and fit for the demo's recipe."""

import hashlib
import json

import pytest

from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir, reranker_dir
from qvl_batch.recipe import DocumentBudget, ImageBudget, Recipe, VideoBudget

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# sha256 of all bytes, in the order of FILES.
DIGESTS = {
    "embedding": "5faa06dac2c158f1c19b3981327b8511be0a2a83ef2066d05b00019a2a7769ce",
    "reranker": "6d28f04f66be39e76097082df7104e5072d6421dfb9c14d4e8d88dfc2fb4fbaf",
}
FOLDERS = {"embedding": embedding_dir(), "reranker": reranker_dir()}


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_those_that_were_measured(name):
    folder = FOLDERS[name]
    assert tuple(sorted(path.name for path in folder.iterdir())) == FILES
    digest = hashlib.sha256()
    for file in FILES:
        digest.update((folder / file).read_bytes())
    assert digest.hexdigest() == DIGESTS[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_architecture_is_that_of_the_real_models(name):
    config = json.loads((FOLDERS[name] / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert config["text_config"]["hidden_size"] == DEMO_RECIPE["dim"]
    assert config["text_config"]["max_position_embeddings"] == DEMO_RECIPE["max_tokens"]


def test_only_the_embedding_tokenizer_appends_endoftext():
    appended = {}
    for name, folder in FOLDERS.items():
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        end = tokenizer["post_processor"]["single"][-1]
        appended[name] = end.get("SpecialToken", {}).get("id")
    # The embedding is read at that token; the reranker's score at the end of the prompt itself.
    assert appended == {"embedding": "<|endoftext|>", "reranker": None}


def test_the_recipe_is_accepted_and_brings_squares_to_64_px():
    recipe = Recipe(
        model_digest="0",
        dim=DEMO_RECIPE["dim"],
        encodings=tuple(DEMO_RECIPE["encodings"]),
        max_tokens=DEMO_RECIPE["max_tokens"],
        image=ImageBudget(**DEMO_RECIPE["image"]),
        video=VideoBudget(**DEMO_RECIPE["video"]),
        document=DocumentBudget(**DEMO_RECIPE["document"]),
    )
    budgets = (recipe.image, recipe.video, recipe.document)
    assert {(b.min_px, b.max_px) for b in budgets} == {(64 * 64, 64 * 64)}
