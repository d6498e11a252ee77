"""`Embedder`: vectors in a notebook, without Ray, equal to those of the embed job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from qvl_batch.api.reader import (
    FrameListWay,
    ItemReader,
    batches,
    budget_of,
    check_frame_list,
    named,
    parse_items,
)
from qvl_batch.config import DEFAULT_QUERY_INSTRUCTION
from qvl_batch.errors import InputError, UnitError
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.load import resolve_model
from qvl_batch.recipe import DEFAULT_INSTRUCTION, DocumentBudget, ImageBudget, VideoBudget
from qvl_batch.storage import Storage


class Embedder:
    """Embeds texts, images, videos and any mix of them.

    The forms of an item are those of `qvl_batch.api.inputs`: a plain ``str`` is a text, a path is
    given as ``pathlib.Path`` or as ``{"image": ...}`` or ``{"video": ...}``. Not for use by several
    threads at once.

    Args:
        model: A local folder, a hub id, or an object-store folder.
        revision: A hub commit, tag or branch.
        dim: Dimensions to keep (Matryoshka); None: all.
        instruction: The system turn of items without an own one; None: the model's default.
        query_instruction: That of `embed_query`.
        image: Pixels of an image; an `ImageBudget` or its fields in a mapping.
        video: Frames of a video and their pixels.
        document: Resolution and pixels of a document's page.
        max_tokens: The context.
        token_layout: ``unnested`` or ``nested``.
        frame_list: ``sampled`` or ``official``; see `ItemReader`.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16``,
            ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_tokens: Tokens of one packed forward pass.
        storage: How object stores are reached; None: from the standard environment variables.
        decode_limits: Time and memory of decoding one medium.

    Raises:
        ModelError: If the checkpoint can not be used.
        ConfigError: If a budget is not allowed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dim: int | None = None,
        instruction: str | None = None,
        query_instruction: str = DEFAULT_QUERY_INSTRUCTION,
        image: ImageBudget | Mapping[str, Any] = ImageBudget(),
        video: VideoBudget | Mapping[str, Any] = VideoBudget(),
        document: DocumentBudget | Mapping[str, Any] = DocumentBudget(),
        max_tokens: int = 8192,
        token_layout: str = "unnested",
        frame_list: FrameListWay = "sampled",
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        storage: Storage | None = None,
        decode_limits: DecodeLimits | None = None,
    ) -> None:
        storage = storage or Storage.of()
        # Before the weights are loaded: a wrong budget is told at once.
        budgets = {
            "image": budget_of(ImageBudget, image, "image"),
            "video": budget_of(VideoBudget, video, "video"),
            "document": budget_of(DocumentBudget, document, "document"),
        }
        check_frame_list(frame_list)
        self._engine = EmbedEngine(
            resolve_model(str(model), revision, storage),
            dim=dim,
            instruction=instruction or DEFAULT_INSTRUCTION,
            max_tokens=max_tokens,
            token_layout=token_layout,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
        )
        self.query_instruction = query_instruction
        self._reader = ItemReader(
            self._engine.tokenizer,
            storage=storage,
            **budgets,
            frame_list=frame_list,
            limits=decode_limits,
        )

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self._engine.dim

    @overload
    def embed(
        self, items: Iterable[object], *, errors: Literal["raise"] = "raise"
    ) -> npt.NDArray[np.float32]: ...

    @overload
    def embed(
        self, items: Iterable[object], *, errors: Literal["return"]
    ) -> tuple[npt.NDArray[np.float32], dict[int, UnitError]]: ...

    def embed(
        self, items: Iterable[object], *, errors: Literal["raise", "return"] = "raise"
    ) -> npt.NDArray[np.float32] | tuple[npt.NDArray[np.float32], dict[int, UnitError]]:
        """Return one vector per item, of norm 1, as float32 of shape ``(items, dim)``.

        Args:
            items: Texts, paths, pictures, mappings; see `qvl_batch.api.inputs`.
            errors: ``raise``: the first item that fails raises its error. ``return``: also return
                the errors by index; their rows are NaN.

        Raises:
            InputError: If an item is of no known form, whatever ``errors`` says; before any work.
            UnitError: Naming the item's index and the reason, with ``errors="raise"``.
        """
        if errors not in ("raise", "return"):
            raise InputError(f"errors is {errors!r}.", "Give 'raise' or 'return'.")
        parsed = parse_items(items, "item")
        vectors = np.full((len(parsed), self.dim), np.nan, np.float32)
        failures: dict[int, UnitError] = {}
        collected = failures if errors == "return" else None
        for units in batches(self._reader, parsed, "item", collected, fit=True):
            indices = list(units)
            result = self._engine.embed(list(units.values()))
            for place, error in sorted(result.failures.items()):
                failures[indices[place]] = named(error, f"item {indices[place]}")
                if collected is None:
                    raise failures[indices[place]]
            good = [place for place in range(len(indices)) if place not in result.failures]
            vectors[[indices[place] for place in good]] = result.columns["vector"][good]
        return vectors if collected is None else (vectors, dict(sorted(failures.items())))

    def embed_query(self, query: object, *, instruction: str | None = None) -> npt.NDArray:
        """Return the vector of a query, float32 of shape ``(dim,)``.

        Args:
            query: A text, or any other item.
            instruction: Of this query; None: the item's own, else ``query_instruction``.

        Raises:
            InputError, UnitError: As `embed`.
        """
        (item,) = parse_items([query], "query")
        try:
            unit = self._reader.read(
                dataclasses.replace(
                    item, instruction=instruction or item.instruction or self.query_instruction
                )
            )
        except UnitError as error:
            raise named(error, "query") from None
        result = self._engine.embed([unit])
        if result.failures:
            raise named(result.failures[0], "query")
        return np.array(result.columns["vector"][0], np.float32)

    def embed_queries(
        self, queries: Iterable[object], *, instruction: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the vectors of queries, float32 of shape ``(queries, dim)``; see `embed_query`.

        Raises:
            InputError, UnitError: As `embed`; the first query that fails raises its error.
        """
        return self.embed(
            [
                dataclasses.replace(
                    item, instruction=instruction or item.instruction or self.query_instruction
                )
                for item in parse_items(queries, "query")
            ]
        )

    def close(self) -> None:
        """End the decoding child. The embedder may be used again; it then starts another."""
        self._reader.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
