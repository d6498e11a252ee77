"""What a table states so that plain LanceDB can embed a query for it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from qvl_batch.errors import ConfigError
from qvl_batch.recipe import Recipe

METADATA_KEY = "embedding_functions"
FUNCTION_NAME = "qwen3-vl"
# LanceDB replaces such a value by a variable of the session that reads the table.
_VARIABLE = "$var:"


def embedding_functions(recipe: Recipe, stated: Mapping[str, str]) -> dict[str, str]:
    """Return the schema metadata that binds a table's vectors to their embedding function.

    Everything that shapes a query's vector is stated: a later default must not change what an
    old table answers. There are no secrets in it; the model is named as the job named it.

    Args:
        recipe: Of the table.
        stated: What the table states of its model: ``qvl.model``, ``qvl.revision``, ``qvl.dtype``
            and ``qvl.query_instruction``.

    Returns:
        One entry, `METADATA_KEY`, or none: a model that states no path can not be loaded again,
        and LanceDB can search neither int8 vectors nor any column that is not there.

    Raises:
        ConfigError: If LanceDB would take an instruction or the path for a variable.
    """
    if {"float32", "float16"} & set(recipe.encodings):
        column = "vector"
    elif "binary" in recipe.encodings:
        column = "vector_bits"
    else:
        return {}
    if "qvl.model" not in stated:
        return {}
    values = recipe.to_dict()
    arguments = {
        "model": stated["qvl.model"],
        "revision": stated["qvl.revision"] or None,
        "digest": recipe.model_digest,
        "dim": recipe.dim,
        "binary": column == "vector_bits",
        "instruction": recipe.instruction,
        "query_instruction": stated["qvl.query_instruction"],
        "max_tokens": recipe.max_tokens,
        "token_layout": recipe.token_layout,
        "dtype": stated["qvl.dtype"],
        **{name: values[name] for name in ("image", "video", "document")},
    }
    for name, value in arguments.items():
        if isinstance(value, str) and value.startswith(_VARIABLE):
            raise ConfigError(
                f"{name} is {value!r}: LanceDB would read a variable.",
                f"Let it begin with something else than {_VARIABLE}.",
            )
    function = {
        "name": FUNCTION_NAME,
        "source_column": "text",
        "vector_column": column,
        "model": arguments,
    }
    return {METADATA_KEY: json.dumps([function], ensure_ascii=False)}
