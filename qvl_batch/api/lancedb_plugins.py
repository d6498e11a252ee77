"""The LanceDB plug-ins with their models: what `qvl_batch.lancedb` gives to plain LanceDB users."""

from __future__ import annotations

import atexit
import functools
import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qvl_batch.errors import ModelError, UnitError
from qvl_batch.recipe import DocumentBudget, ImageBudget, Recipe, VideoBudget
from qvl_batch.storage import Storage
from qvl_batch.tables.lancedb_plugins import EmbeddingPlugin, Int8Rescorer, PairReranker, register
from qvl_batch.units import EmbedInput

if TYPE_CHECKING:
    from qvl_batch.api.embedder import Embedder
    from qvl_batch.api.found_rows import FoundRowReader
    from qvl_batch.model.rerank import RerankEngine

__all__ = ["Int8Rescorer", "QwenEmbedding", "QwenReranker", "use_model"]

_KEPT_QUERIES = 64
_KEPT_MODELS = 2
# Decoded media that wait for a forward pass: bounds memory, does not change scores.
_MOST_WAITING_BYTES = 256 << 20


@dataclass(frozen=True)
class _Place:
    """Where the weights are taken from instead of what a table states."""

    model: str | None = None
    revision: str | None = None
    device: str = "auto"


_place = _Place()


