"""Generated vectors with a spectrum like that of Matryoshka embeddings, and tables of them.

Three Gaussian levels of variance 1, 0.5 and 0.25: topics, scenes of a topic (a video's frames, a
book's pages) and items of a scene. There are 32 items a scene in the mean, however many rows there
are; scenes differ in size and items in their distance from the scene (log-normal): a query's
neighbours are its scene's items, and the topic's where that is small. The standard deviation of
dimension i falls as (i + 8)^-0.35, so the first half of the dimensions holds most of the energy.
They rank ways of storing vectors; they do not forecast the recall of real ones.
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
_ITEMS_A_SCENE = 32
_LEVELS = (1.0, 0.5**0.5, 0.5)
_ITEM_SPREAD = 0.2
_CHUNK_ROWS = 20_000
_FILE_ROWS = 250_000


class Source:
    """The unit vectors of one table, and queries of the same hierarchy; the same for a seed.

    Args:
        dim: Dimensions that are drawn.
        count: Rows of the table.
        keep: Dimensions that are kept and renormalised, as Matryoshka embeddings are cut.
    """

    def __init__(self, dim: int, count: int, *, keep: int | None = None, seed: int = 0) -> None:
        self.dim, self.count, self.keep, self._seed = dim, count, keep or dim, seed
        self._spectrum = (np.arange(dim, dtype=np.float32) + 8) ** -0.35
        rng = np.random.default_rng([seed, 0])
        topics = self._gauss(rng, _TOPICS, _LEVELS[0])
        num_scenes = max(1, count // _ITEMS_A_SCENE)
        self._scenes = topics[rng.integers(0, _TOPICS, num_scenes)]
        self._scenes += self._gauss(rng, num_scenes, _LEVELS[1])
        self._ends = np.cumsum(rng.lognormal(size=num_scenes))

    def rows(self) -> Iterator[Vectors]:
        """Yield the table's rows, float32 (at most 20,000, dim) at a time."""
        for start in range(0, self.count, _CHUNK_ROWS):
            rng = np.random.default_rng([self._seed, 1, start])
            yield self._draw(rng, min(_CHUNK_ROWS, self.count - start))

    def queries(self, count: int) -> Vectors:
        """Return unit vectors of the same hierarchy that are no rows."""
        return self._draw(np.random.default_rng([self._seed, 2]), count)

    def _draw(self, rng: np.random.Generator, count: int) -> Vectors:
        vectors = self._scenes[np.searchsorted(self._ends, rng.uniform(0, self._ends[-1], count))]
        spread = rng.lognormal(sigma=_ITEM_SPREAD, size=(count, 1)).astype(np.float32)
        vectors += self._gauss(rng, count, _LEVELS[2]) * spread
        vectors = vectors[:, : self.keep]
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


def write_table(path: Path, source: Source, encodings: tuple[str, ...]) -> lance.LanceDataset:
    """Return the table of a source at ``path``; write it if it is not there."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        chunks = _batches(source, encodings)
        first = next(chunks)
        reader = pa.RecordBatchReader.from_batches(first.schema, _chain(first, chunks))
        lance.write_dataset(reader, str(partial), mode="overwrite", max_rows_per_file=_FILE_ROWS)
        partial.rename(path)
    return lance.dataset(str(path))


def size_bytes(path: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _batches(source: Source, encodings: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    first = 0
    for vectors in source.rows():
        yield from columns_of(first, vectors, encodings).to_batches()
        first += len(vectors)


def _chain(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest
