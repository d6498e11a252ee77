"""Items to model inputs: fetched, opened, planned together, decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from qvl_batch.api.frame_lists import official_first_size, plan_official_list, plan_sampled_list
from qvl_batch.api.inputs import Item, Medium, parse_item
from qvl_batch.budget import (
    DOCUMENTED_TOTAL_PX,
    Context,
    SizeError,
    plan_document,
    plan_image,
    plan_video,
)
from qvl_batch.errors import CorruptMediaError, InputError, LimitExceededError, UnitError
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher, Source
from qvl_batch.media.held import is_picture, picture_header, read_picture, resize_picture
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.recipe import DocumentBudget, ImageBudget, VideoBudget
from qvl_batch.storage import Storage
from qvl_batch.units import EmbedInput, Header, PartPlan, Vision

FrameListWay = Literal["sampled", "official"]
RESIZE = "qvl_batch.model.resize:resize_frame"
_NO_LIMIT = Context(count_tokens=lambda plan: 0, max_tokens=1)
MIB = 1 << 20
# Decoded inputs that wait for a forward pass: bounds memory, does not change vectors.
_MOST_WAITING = 256
_MOST_WAITING_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class _Opened:
    """A medium with its header; of a list of frames, the header of the first."""

    medium: Medium
    header: Header
    source: Source | None = None
    picture: Any = None

    @property
    def is_video(self) -> bool:
        return self.medium.is_frame_list or self.header.kind == "video"


class ItemReader:
    """Turns items into model inputs. Files and bytes are decoded in a child that can be killed.

    Args:
        tokenizer: Counts the tokens of a prompt from its plans.
        storage: How object stores are reached.
        image: Pixels of an image.
        video: Frames of a video and their pixels.
        document: Resolution and pixels of a page.
        frame_list: ``sampled``: all frames of a list, at the times that ``fps`` gives them (the
            item's, else the video budget's), at the size of a video file's frames. ``official``:
            as the official class does (resized twice, at a pretended 2 frames a second).
        limits: Time and memory of decoding one medium.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        *,
        storage: Storage,
        image: ImageBudget = ImageBudget(),
        video: VideoBudget = VideoBudget(),
        document: DocumentBudget = DocumentBudget(),
        frame_list: FrameListWay = "sampled",
        limits: DecodeLimits | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._image, self._video, self._document = image, video, document
        self._frame_list = frame_list
        self._fetcher = Fetcher(storage)
        self._decoder = Decoder(limits or DecodeLimits(), RESIZE)
        self._current: Source | None = None
        self.used_documented_total = False

    def close(self) -> None:
        """End the decoding child; another is started when one is needed."""
        self._decoder.close()

    def read(self, item: Item, *, fit: bool = True) -> EmbedInput:
        """Return the item decoded; `used_documented_total` says how it was fitted.

        Args:
            item: What to decode.
            fit: Bring videos that pass the context to the documented total of pixels, and refuse
                what does not fit then. The official reranker lets them pass instead.

        Raises:
            UnitError: If one of its parts can not be used, or all do not fit the context.
        """
        self.used_documented_total = False
        with contextlib.ExitStack() as sources:
            opened = [self._open(medium, sources) for medium in item.media]
            # The official order, whatever order the first bytes reveal.
            opened.sort(key=lambda one: not one.is_video)
            plans = self._plans(item, opened, fit)
            visions = [self._decode(*pair) for pair in zip(opened, plans, strict=True)]
            self._current = None
        return EmbedInput(
            texts=item.texts,
            images=tuple(vision for vision in visions if not vision.seconds),
            videos=tuple(vision for vision in visions if vision.seconds),
            instruction=item.instruction,
            uri=item.media[0].name if item.media else "",
        )

    def _open(self, medium: Medium, sources: contextlib.ExitStack) -> _Opened:
        first = medium.value[0] if medium.is_frame_list else medium.value
        if is_picture(first):
            picture = read_picture(first, uri=medium.name)
            return _Opened(medium, picture_header(picture), picture=picture)
        if medium.is_frame_list:
            with self._source(first, medium.name) as source:
                return _Opened(medium, self._header(source, "image"))
        source = sources.enter_context(self._source(medium.value, medium.name, **medium.listed))
        header = self._header(source, medium.kind)
        return _Opened(medium, header, source=source)

    def _source(self, value: str | bytes, name: str, **listed: Any) -> Source:
        if isinstance(value, bytes):
            return Source(name, len(value), data=value)
        return self._fetcher.fetch(value, **listed)

    def _header(self, source: Source, kind: Any) -> Header:
        self._current = None
        header = self._decoder.open(source, kind, dpi=self._document.dpi)
        self._current = source
        return header

    def _plans(self, item: Item, opened: list[_Opened], fit: bool) -> list[PartPlan]:
        """Plan all media of a prompt together: they share the context."""
        tokens = 0
        for total_px in (self._video.total_px, min(self._video.total_px, DOCUMENTED_TOTAL_PX)):
            plans = [self._plan(one, item, total_px) for one in opened]
            tokens = self._tokenizer.count_uncuttable(instruction=item.instruction, plans=plans)
            if not fit or tokens <= self._tokenizer.max_tokens:
                return plans
            self.used_documented_total = any(one.is_video for one in opened)
        videos = sum(one.is_video for one in opened)
        frames = sum(plan.num_frames for plan in plans if plan.is_video)
        raise LimitExceededError(
            opened[0].medium.name if opened else "",
            f"{videos} video(s) of {frames} frames and {len(opened) - videos} image(s) need "
            f"{tokens} tokens, the context is {self._tokenizer.max_tokens}: lower the pixel or "
            "frame budgets, or raise max_tokens",
        )

    def _plan(self, one: _Opened, item: Item, total_px: int) -> PartPlan:
        medium, header = one.medium, one.header
        try:
            if medium.is_frame_list:
                return self._plan_list(one, item, total_px)
            if header.kind == "video":
                budget = VideoBudget(**vars(self._video) | {"total_px": total_px})
                plans = plan_video(
                    header,
                    budget,
                    _NO_LIMIT,
                    segment_s=medium.segment_s,
                    fps=item.fps,
                    max_frames=item.max_frames,
                )
                return plans[self._segment(medium, len(plans))]
            if header.kind == "document":
                return plan_document(header, self._document)[self._page(medium, header)]
            return plan_image(header, self._image)
        except SizeError as error:
            raise CorruptMediaError(medium.name, str(error)) from None

    def _plan_list(self, one: _Opened, item: Item, total_px: int) -> PartPlan:
        count, height, width = len(one.medium.value), one.header.height_px, one.header.width_px
        if self._frame_list == "official":
            return plan_official_list(count, height, width, self._video)
        return plan_sampled_list(
            count,
            height,
            width,
            self._video,
            total_px,
            fps=item.fps or self._video.fps,
            max_frames=item.max_frames or self._video.max_frames,
        )

    def _segment(self, medium: Medium, segments: int) -> int:
        segment = medium.segment or 0
        if segment >= segments:
            raise LimitExceededError(
                medium.name, f"there is no segment {segment}: it has {segments}"
            )
        return segment

    def _page(self, medium: Medium, header: Header) -> int:
        pages = len(header.page_sizes_px)
        if medium.page is None and pages > 1:
            raise LimitExceededError(
                medium.name, f"{pages} pages; a vector is of one page: give `page` (from 0)"
            )
        page = medium.page or 0
        if page >= pages:
            raise LimitExceededError(medium.name, f"there is no page {page}: it has {pages}")
        return page

    def _decode(self, one: _Opened, plan: PartPlan) -> Vision:
        if one.medium.is_frame_list:
            return Vision(self._decode_list(one, plan), plan.seconds)
        if one.picture is not None:
            return Vision(resize_picture(one.picture, plan.height_px, plan.width_px)[None])
        assert one.source is not None
        if self._current is not one.source:
            self._header(one.source, one.header.kind)
        return Vision(self._decoder.decode([plan])[0], plan.seconds)

    def _decode_list(self, one: _Opened, plan: PartPlan) -> npt.NDArray[np.uint8]:
        """Return the frames at their final size; only one is held at its own size."""
        # Not above: it imports torch, which a child can do for itself meanwhile.
        from qvl_batch.model.resize import resize_frame

        pixels = np.empty((plan.num_frames, plan.height_px, plan.width_px, 3), np.uint8)
        sizes: set[tuple[int, int]] = set()
        for place, index in enumerate(plan.frame_indices):
            if place and index == plan.frame_indices[place - 1]:
                pixels[place] = pixels[place - 1]
                continue
            frame = self._frame(one.medium, index)
            sizes.add(frame.shape[:2])
            if len(sizes) > 1:
                shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
                raise CorruptMediaError(
                    one.medium.name, f"the listed frames differ in size: {shown} px"
                )
            pixels[place] = resize_frame(frame, plan.height_px, plan.width_px)
        return pixels

    def _frame(self, medium: Medium, index: int) -> npt.NDArray[np.uint8]:
        """Return one listed frame at its own size, or at the first of the official ones."""
        value, name = medium.value[index], f"{medium.name}, frame {index}"
        if is_picture(value):
            picture = read_picture(value, uri=name)
            height, width = self._first_size(picture_header(picture), name)
            return resize_picture(picture, height, width)
        with self._source(value, name) as source:
            header = self._header(source, "image")
            height, width = self._first_size(header, name)
            frame = self._decoder.decode([PartPlan(0, (0,), width, height)])[0][0]
        self._current = None
        return frame

    def _first_size(self, header: Header, name: str) -> tuple[int, int]:
        if self._frame_list == "sampled":
            return header.height_px, header.width_px
        try:
            return official_first_size(header.height_px, header.width_px)
        except SizeError as error:
            raise CorruptMediaError(name, str(error)) from None


