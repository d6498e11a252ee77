"""Rows that were found, back to what was embedded: fetched again, the same page or segment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvl_batch.api.reader import RESIZE
from qvl_batch.budget import (
    Context,
    SizeError,
    plan_document,
    plan_image,
    plan_video,
)
from qvl_batch.errors import CorruptMediaError, LimitExceededError, MissingMediaError
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher, FetchLimits
from qvl_batch.recipe import DocumentBudget, ImageBudget, VideoBudget
from qvl_batch.storage import Storage
from qvl_batch.units import EmbedInput, Header, PartPlan, Vision

# The reranker lets what passes its context pass, as the official one does.
_NO_LIMIT = Context(count_tokens=lambda plan: 0, max_tokens=1)


class FoundRowReader:
    """Fetches and decodes the media of table rows. Not for use by several threads at once.

    Args:
        storage: How object stores are reached.
        fetch_limits: Bounds of reading.
        decode_limits: Time and memory of decoding one medium.
    """

    def __init__(
        self,
        storage: Storage,
        fetch_limits: FetchLimits | None = None,
        decode_limits: DecodeLimits | None = None,
    ) -> None:
        self._fetcher = Fetcher(storage, fetch_limits)
        self._decoder = Decoder(decode_limits or DecodeLimits(), RESIZE)

    def read(
        self,
        row: Mapping[str, Any],
        *,
        image: ImageBudget,
        video: VideoBudget,
        document: DocumentBudget,
    ) -> EmbedInput:
        """Return the row's text, picture, page or frames.

        Args:
            row: ``kind, uri, etag, byte_offset, byte_length, page, start_s, end_s, text`` of a
                table's row.
            image: Pixels of an image.
            video: Frames of a video, or of the segment that the row is, and their pixels.
            document: Resolution and pixels of a page.

        Raises:
            UnitError: If the medium is gone, was changed, or can not be decoded.
        """
        texts = (row["text"],) if row["text"] is not None else ()
        uri = row["uri"]
        if row["kind"] == "text" and texts:
            return EmbedInput(texts=texts, uri=uri or "")
        if not uri:
            raise MissingMediaError("", "the row has neither a text nor an address")
        with self._fetcher.fetch(
            uri,
            etag=row["etag"],
            byte_offset=row["byte_offset"],
            byte_length=row["byte_length"],
        ) as source:
            header = self._decoder.open(source, row["kind"], dpi=document.dpi)
            try:
                plan = _plan_of(row, header, image, video, document)
            except SizeError as error:
                raise CorruptMediaError(uri, str(error)) from None
            vision = Vision(self._decoder.decode([plan])[0], plan.seconds)
        if plan.is_video:
            return EmbedInput(texts=texts, videos=(vision,), uri=uri)
        return EmbedInput(texts=texts, images=(vision,), uri=uri)

    def close(self) -> None:
        """End the decoding child; another is started when one is needed."""
        self._decoder.close()


def _plan_of(
    row: Mapping[str, Any],
    header: Header,
    image: ImageBudget,
    video: VideoBudget,
    document: DocumentBudget,
) -> PartPlan:
    if header.kind == "document":
        pages = plan_document(header, document)
        page = row["page"] or 0
        if page >= len(pages):
            raise LimitExceededError(row["uri"], f"there is no page {page}: it has {len(pages)}")
        return pages[page]
    if header.kind == "video":
        return _plan_segment(row, header, video)
    return plan_image(header, image)


def _plan_segment(row: Mapping[str, Any], header: Header, video: VideoBudget) -> PartPlan:
    """Return the frames of a row's segment, chosen as the embed job chose them."""
    first, last = 0, header.num_frames
    if row["start_s"] is not None and row["end_s"] is not None and header.fps > 0:
        first = min(round(row["start_s"] * header.fps), header.num_frames - 1)
        last = min(round(row["end_s"] * header.fps), header.num_frames)
    part = dataclasses.replace(header, num_frames=last - first)
    (plan,) = plan_video(part, video, _NO_LIMIT)
    return dataclasses.replace(plan, frame_indices=tuple(first + i for i in plan.frame_indices))
