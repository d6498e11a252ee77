"""The media of golden cases, decoded through the media room at the official sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qvl_batch.api.golden import GoldenUnit, has_palette_transparency
from qvl_batch.budget import (
    DOCUMENTED_TOTAL_PX,
    FRAME_FACTOR,
    Context,
    SizeError,
    frame_size,
    pair_seconds,
    plan_image,
    plan_video,
    smart_resize,
)
from qvl_batch.errors import CorruptMediaError
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher, Source
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.model.resize import resize_frame
from qvl_batch.recipe import ImageBudget, VideoBudget
from qvl_batch.storage import Storage, local_path
from qvl_batch.units import EmbedInput, PartPlan, Vision

# The official frame-list path of qwen-vl-utils 0.0.14: a frame first goes through the image path
# with a factor of 64 (4 to 16,384 such blocks), because the factor is passed where the patch size
# is meant; then all go through the video resize. Their times pretend 2 frames a second.
_LIST_FACTOR_PX = 64
_LIST_MIN_PX = 4 * _LIST_FACTOR_PX**2
_LIST_MAX_PX = 16_384 * _LIST_FACTOR_PX**2
_LIST_FPS = 2.0
_NO_LIMIT = Context(count_tokens=lambda plan: 0, max_tokens=1)


def frame_list_indices(num_frames: int, max_frames: int = VideoBudget.max_frames) -> list[int]:
    """Return which frames of a list the official class embeds, in order.

    Above the limit they are evenly spaced and truncated (not rounded, unlike a file's); an odd
    number is made even by repeating the last.
    """
    if num_frames > max_frames:
        chosen = np.linspace(0, num_frames - 1, max_frames, dtype=int).tolist()
    else:
        chosen = list(range(num_frames))
    return chosen + chosen[-1:] * (len(chosen) % FRAME_FACTOR)


class GoldenMedia:
    """Turns golden units into model inputs.

    Args:
        folder: The golden folder, to which paths are relative.
        tokenizer: Counts tokens, to fit long videos to the context where the official class fails.
    """

    def __init__(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._fetcher = Fetcher(Storage())
        self._decoder = Decoder(DecodeLimits(), "qvl_batch.model.resize:resize_frame")
        self.used_documented_total = False

    def __enter__(self) -> GoldenMedia:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def input_of(self, unit: GoldenUnit, *, fit: bool) -> EmbedInput:
        """Return the unit decoded.

        Args:
            unit: Texts and paths.
            fit: Bring videos that pass the context to the documented total of pixels. The official
                reranker lets them pass instead.

        Raises:
            UnitError: If one of its parts can not be used.
        """
        uri = next((v for v in (*unit.images, *unit.videos) if isinstance(v, str)), "")
        self.used_documented_total = False
        images = tuple(self._image(path) for path in unit.images)
        files = [video for video in unit.videos if isinstance(video, str)]
        total_px = self._total_px(unit, files, images) if fit else None
        videos = tuple(
            self._video(video, unit, total_px) if isinstance(video, str) else self._frames(video)
            for video in unit.videos
            if video != ()
        )
        # An empty list of frames leaves an empty user turn, where nothing at all would be NULL.
        texts = unit.texts if unit.texts or images or videos or not unit.videos else ("",)
        return EmbedInput(texts, images, videos, unit.instruction, uri)

    def has_palette_transparency(self, unit: GoldenUnit) -> bool:
        """Whether an image or listed frame of the unit is of that kind."""
        listed = [path for video in unit.videos if not isinstance(video, str) for path in video]
        for path in (*unit.images, *listed):
            file = Path(self._path(path))
            if file.is_file() and has_palette_transparency(file.read_bytes()):
                return True
        return False

    def _path(self, path: str) -> str:
        if "://" in path and not path.startswith("file://"):
            return path
        return str(self._folder / local_path(path))

    def _fetch(self, path: str) -> Source:
        return self._fetcher.fetch(self._path(path))

    def _image(self, path: str) -> Vision:
        with self._fetch(path) as source:
            header = self._decoder.open(source, "image")
            try:
                plan = plan_image(header, ImageBudget())
            except SizeError as error:
                raise CorruptMediaError(path, str(error)) from None
            return Vision(self._decoder.decode([plan])[0])

    def _total_px(
        self, unit: GoldenUnit, files: list[str], images: tuple[Vision, ...]
    ) -> int | None:
        """Return the budget of all frames of a file: the documented one if need be, else None."""
        plans = [self._video_plan(path, unit, None) for path in files]
        plans += [PartPlan(0, (0,), v.pixels.shape[2], v.pixels.shape[1]) for v in images]
        tokens = self._tokenizer.count_uncuttable(instruction=unit.instruction, plans=plans)
        if not files or tokens <= self._tokenizer.max_tokens:
            return None
        self.used_documented_total = True
        return DOCUMENTED_TOTAL_PX

    def _video_plan(self, path: str, unit: GoldenUnit, total_px: int | None) -> PartPlan:
        with self._fetch(path) as source:
            return self._plan(source, path, unit, total_px)

    def _plan(self, source: Source, path: str, unit: GoldenUnit, total_px: int | None) -> PartPlan:
        header = self._decoder.open(source, "video")
        budget = VideoBudget() if total_px is None else VideoBudget(total_px=total_px)
        try:
            return plan_video(header, budget, _NO_LIMIT, fps=unit.fps, max_frames=unit.max_frames)[
                0
            ]
        except SizeError as error:
            raise CorruptMediaError(path, str(error)) from None

    def _video(self, path: str, unit: GoldenUnit, total_px: int | None) -> Vision:
        with self._fetch(path) as source:
            plan = self._plan(source, path, unit, total_px)
            return Vision(self._decoder.decode([plan])[0], plan.seconds)

    def _frames(self, paths: tuple[str, ...]) -> Vision:
        """Return a list of frames as the official class sees it."""
        frames: dict[int, np.ndarray] = {}
        order = frame_list_indices(len(paths))
        for index in order:
            if index in frames:
                continue
            with self._fetch(paths[index]) as source:
                header = self._decoder.open(source, "image")
                try:
                    height, width = smart_resize(
                        header.height_px,
                        header.width_px,
                        _LIST_MIN_PX,
                        _LIST_MAX_PX,
                        _LIST_FACTOR_PX,
                    )
                except SizeError as error:
                    raise CorruptMediaError(paths[index], str(error)) from None
                frames[index] = self._decoder.decode([PartPlan(0, (0,), width, height)])[0][0]
        sizes = sorted({frame.shape[:2] for frame in frames.values()})
        if len(sizes) > 1:
            shown = ", ".join(f"{width}x{height}" for height, width in sizes[:3])
            raise CorruptMediaError(paths[0], f"the listed frames differ in size: {shown} px")
        height, width = frame_size(len(order), *sizes[0], VideoBudget(), DOCUMENTED_TOTAL_PX)
        resized = {i: resize_frame(frame, height, width) for i, frame in frames.items()}
        return Vision(
            np.stack([resized[i] for i in order]),
            pair_seconds(tuple(range(len(order))), _LIST_FPS),
        )
