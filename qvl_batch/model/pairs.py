"""Which query-document pairs share what: pure decisions on their prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from qvl_batch.model.feature_store import FrameName
from qvl_batch.model.prompt import PromptIds
from qvl_batch.units import EmbedInput, Vision


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a document to be scored, and what they are known by.

    A key stands for the frames of one side: sides with equal keys must hold equal frames. Their
    features are then kept from one call to the next; without a key a ``Vision`` object is known by
    its identity, within one call. ``instruction=None`` means the engine's.
    """

    query: EmbedInput
    document: EmbedInput
    instruction: str | None = None
    query_key: Hashable = None
    document_key: Hashable = None

    @property
    def visions(self) -> tuple[Vision, ...]:
        """All frames in the order of the prompt's spans."""
        query, document = self.query, self.document
        return (*query.videos, *query.images, *document.videos, *document.images)

    @property
    def num_query_visions(self) -> int:
        return len(self.query.videos) + len(self.query.images)

    def frame_names(self) -> list[FrameName]:
        """Return what each of ``visions`` is known by."""
        split = self.num_query_visions
        return [
            *_names(self.visions[:split], self.query_key),
            *_names(self.visions[split:], self.document_key),
        ]

    def query_identity(self) -> Hashable:
        """Return what pairs have in common that may share a prefix."""
        names = tuple(self.frame_names()[: self.num_query_visions])
        # How many of them are videos decides their place in the prompt.
        return (self.instruction, self.query.texts, len(self.query.videos), names)


@dataclass(frozen=True, slots=True)
class PairScore:
    """A pair's score in 0..1, the tokens of its prompt, and whether texts were cut to fit."""

    score: float
    num_tokens: int
    truncated: bool


def _names(visions: Sequence[Vision], key: Hashable) -> list[FrameName]:
    if key is None:
        return [FrameName(id(vision), lasting=False) for vision in visions]
    return [
        FrameName((key, place, vision.grid, vision.seconds), lasting=True)
        for place, vision in enumerate(visions)
    ]


def shared_prefix(prompts: Sequence[PromptIds], num_query_spans: int) -> int:
    """Return how many first tokens the prompts of one query share.

    All but a few tokens before the document: a tokenizer may join the first characters of a
    document's text with what stands before them. Equal first words of documents are shared as
    well, but never their frames, of which equal ids say nothing.

    Args:
        prompts: Not truncated, of one query.
        num_query_spans: Temporal groups of the query, which come first in ``spans``.

    Returns:
        Less than the length of any prompt, and 0 if some of the query's frames would be left out.
    """
    limit = min(len(prompt.ids) for prompt in prompts) - 1
    first = prompts[0].ids
    for prompt in prompts:
        if len(prompt.spans) > num_query_spans:
            limit = min(limit, prompt.spans[num_query_spans].start)
        differing = np.flatnonzero(prompt.ids[:limit] != first[:limit])
        if len(differing):
            limit = int(differing[0])
    if num_query_spans and prompts[0].spans[num_query_spans - 1].end > limit:
        return 0
    return limit
