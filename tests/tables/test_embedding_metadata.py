"""What tables state of their embedding function."""

from __future__ import annotations

import json

import pytest

from qvl_batch.errors import ConfigError
from qvl_batch.recipe import ImageBudget, Recipe
from qvl_batch.tables.embedding_metadata import embedding_functions

STATED = {
    "qvl.model": "Qwen/Qwen3-VL-Embedding-2B",
    "qvl.revision": "abc",
    "qvl.dtype": "auto",
    "qvl.query_instruction": "Find it.",
    "qvl.versions": "{}",
}


def recipe(*encodings: str) -> Recipe:
    return Recipe(
        model_digest="d1",
        dim=64,
        encodings=encodings,
        image=ImageBudget(max_px=8192),
        max_tokens=99,
    )


@pytest.mark.parametrize(
    ("encodings", "column", "binary"),
    [
        (("binary", "int8"), "vector_bits", True),
        (("float16",), "vector", False),
        (("float32", "binary"), "vector", False),
        (("binary",), "vector_bits", True),
    ],
)
def test_the_column_that_lancedb_can_search_is_bound(encodings, column, binary) -> None:
    (function,) = json.loads(embedding_functions(recipe(*encodings), STATED)["embedding_functions"])
    assert function["name"] == "qwen3-vl"
    assert (function["vector_column"], function["source_column"]) == (column, "text")
    assert function["model"]["binary"] is binary


def test_every_argument_is_stated_and_nothing_else() -> None:
    (function,) = json.loads(embedding_functions(recipe("binary"), STATED)["embedding_functions"])
    assert function["model"] == {
        "model": "Qwen/Qwen3-VL-Embedding-2B",
        "revision": "abc",
        "digest": "d1",
        "dim": 64,
        "binary": True,
        "instruction": "Represent the user's input.",
        "query_instruction": "Find it.",
        "max_tokens": 99,
        "token_layout": "unnested",
        "dtype": "auto",
        "image": {"min_px": 4096, "max_px": 8192},
        "video": {
            "fps": 1.0,
            "max_frames": 64,
            "min_px": 131_072,
            "max_px": 786_432,
            "total_px": 117_964_800,
        },
        "document": {"dpi": 144, "max_pages": 100, "min_px": 4096, "max_px": 1_843_200},
    }
    assert (
        json.loads(
            embedding_functions(recipe("binary"), STATED | {"qvl.revision": ""})[
                "embedding_functions"
            ]
        )[0]["model"]["revision"]
        is None
    )


def test_what_can_not_be_searched_states_nothing() -> None:
    assert embedding_functions(recipe("int8"), STATED) == {}
    assert embedding_functions(recipe("binary"), {"qvl.versions": "{}"}) == {}


@pytest.mark.parametrize("name", ["qvl.model", "qvl.query_instruction"])
def test_a_value_that_lancedb_would_replace_is_refused(name) -> None:
    with pytest.raises(ConfigError, match=r"\$var:secret"):
        embedding_functions(recipe("binary"), STATED | {name: "$var:secret"})
