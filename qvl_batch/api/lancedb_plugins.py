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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qvl_batch.errors import InputError, ModelError, UnitError
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage
from qvl_batch.tables.lancedb_plugins import EmbeddingPlugin, Int8Rescorer, PairReranker, register

if TYPE_CHECKING:
    from qvl_batch.api.embedder import Embedder
    from qvl_batch.api.reranker import Reranker

__all__ = ["Int8Rescorer", "QwenEmbedding", "QwenReranker", "use_model"]

_KEPT_QUERIES = 64
_KEPT_MODELS = 2


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
    """LanceDB's reranker of a Qwen3-VL-Reranker checkpoint, for tables of the embed job.

    The media of the rows that a search found are fetched again, the same page or segment, and
    scored with the query. For tens or hundreds of rows in a notebook; the rerank job is for more.
    A row whose medium is gone, changed or broken has no score, comes last, and is warned about.

    Args:
        reranker: A `Reranker`, used as it is; or a local folder, a hub id, or an object-store
            folder. That is loaded at the first search and shown media as the table's recipe has
            them, where ``options`` say nothing else.
        instruction: What counts as relevant; None: that of the reranker.
        return_score: ``relevance``, or ``all`` to keep ``_distance`` and ``_score`` too.
        options: Of the `Reranker` to load: ``revision``, ``device``, ``image``, ...

    Raises:
        InputError: If there are options for a reranker that is there already.
    """

    def __init__(
        self,
        reranker: Reranker | str | Path,
        *,
        instruction: str | None = None,
        return_score: str = "relevance",
        **options: Any,
    ) -> None:
        super().__init__(return_score)
        self._is_ours = isinstance(reranker, str | Path)
        if options and not self._is_ours:
            raise InputError(
                f"{', '.join(options)}: a Reranker has its options.", "Give it to Reranker(...)."
            )
        self._given, self._options, self._instruction = reranker, options, instruction
        self._lock = threading.Lock()
        self._loaded: dict[str, Reranker] = {}

    def pair_scores(
        self, query: str, rows: list[dict[str, Any]], metadata: Mapping[bytes, bytes]
    ) -> list[float | UnitError]:
        """Return one score, or why there is none, a row.

        Raises:
            InputError: If the table states no recipe.
            ModelError: If the checkpoint can not be used.
            UnitError: If the query itself can not be scored.
        """
        from qvl_batch.api.query import row_item

        if b"qvl.recipe" not in metadata:
            raise InputError("The table states no recipe.", "Rerank rows of the embed job.")
        recipe = Recipe.from_json(metadata[b"qvl.recipe"].decode())
        items = [row_item(row, recipe) for row in rows]
        with self._lock:
            reranker = self._reranker(recipe)
            scores, failures = reranker.score(query, items, self._instruction, errors="return")
        return [failures.get(index, float(score)) for index, score in enumerate(scores)]

    def failed(self, errors: list[UnitError]) -> None:
        warnings.warn(
            f"{len(errors)} row(s) have no score and come last; the first: "
            f"{type(errors[0]).__name__}: {errors[0]}",
            stacklevel=2,
        )

    def close(self) -> None:
        """Let go of what was loaded here; it is loaded again if needed."""
        with self._lock:
            for reranker in self._loaded.values():
                reranker.close()
            self._loaded.clear()

    def _reranker(self, recipe: Recipe) -> Reranker:
        from qvl_batch.api.reranker import Reranker

        if not self._is_ours:
            return self._given
        if recipe.recipe_id not in self._loaded:
            shown = {name: getattr(recipe, name) for name in ("image", "video", "document")}
            shown["token_layout"] = recipe.token_layout
            self._loaded[recipe.recipe_id] = Reranker(self._given, **shown | self._options)
        return self._loaded[recipe.recipe_id]
