"""The models that queries of a root need: loaded when first asked for, then kept."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from qvl_batch.config import DEFAULT_QUERY_INSTRUCTION
from qvl_batch.errors import ModelError, RecipeMismatchError
from qvl_batch.recipe import PREPROCESSING_VERSION, Recipe
from qvl_batch.storage import Storage

if TYPE_CHECKING:
    from qvl_batch.api.embedder import Embedder
    from qvl_batch.api.reranker import Reranker

# Enough of a digest to tell two models apart in a message.
_SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a collection's tables say of how their vectors were made.

    ``model`` is the path or id that the run was given, on the machine where it ran; None if the
    tables name none.
    """

    collection: str
    recipe: Recipe
    model: str | None = None
    revision: str | None = None
    query_instruction: str = DEFAULT_QUERY_INSTRUCTION

    @classmethod
    def of(cls, collection: str, table: str, schema: pa.Schema) -> Stated:
        """Return what the schema of one of its tables says.

        Raises:
            RecipeMismatchError: If it states no recipe.
        """
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if "qvl.recipe" not in metadata:
            raise RecipeMismatchError(
                f"Table {table} of collection {collection} states no recipe.",
                "Only tables of `qvl-batch embed` can be queried.",
            )
        return cls(
            collection=collection,
            recipe=Recipe.from_json(metadata["qvl.recipe"]),
            model=metadata.get("qvl.model") or None,
            revision=metadata.get("qvl.revision") or None,
            query_instruction=metadata.get("qvl.query_instruction") or DEFAULT_QUERY_INSTRUCTION,
        )


class QueryModels:
    """Embedders and rerankers, one of each kind; safe for several threads to ask.

    Args:
        storage: How object stores are reached: checkpoints and media may lie there.
        model: A checkpoint in place of the one that the tables state.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(self, storage: Storage, model: str | Path | None, device: str) -> None:
        self._storage, self._model, self._device = storage, model, device
        # A model is not for several threads at once, nor may two threads load the same one.
        self.lock = threading.RLock()
        self._embedders: dict[Stated, Embedder] = {}
        self._rerankers: dict[tuple[str, str], Reranker] = {}

    def embedder(self, stated: Stated) -> Embedder:
        """Return the embedder whose vectors can be compared with the collection's.

        Raises:
            RecipeMismatchError: If the checkpoint, or this version of the package, is not the one
                that made the collection.
            ModelError: If the checkpoint can not be loaded.
        """
        with self.lock:
            if stated not in self._embedders:
                self._embedders[stated] = self._load(stated)
            return self._embedders[stated]

    def reranker(self, model: str | Path, recipe: Recipe) -> Reranker:
        """Return a reranker that sees media as the recipe shows them to its model.

        Raises:
            ModelError: If the checkpoint can not be loaded.
        """
        from qvl_batch.api.reranker import Reranker

        with self.lock:
            key = (str(model), recipe.recipe_id)
            if key not in self._rerankers:
                self._rerankers[key] = Reranker(
                    model,
                    image=recipe.image,
                    video=recipe.video,
                    document=recipe.document,
                    token_layout=recipe.token_layout,
                    device=self._device,
                    storage=self._storage,
                )
            return self._rerankers[key]

    def close(self) -> None:
        """End the decoding children and let go of the models; they are loaded again if needed."""
        with self.lock:
            for model in (*self._embedders.values(), *self._rerankers.values()):
                model.close()
            self._embedders.clear()
            self._rerankers.clear()

    def _load(self, stated: Stated) -> Embedder:
        from qvl_batch.api.embedder import Embedder
        from qvl_batch.model.load import weights_digest

        recipe = stated.recipe
        if recipe.preprocessing_version != PREPROCESSING_VERSION:
            raise RecipeMismatchError(
                f"Collection {stated.collection} has preprocessing_version "
                f"{recipe.preprocessing_version}, this qvl-batch has {PREPROCESSING_VERSION}.",
                "Query it with the version that made it, or by vector or row.",
            )
        folder, named = self._folder(stated)
        digest = weights_digest(folder)
        if digest != recipe.model_digest:
            raise RecipeMismatchError(
                f"The model {named} has the digest {digest[:_SHOWN_DIGITS]}…, collection "
                f"{stated.collection} was made by {stated.model or 'a model'} with the digest "
                f"{recipe.model_digest[:_SHOWN_DIGITS]}…: their vectors can not be compared.",
                "Give connect(..., model=...) the checkpoint that made the collection.",
            )
        return Embedder(
            folder,
            dim=recipe.dim,
            instruction=recipe.instruction,
            query_instruction=stated.query_instruction,
            image=recipe.image,
            video=recipe.video,
            document=recipe.document,
            max_tokens=recipe.max_tokens,
            token_layout=recipe.token_layout,
            device=self._device,
            storage=self._storage,
        )

    def _folder(self, stated: Stated) -> tuple[Path, str]:
        """Return the checkpoint's folder on this machine, and what it is called."""
        from qvl_batch.model.load import resolve_model

        if self._model is not None:
            return resolve_model(str(self._model), None, self._storage), str(self._model)
        if stated.model is None:
            raise ModelError(
                f"Collection {stated.collection} names no model.", "Give connect(..., model=...)."
            )
        try:
            return resolve_model(stated.model, stated.revision, self._storage), stated.model
        except ModelError as error:
            raise ModelError(
                f"Collection {stated.collection} was made by the model {stated.model}, which can "
                f"not be loaded here: {error.problem}",
                "Give connect(..., model=...) the place of the same checkpoint.",
            ) from None