def batches(
    reader: ItemReader,
    items: Iterable[Item],
    what: str,
    failures: dict[int, UnitError] | None,
    *,
    fit: bool,
) -> Iterator[dict[int, EmbedInput]]:
    """Yield the items decoded, by index, in groups of bounded memory.

    Args:
        reader: Decodes them.
        items: What to decode.
        what: Names an item in messages, with its index.
        failures: Takes what fails, by index; None: the first failure is raised.
        fit: As `ItemReader.read` has it.
    """
    waiting: dict[int, EmbedInput] = {}
    num_bytes = 0
    for index, item in enumerate(items):
        try:
            unit = reader.read(item, fit=fit)
        except UnitError as error:
            if failures is None:
                raise named(error, f"{what} {index}") from None
            failures[index] = named(error, f"{what} {index}")
            continue
        waiting[index] = unit
        num_bytes += sum(vision.pixels.nbytes for vision in (*unit.videos, *unit.images))
        if len(waiting) >= _MOST_WAITING or num_bytes >= _MOST_WAITING_BYTES:
            yield waiting
            waiting, num_bytes = {}, 0
    if waiting:
        yield waiting


def parse_items(items: Iterable[object], what: str) -> Sequence[Item]:
    """Return the items parsed; a lone str, mapping or path is refused: it is not a list of items.

    Raises:
        InputError: Naming the index of the first that is of no known form.
    """
    if isinstance(items, str | bytes | Mapping | PurePath):
        raise InputError(f"A list of items is needed, not a {type(items).__name__}.", "Use [...].")
    parsed = []
    for index, item in enumerate(items):
        try:
            parsed.append(parse_item(item))
        except InputError as error:
            raise InputError(f"{what} {index}: {error.problem}", error.remedy) from None
    return parsed


def budget_of(budget: type, given: Any, name: str) -> Any:
    """Return a budget from itself or from its fields.

    Raises:
        ConfigError: If a value is not allowed.
        InputError: If a field is unknown.
    """
    if isinstance(given, budget):
        return given
    fields = budget.__dataclass_fields__
    if not isinstance(given, Mapping) or not set(given) <= set(fields):
        raise InputError(
            f"{name} is {given!r}.", f"Give a {budget.__name__} or any of {', '.join(fields)}."
        )
    return budget(**given)


def check_frame_list(way: str) -> None:
    """Raise `InputError` unless this is a way to take lists of frames."""
    if way not in get_args(FrameListWay):
        raise InputError(f"frame_list is {way!r}.", "Give 'sampled' or 'official'.")


def named(error: UnitError, where: str) -> UnitError:
    """Return the error with ``where`` (such as ``item 3``) before its own place."""
    place = f"{where} ({error.uri})" if error.uri else where
    return type(error)(place, error.reason)
