"""`Reranker`: how well documents answer a query, in a notebook, without Ray."""

from __future__ import annotations

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
from qvl_batch.errors import InputError, UnitError
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.model.load import resolve_model
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.recipe import DocumentBudget, ImageBudget, VideoBudget
from qvl_batch.storage import Storage


class Reranker:
    """Scores documents against a query; both sides take the items that `Embedder` takes.

    Args:
        model: A local folder, a hub id, or an object-store folder.
        revision: A hub commit, tag or branch.
        instruction: What counts as relevant; None: the official default.
        image: Pixels of an image; an `ImageBudget` or its fields in a mapping.
        video: Frames of a video and their pixels.
        document: Resolution and pixels of a document's page.
        max_tokens: The context. Longer texts are cut as the official reranker cuts them; images and
            videos are never cut, nor refused for their length.
        token_layout: As for `Embedder`, like all that follow.

    Raises:
        ModelError: If the checkpoint can not be used.
        ConfigError: If a budget is not allowed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        instruction: str | None = None,
        image: ImageBudget | Mapping[str, Any] = ImageBudget(),
        video: VideoBudget | Mapping[str, Any] = VideoBudget(),
        document: DocumentBudget | Mapping[str, Any] = DocumentBudget(),
        max_tokens: int = 10_240,
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
        self._engine = RerankEngine(
            resolve_model(str(model), revision, storage),
            instruction=instruction,
            max_tokens=max_tokens,
            token_layout=token_layout,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
        )
        self._reader = ItemReader(
            self._engine.tokenizer,
            storage=storage,
            **budgets,
            frame_list=frame_list,
            limits=decode_limits,
        )

    @overload
    def score(
        self,
        query: object,
        docs: Iterable[object],
        instruction: str | None = None,
        *,
        errors: Literal["raise"] = "raise",
    ) -> npt.NDArray[np.float32]: ...

    @overload
    def score(
        self,
        query: object,
        docs: Iterable[object],
        instruction: str | None = None,
        *,
        errors: Literal["return"],
    ) -> tuple[npt.NDArray[np.float32], dict[int, UnitError]]: ...

    def score(
        self,
        query: object,
        docs: Iterable[object],
        instruction: str | None = None,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> npt.NDArray[np.float32] | tuple[npt.NDArray[np.float32], dict[int, UnitError]]:
        """Return the probability that each document answers the query, float32 ``(docs,)``.

        Args:
            query: An item.
            docs: Items.
            instruction: What counts as relevant here; None: that of the reranker. An item's own
                ``instruction`` has no place in a pair and is refused.
            errors: ``raise``: the first document that fails raises its error. ``return``: also
                return the errors by index; their scores are NaN. A query that fails always raises.

        Raises:
            InputError: If an item is of no known form, whatever ``errors`` says; before any work.
            UnitError: Naming the document's index and the reason, with ``errors="raise"``.
        """
        if errors not in ("raise", "return"):
            raise InputError(f"errors is {errors!r}.", "Give 'raise' or 'return'.")
        (asked,) = parse_items([query], "query")
        parsed = parse_items(docs, "document")
        if any(item.instruction for item in (asked, *parsed)):
            raise InputError("An item has an instruction.", "Give score(..., instruction=...).")
        try:
            asked_unit = self._reader.read(asked, fit=False)
        except UnitError as error:
            raise named(error, "query") from None
        scores = np.full(len(parsed), np.nan, np.float32)
        failures: dict[int, UnitError] = {}
        collected = failures if errors == "return" else None
        for units in batches(self._reader, parsed, "document", collected, fit=False):
            results = self._engine.score(asked_unit, list(units.values()), instruction=instruction)
            for index, result in zip(units, results, strict=True):
                if not isinstance(result, UnitError):
                    scores[index] = result
                    continue
                failures[index] = named(result, f"document {index}")
                if collected is None:
                    raise failures[index]
        return scores if collected is None else (scores, dict(sorted(failures.items())))

    def close(self) -> None:
        """End the decoding child. The reranker may be used again; it then starts another."""
        self._reader.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
