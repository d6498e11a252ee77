"""Generated vectors with a spectrum like that of Matryoshka embeddings, and tables of them.

Three Gaussian levels (topic, subtopic, item) of variance 1, 0.5 and 0.25; the standard deviation of
dimension i falls as (i + 8)^-0.35, so half of the dimensions hold most of the energy. They rank
ways of storing vectors; they do not forecast the recall of real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from qvl_batch.model.encode import encode
from qvl_batch.recipe import Recipe
from qvl_batch.schema import vector_fields

Vectors = npt.NDArray[np.float32]

_TOPICS = 256
_SUBTOPICS = 64
_LEVELS = (1.0, 0.5**0.5, 0.5)
_CHUNK_ROWS = 20_000
_FILE_ROWS = 250_000


class Source:
    """An endless supply of unit vectors of one hierarchy, the same for the same seed."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        self.dim = dim
        self._spectrum = (np.arange(dim, dtype=np.float32) + 8) ** -0.35
        rng = np.random.default_rng([seed, 0])
        topics = self._gauss(rng, _TOPICS, _LEVELS[0])
        self._centres = np.repeat(topics, _SUBTOPICS, axis=0)
        self._centres += self._gauss(rng, len(self._centres), _LEVELS[1])
        self._seed = seed

    def rows(self, count: int) -> Iterator[Vectors]:
        """Yield float32 (≤ 20,000, dim) unit vectors; the first n are the same for any count."""
        for chunk in range(-(-count // _CHUNK_ROWS)):
            rng = np.random.default_rng([self._seed, 1, chunk])
            yield self._draw(rng, _CHUNK_ROWS)[: count - chunk * _CHUNK_ROWS]

    def queries(self, count: int) -> Vectors:
        """Return unit vectors of the same hierarchy that are no rows."""
        return self._draw(np.random.default_rng([self._seed, 2]), count)

    def _draw(self, rng: np.random.Generator, count: int) -> Vectors:
        vectors = self._centres[rng.integers(0, len(self._centres), count)]
        vectors += self._gauss(rng, count, _LEVELS[2])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _gauss(self, rng: np.random.Generator, count: int, level: float) -> Vectors:
        return rng.standard_normal((count, self.dim), np.float32) * (self._spectrum * level)


def columns_of(first: int, vectors: Vectors, encodings: tuple[str, ...]) -> pa.Table:
    """Return rows as they stand in a partition table, with few of its columns."""
    count, dim = vectors.shape
    numbers = range(first, first + count)
    found = encode(torch.from_numpy(vectors), dim, encodings)
    fields = vector_fields(Recipe(model_digest="0" * 32, dim=dim, encodings=encodings))
    made = {
        "row_id": pa.array([f"{number:032x}:0" for number in numbers]),
        "uri": pa.array([f"s3://bucket/{number}.jpg" for number in numbers]),
        "kind": pa.array(["image"] * count),
        "page": pa.nulls(count, pa.int32()),
        "start_s": pa.nulls(count, pa.float64()),
        "end_s": pa.nulls(count, pa.float64()),
        "text": pa.nulls(count, pa.string()),
    }
    for field in fields:
        flat = pa.array(found[field.name].reshape(-1))
        wide = pa.types.is_fixed_size_list(field.type)
        made[field.name] = (
            pa.FixedSizeListArray.from_arrays(flat, type=field.type) if wide else flat
        )
    return pa.table(made)


def write_table(
    path: Path, source: Source, count: int, encodings: tuple[str, ...]
) -> lance.LanceDataset:
    """Return the table of the first ``count`` rows at ``path``; write it if it is not there."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        chunks = _batches(source, count, encodings)
        first = next(chunks)
        reader = pa.RecordBatchReader.from_batches(first.schema, _chain(first, chunks))
        lance.write_dataset(reader, str(partial), mode="overwrite", max_rows_per_file=_FILE_ROWS)
        partial.rename(path)
    return lance.dataset(str(path))


def size_bytes(path: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _batches(source: Source, count: int, encodings: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    first = 0
    for vectors in source.rows(count):
        yield from columns_of(first, vectors, encodings).to_batches()
        first += len(vectors)


def _chain(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest
