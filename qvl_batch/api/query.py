"""What a query is: a text, a medium or a mix of both, a vector, or a row that is there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qvl_batch.api.inputs import Item, Medium, parse_item
from qvl_batch.errors import InputError
from qvl_batch.recipe import Recipe

# What a row must say for its medium to be fetched and shown to a model again.
MEDIUM_COLUMNS = (
    *("row_id", "uri", "kind", "page", "text"),
    *("etag", "byte_offset", "byte_length", "segment"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row as a query: "more like this".

    Args:
        row_id: As a search returned it.
        table: The row's table, as a search returned it; None: all tables are looked through.
    """

    row_id: str
    table: str | None = None


def parse_query(query: object, dim: int, collection: str) -> Row | Item | npt.NDArray[np.float32]:
    """Return a row, an item, or a vector of norm 1, float32 ``(dim,)``.

    Args:
        query: `Row`; a vector (1-D array, or a list or tuple of numbers) of any norm; or any item
            of `qvl_batch.api.inputs`: a ``str`` is a text, a ``pathlib.Path`` a file.
        dim: Dimensions of the collection's vectors.
        collection: Its name, for messages.

    Raises:
        InputError: If it is nothing of that, or a vector that can not be compared.
    """
    if isinstance(query, Row):
        return query
    if isinstance(query, np.ndarray) and query.ndim < 3:
        return _unit_vector(query, dim, collection)
    if isinstance(query, list | tuple):
        return _unit_vector(_numbers(query), dim, collection)
    try:
        return parse_item(query)
    except InputError as error:
        remedy = f"{error.remedy} A vector is a 1-D array of {dim} numbers, a row is a Row(row_id)."
        raise InputError(f"query: {error.problem}", remedy) from None


def row_item(row: Mapping[str, Any], recipe: Recipe) -> Item:
    """Return what a model was shown for a row: its medium, to be fetched again, and its text.

    Args:
        row: At least `MEDIUM_COLUMNS`. A text's row holds all there is.
        recipe: Of the row's table: it says how long a video's segments are.
    """
    texts = () if row["text"] is None else (row["text"],)
    if row["kind"] == "text":
        return Item(texts=texts)
    medium = Medium(
        row["kind"],
        row["uri"],
        row["uri"],
        page=row["page"],
        etag=row["etag"],
        byte_offset=row["byte_offset"],
        byte_length=row["byte_length"],
        segment=row["segment"],
        segment_s=recipe.segmentation.video_s,
    )
    return Item(texts=texts, media=(medium,))


def _numbers(values: list[Any] | tuple[Any, ...]) -> npt.NDArray[np.generic]:
    try:
        return np.asarray(values)
    except ValueError:
        # Lists of different lengths.
        return np.empty((0, 0))


def _unit_vector(
    values: npt.NDArray[np.generic], dim: int, collection: str
) -> npt.NDArray[np.float32]:
    remedy = f"Give a 1-D array of {dim} finite numbers, made by the collection's model."
    if values.dtype.kind not in "fiu" or values.ndim != 1:
        raise InputError(
            f"The query is an array of {values.dtype} {values.shape}, which is no vector.", remedy
        )
    if len(values) != dim:
        raise InputError(
            f"The query vector has {len(values)} dimensions, collection {collection} has {dim}.",
            remedy,
        )
    vector = values.astype(np.float64)
    bad = int((~np.isfinite(vector)).sum())
    if bad:
        raise InputError(f"{bad} of {dim} values of the query vector are NaN or Inf.", remedy)
    largest = np.abs(vector).max()
    if largest == 0:
        raise InputError("The query vector is 0 everywhere: it has no direction.", remedy)
    # First by the largest value: squares of very large or small numbers are none.
    vector /= largest
    return (vector / np.linalg.norm(vector)).astype(np.float32)