def use_model(
    model: str | Path | None = None, *, revision: str | None = None, device: str = "auto"
) -> None:
    """Say where the embedding model lies on this machine, for all tables of this process.

    Tables state the folder or hub id that their job used. A copy elsewhere must have the same
    weights: a table that states their digest is never asked with others.

    Args:
        model: A local folder, a hub id, or an object-store folder; None: as the tables state.
        revision: A hub commit, tag or branch.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    global _place
    _place = _Place(None if model is None else str(model), revision, device)


@register
class QwenEmbedding(EmbeddingPlugin):
    """The embedding function ``qwen3-vl``; tables of the embed job state it."""

    def embedder(self) -> HeldEmbedder:
        """Return the embedder of these settings, loaded at the first call.

        Raises:
            ModelError: If the checkpoint can not be used, or has other weights than the table's.
        """
        # One model whether or not the vectors are packed afterwards.
        settings = {name: value for name, value in self.settings().items() if name != "binary"}
        return _held(json.dumps(settings, sort_keys=True), _place)


class HeldEmbedder:
    """An embedder that any thread may ask, and that remembers its last text queries.

    A search and the rescoring behind it ask for the same vector.
    """

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._lock = threading.Lock()
        self._of_text = functools.lru_cache(_KEPT_QUERIES)(embedder.embed_query)

    def embed_query(self, query: Any) -> npt.NDArray[np.float32]:
        with self._lock:
            if isinstance(query, str):
                return self._of_text(query).copy()
            return self._embedder.embed_query(query)

    def embed(self, items: Sequence[Any]) -> npt.NDArray[np.float32]:
        with self._lock:
            return self._embedder.embed(items)


@functools.lru_cache(_KEPT_MODELS)
def _held(settings: str, place: _Place) -> HeldEmbedder:
    # Not above: they import torch, which a search by vector does not need.
    from qvl_batch.api.embedder import Embedder
    from qvl_batch.model.load import resolve_model, weights_digest

    arguments = json.loads(settings)
    digest = arguments.pop("digest")
    model, revision = arguments.pop("model"), arguments.pop("revision")
    if place.model is not None:
        model, revision = place.model, place.revision
    try:
        folder = resolve_model(model, revision, Storage.of())
    except ModelError as error:
        raise ModelError(
            error.problem, f"{error.remedy} Or: qvl_batch.lancedb.use_model(<where it lies here>)."
        ) from None
    if digest is not None and weights_digest(folder) != digest:
        raise ModelError(
            f"{model} has other weights than the table's model.",
            "Call qvl_batch.lancedb.use_model with a copy of that one.",
        )
    embedder = Embedder(folder, device=place.device, **arguments)
    # LanceDB knows no end of a function; a query by picture starts a decoding child.
    atexit.register(embedder.close)
    return HeldEmbedder(embedder)


class QwenReranker(PairReranker):
    """LanceDB's reranker of a Qwen3-VL-Reranker checkpoint.

    The media of the rows that a search found are fetched again, the same page or segment, and
    scored with the query. For tens or hundreds of rows in a notebook; the rerank job is for more.
    A row whose medium is gone, changed or broken has no score, comes last, and is warned about.

    Args:
        model: A local folder, a hub id, or an object-store folder.
        revision: A hub commit, tag or branch.
        instruction: What counts as relevant; None: the official default.
        image: Pixels of an image; None: as the table's recipe has it.
        video: Frames of a video and their pixels; None: likewise.
        document: Resolution and pixels of a page; None: likewise.
        max_tokens: The context of one pair.
        token_layout: ``unnested`` or ``nested``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_tokens: Tokens of one packed forward pass.
        storage: How object stores are reached; None: from the standard environment variables.
        return_score: ``relevance``, or ``all`` to keep ``_distance`` and ``_score`` too.

    The weights are loaded at the first search.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        instruction: str | None = None,
        image: ImageBudget | Mapping[str, Any] | None = None,
        video: VideoBudget | Mapping[str, Any] | None = None,
        document: DocumentBudget | Mapping[str, Any] | None = None,
        max_tokens: int = 10_240,
        token_layout: str = "unnested",
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        storage: Storage | None = None,
        return_score: str = "relevance",
    ) -> None:
        from qvl_batch.api.reader import budget_of

        super().__init__(return_score)
        # Before the weights are loaded: a wrong budget is told at once.
        given = (
            ("image", ImageBudget, image),
            ("video", VideoBudget, video),
            ("document", DocumentBudget, document),
        )
        self._budgets = {
            name: budget_of(kind, value, name) for name, kind, value in given if value is not None
        }
        self._model, self._revision = str(model), revision
        self._storage = storage or Storage.of()
        self._engine_arguments = {
            "instruction": instruction,
            "max_tokens": max_tokens,
            "token_layout": token_layout,
            "dtype": dtype,
            "device": device,
            "batch_tokens": batch_tokens,
        }
        self._lock = threading.Lock()

    @functools.cached_property
    def _engine(self) -> RerankEngine:
        from qvl_batch.model.load import resolve_model
        from qvl_batch.model.rerank import RerankEngine

        folder = resolve_model(self._model, self._revision, self._storage)
        return RerankEngine(folder, **self._engine_arguments)

    @functools.cached_property
    def _reader(self) -> FoundRowReader:
        from qvl_batch.api.found_rows import FoundRowReader

        return FoundRowReader(self._storage)

    def pair_scores(
        self, query: str, rows: list[dict[str, Any]], metadata: Mapping[bytes, bytes]
    ) -> list[float | UnitError]:
        """Return one score, or why there is none, a row.

        Raises:
            ModelError: If the checkpoint can not be used.
            UnitError: If the query itself can not be scored.
        """
        budgets = self._budgets_for(metadata)
        asked = EmbedInput(texts=(query,))
        found: dict[int, float | UnitError] = {}
        with self._lock:
            waiting: dict[int, EmbedInput] = {}
            num_bytes = 0
            for index, row in enumerate(rows):
                try:
                    waiting[index] = self._reader.read(row, **budgets)
                except UnitError as error:
                    found[index] = error
                    continue
                num_bytes += _pixel_bytes(waiting[index])
                if num_bytes >= _MOST_WAITING_BYTES:
                    found |= self._scored(asked, waiting)
                    waiting, num_bytes = {}, 0
            found |= self._scored(asked, waiting)
        return [found[index] for index in range(len(rows))]

    def failed(self, errors: list[UnitError]) -> None:
        warnings.warn(
            f"{len(errors)} row(s) have no score and come last; the first: "
            f"{type(errors[0]).__name__}: {errors[0]}",
            stacklevel=2,
        )

    def _scored(
        self, asked: EmbedInput, waiting: Mapping[int, EmbedInput]
    ) -> dict[int, float | UnitError]:
        scores = self._engine.score(asked, list(waiting.values()))
        return dict(zip(waiting, scores, strict=True))

    def _budgets_for(self, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
        stated = metadata.get(b"qvl.recipe")
        if stated is None:
            defaults = {
                "image": ImageBudget(),
                "video": VideoBudget(),
                "document": DocumentBudget(),
            }
        else:
            recipe = Recipe.from_json(stated.decode())
            defaults = {name: getattr(recipe, name) for name in ("image", "video", "document")}
        return defaults | self._budgets

    def close(self) -> None:
        """End the decoding child. The reranker may be used again; it then starts another."""
        if "_reader" in vars(self):
            self._reader.close()


def _pixel_bytes(item: EmbedInput) -> int:
    return sum(vision.pixels.nbytes for vision in (*item.videos, *item.images))
