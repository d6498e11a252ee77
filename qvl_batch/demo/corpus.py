"""A small corpus of real files drawn from the demo's world, with the answers kept beside it."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import av
from PIL import Image

from qvl_batch.demo.queries import (
    DEMO_QUERIES,
    PDF_PAGES,
    PLANTED_CLIPS,
    PLANTED_NOTES,
    PLANTED_PAGES,
    PLANTED_PICTURES,
    DemoQuery,
)
from qvl_batch.demo.world import Scene, random_scene
from qvl_batch.units import Kind

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
CLIP_FRAMES = 8
# With `recipe.video.fps` at the same rate all eight frames are embedded, at the times 0.25, 1.25,
# 2.25 and 3.25 s a pair, as the checkpoint was trained.
CLIP_FPS = 2

PICTURE_SIDES_PX = (64, 80, 96, 128, 160, 200, 256, 320)
_PAGE_SIDES_PX = (128, 192, 256, 320)
# Even sides: yuv420p halves the colour planes.
CLIP_SIDES_PX = (64, 96, 128, 192)
_PDF_SIDE_PX = 576
_PDF_DPI = 144

# Files of each sort at scale 1, planted scenes included.
_PICTURES, _PAGES, _CLIPS, _NOTES = 64, 12, 14, 24


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """A file of the corpus and what it shows.

    ``path`` is relative to the media folder. ``scenes`` holds one scene a row that it is embedded
    to: one a page of the PDF, none for a file that is broken on purpose.
    """

    path: str
    kind: Kind
    scenes: tuple[Scene, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(scene.caption() for scene in self.scenes)


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """Where the corpus lies and what is true of it."""

    media_dir: Path
    truth_path: Path
    files: tuple[CorpusFile, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Paths of the files that cannot be decoded."""
        return tuple(file.path for file in self.files if not file.scenes)

    @property
    def num_rows(self) -> int:
        """Vectors that the corpus is embedded to."""
        return sum(len(file.scenes) for file in self.files)

    def answers(self, query: DemoQuery) -> tuple[tuple[str, int], ...]:
        """Return (path, segment) of every row that answers the query."""
        return tuple(
            (file.path, segment)
            for file in self.files
            for segment, scene in enumerate(file.scenes)
            if query.is_answered_by(scene)
        )

    def to_json(self) -> str:
        """Return captions, broken files and answers as indented JSON."""
        truth = {
            "captions": {file.path: list(file.captions) for file in self.files if file.scenes},
            "broken": list(self.broken),
            "answers": {
                query.text: [f"{path}:{segment}" for path, segment in self.answers(query)]
                for query in DEMO_QUERIES
            },
        }
        return json.dumps(truth, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A file before it has a place: its folder, ending, bytes and scenes."""

    folder: str
    suffix: str
    kind: Kind
    content: bytes
    scenes: tuple[Scene, ...]


def picture_bytes(picture: Image.Image, suffix: str) -> bytes:
    """Return a picture as a ``png``, ``jpg`` or ``webp`` file."""
    options = {
        "png": {"format": "PNG", "optimize": True},
        "jpg": {"format": "JPEG", "quality": 92},
        "webp": {"format": "WEBP", "quality": 92},
    }
    content = io.BytesIO()
    picture.save(content, **options[suffix])
    return content.getvalue()


def clip_bytes(frames: list[Image.Image]) -> bytes:
    """Return frames of equal even sides as an MP4 file of `CLIP_FPS` frames a second."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        # Threads of x264 share out the bits, and so the bytes, by the cores there are.
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return content.getvalue()


def _pdf_bytes(pages: list[Image.Image]) -> bytes:
    content = io.BytesIO()
    written_at = noon(DAYS[0]).timetuple()
    pages[0].save(
        content,
        format="PDF",
        save_all=True,
        append_images=pages[1:],
        resolution=_PDF_DPI,
        quality=92,
        creationDate=written_at,
        modDate=written_at,
    )
    return content.getvalue()


def noon(day: str) -> datetime:
    """Return 12:00 UTC of an ISO date: the modification time of what is written."""
    return datetime.fromisoformat(f"{day}T12:00:00").replace(tzinfo=UTC)


def _scenes(
    planted: tuple[Scene, ...],
    kinds: tuple[str, ...],
    total: int,
    rng: random.Random,
    seen: set[Scene],
) -> list[Scene]:
    """Return the planted scenes and random ones, all distinct, up to ``total``, shuffled.

    A random scene answers no demo query, so the answers are the planted ones alone. ``seen`` is
    added to: a note never tells of a scene that is also drawn.
    """
    scenes = list(planted)
    while len(scenes) < total:
        scene = random_scene(rng.choice(kinds), rng)
        if scene in seen or any(query.is_answered_by(scene) for query in DEMO_QUERIES):
            continue
        seen.add(scene)
        scenes.append(scene)
    rng.shuffle(scenes)
    return scenes


def _drafts(scale: int, rng: random.Random) -> Iterator[_Draft]:
    seen = {*PLANTED_PICTURES, *PLANTED_PAGES, *PLANTED_CLIPS, *PLANTED_NOTES, *PDF_PAGES}
    stills = ("single", "count", "pair")
    pictures = _scenes(PLANTED_PICTURES, stills, scale * _PICTURES, rng, seen)
    pages = _scenes(PLANTED_PAGES, ("page",), scale * _PAGES, rng, seen)
    clips = _scenes(PLANTED_CLIPS, ("clip",), scale * _CLIPS, rng, seen)
    notes = _scenes(PLANTED_NOTES, (*stills, "page", "clip"), scale * _NOTES, rng, seen)
    for scene in pictures:
        suffix = rng.choice(("png", "jpg", "webp"))
        picture = scene.render(rng.choice(PICTURE_SIDES_PX), rng)
        yield _Draft("pictures", suffix, "image", picture_bytes(picture, suffix), (scene,))
    for scene in pages:
        suffix = rng.choice(("png", "jpg"))
        picture = scene.render(rng.choice(_PAGE_SIDES_PX), rng)
        yield _Draft("pages", suffix, "image", picture_bytes(picture, suffix), (scene,))
    for scene in clips:
        frames = scene.frames(rng.choice(CLIP_SIDES_PX), CLIP_FRAMES, rng)
        yield _Draft("clips", "mp4", "video", clip_bytes(frames), (scene,))
    for scene in notes:
        yield _Draft("notes", "txt", "text", f"{scene.caption()}\n".encode(), (scene,))
    rendered = [page.render(_PDF_SIDE_PX, rng) for page in PDF_PAGES]
    yield _Draft("documents", "pdf", "document", _pdf_bytes(rendered), PDF_PAGES)
    yield from _broken(rng)


def _broken(rng: random.Random) -> Iterator[_Draft]:
    """Two files that say what they are in their first bytes and cannot be decoded."""
    whole = picture_bytes(random_scene("single", rng).render(256, rng), "jpg")
    yield _Draft("pictures", "jpg", "image", whole[: len(whole) // 2], ())
    clip = random_scene("clip", rng)
    whole = clip_bytes(clip.frames(64, CLIP_FRAMES, rng))
    yield _Draft("clips", "mp4", "video", whole[:32] + rng.randbytes(len(whole)), ())


def remove_previous(truth_path: Path, media_dir: Path) -> None:
    """Remove the files that an earlier corpus listed here, and no others."""
    if not truth_path.exists():
        return
    truth = json.loads(truth_path.read_text())
    for path in [*truth["captions"], *truth["broken"]]:
        (media_dir / path).unlink(missing_ok=True)


def write_corpus(folder: str | os.PathLike[str], *, seed: int = 0, scale: int = 1) -> CorpusSummary:
    """Write about 117 small media files below ``folder/media`` and their truth beside it.

    Files lie in ``media/dt=DAY/SORT/NUMBER.SUFFIX``; captions, broken files and the answers to
    `DEMO_QUERIES` are in ``folder/_truth.json``, which is not part of the media. Equal arguments
    give equal bytes with equal encoders, and equal modification times, so that a run over a
    corpus that was written again finds nothing new. An earlier corpus in the folder is replaced.

    Args:
        folder: Made if it is not there.
        seed: Choices of scenes, sizes and formats.
        scale: Times as many files, 1 or more; the planted answers stay the same.

    Raises:
        ValueError: If ``scale`` is below 1.
        OSError: If the folder cannot be written.
    """
    if scale < 1:
        raise ValueError(f"scale must be 1 or more, got {scale}")
    media_dir, truth_path = Path(folder) / "media", Path(folder) / "_truth.json"
    rng = random.Random(seed)
    drafts = list(_drafts(scale, rng))
    # The broken files stand among the others, not at the end of their folder.
    rng.shuffle(drafts)
    remove_previous(truth_path, media_dir)
    numbers: dict[str, int] = {}
    files = []
    for draft in drafts:
        day = rng.choice(DAYS)
        numbers[draft.folder] = number = numbers.get(draft.folder, 0) + 1
        path = f"dt={day}/{draft.folder}/{number:04d}.{draft.suffix}"
        target = media_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(draft.content)
        noon_s = int(noon(day).timestamp())
        os.utime(target, (noon_s, noon_s))
        files.append(CorpusFile(path=path, kind=draft.kind, scenes=draft.scenes))
    files.sort(key=lambda file: file.path)
    summary = CorpusSummary(media_dir=media_dir, truth_path=truth_path, files=tuple(files))
    # Renamed into place: the next corpus reads it to know what to remove.
    unfinished = truth_path.with_suffix(".tmp")
    unfinished.write_text(summary.to_json())
    unfinished.replace(truth_path)
    return summary
