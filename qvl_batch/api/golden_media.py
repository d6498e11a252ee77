"""The media of golden cases, decoded through the media room at the official sizes."""

from __future__ import annotations

from pathlib import Path

from qvl_batch.api.golden import GoldenUnit, has_palette_transparency
from qvl_batch.api.inputs import Item, Medium
from qvl_batch.api.reader import ItemReader
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.storage import Storage, local_path
from qvl_batch.units import EmbedInput


class GoldenMedia:
    """Turns golden units into model inputs, as `Embedder` does with official lists of frames.

    Args:
        folder: The golden folder, to which paths are relative.
        tokenizer: Counts tokens, to fit long videos to the context where the official class fails.
    """

    def __init__(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        self._folder = folder
        self._reader = ItemReader(tokenizer, storage=Storage(), frame_list="official")

    def __enter__(self) -> GoldenMedia:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    @property
    def used_documented_total(self) -> bool:
        """Whether the last unit was fitted to the context."""
        return self._reader.used_documented_total

    def input_of(self, unit: GoldenUnit, *, fit: bool) -> EmbedInput:
        """Return the unit decoded.

        Args:
            unit: Texts and paths.
            fit: Bring videos that pass the context to the documented total of pixels. The official
                reranker lets them pass instead.

        Raises:
            UnitError: If one of its parts can not be used.
        """
        media = [
            Medium("video", self._path(video), video)
            if isinstance(video, str)
            else Medium("video", tuple(self._path(path) for path in video), video[0])
            for video in unit.videos
            if video != ()
        ]
        media += [Medium("image", self._path(path), path) for path in unit.images]
        # An empty list of frames leaves an empty user turn, where nothing at all would be NULL.
        texts = unit.texts if unit.texts or media or not unit.videos else ("",)
        item = Item(texts, tuple(media), unit.instruction, unit.fps, unit.max_frames)
        return self._reader.read(item, fit=fit)

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
