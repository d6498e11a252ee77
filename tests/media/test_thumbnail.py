"""Thumbnails: the right part of the right object, made by the child, or the reason why not."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvl_batch.errors import (
    AccessDeniedError,
    ChangedMediaError,
    CorruptMediaError,
    DecoderKilledError,
    EmptyMediaError,
    KindMismatchError,
    LimitExceededError,
    MissingMediaError,
    UnitError,
)
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.media.fetch import FetchLimits, local_etag
from qvl_batch.media.thumbnail import MediaPart, Thumbnail, Thumbnailer, fit, frames_between
from qvl_batch.storage import Storage
from qvl_batch.units import Header
from tests.media.clips import clip, image_bytes, moving_picture, pdf

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def thumbnailer():
    with Thumbnailer(Storage(), max_side_px=64) as shared:
        yield shared


def written(path: Path, data: bytes, kind: str = "image", **fields: object) -> MediaPart:
    path.write_bytes(data)
    fields.setdefault("etag", local_etag(path.stat()))
    return MediaPart(uri=str(path), kind=kind, **fields)


def picture(number: int = 1, width: int = 96, height: int = 48) -> bytes:
    return image_bytes(Image.fromarray(moving_picture(number, width, height)))


def pixels_of(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        assert not image.getexif()
        return np.asarray(image.convert("RGB")).astype(int)


def test_an_image_is_made_smaller_in_proportion(thumbnailer, tmp_path):
    part = written(tmp_path / "a.png", picture(width=256, height=128))

    made = thumbnailer.thumbnail(part)

    assert isinstance(made, Thumbnail)
    (one,) = made.pictures
    assert (one.width_px, one.height_px, one.time_s) == (64, 32, None)
    assert (made.header.width_px, made.header.height_px) == (256, 128)
    wanted = Image.fromarray(moving_picture(1, 256, 128)).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.abs(pixels_of(one.jpeg) - np.asarray(wanted)).mean() < 6


def test_a_small_image_is_not_enlarged(thumbnailer, tmp_path):
    (one,) = thumbnailer.thumbnail(
        written(tmp_path / "a.png", picture(width=20, height=10))
    ).pictures
    assert (one.width_px, one.height_px) == (20, 10)


def test_the_page_of_the_row_is_shown(thumbnailer, tmp_path):
    part = written(tmp_path / "a.pdf", pdf((100, 200), (200, 100)), "document", page=1)
    made = thumbnailer.thumbnail(part)
    (one,) = made.pictures
    assert (one.width_px, one.height_px) == (64, 32)
    assert len(made.header.page_sizes_px) == 2


def test_frames_of_the_segment_come_with_their_times(thumbnailer, tmp_path):
    part = written(tmp_path / "a.mp4", clip(40, size=(64, 48)), "video", start_s=2.0, end_s=4.0)

    made = thumbnailer.thumbnail(part)

    assert [one.time_s for one in made.pictures] == pytest.approx([2.2, 2.7, 3.2, 3.7])
    for one, index in zip(made.pictures, (22, 27, 32, 37), strict=True):
        right = np.abs(pixels_of(one.jpeg) - moving_picture(index, 64, 48)).mean()
        wrong = np.abs(pixels_of(one.jpeg) - moving_picture(index - 1, 64, 48)).mean()
        assert right < wrong / 2


def test_mixed_is_whatever_the_bytes_are(thumbnailer, tmp_path):
    video = written(tmp_path / "a", clip(8), "mixed")
    still = written(tmp_path / "b", picture(), "mixed")
    kinds = [made.header.kind for made in thumbnailer.thumbnails([video, still])]
    assert kinds == ["video", "image"]


def test_a_member_of_an_archive_is_read_by_its_range(thumbnailer, tmp_path):
    first, second = picture(width=40, height=40), picture(width=60, height=20)
    path = tmp_path / "archive.tar"
    path.write_bytes(b"head" + first + second)
    etag = local_etag(path.stat())
    parts = [
        MediaPart(uri=str(path), kind="image", etag=etag, byte_offset=start, byte_length=length)
        for start, length in ((4, len(first)), (4 + len(first), len(second)))
    ]
    sizes = [
        (made.pictures[0].width_px, made.pictures[0].height_px)
        for made in thumbnailer.thumbnails(parts)
    ]
    assert sizes == [(40, 40), (60, 20)]


def test_every_way_to_fail_is_told_and_harms_no_neighbour(thumbnailer, tmp_path):
    good = written(tmp_path / "good.png", picture())
    whole = picture(width=200, height=200)
    document = written(tmp_path / "two.pdf", pdf((50, 50), (60, 60)), "document", page=1)
    cases = {
        MissingMediaError: MediaPart(uri=str(tmp_path / "gone.png"), kind="image"),
        ChangedMediaError: written(tmp_path / "new.png", picture(), etag="17-1"),
        CorruptMediaError: written(tmp_path / "cut.png", whole[: len(whole) // 2]),
        EmptyMediaError: written(tmp_path / "empty.png", b""),
        KindMismatchError: written(tmp_path / "page.png", b"<html>hello</html>" * 9),
        AccessDeniedError: MediaPart(uri="http://127.0.0.1:1/a.png", kind="image"),
        LimitExceededError: MediaPart(
            uri=document.uri, kind="document", etag=document.etag, page=2
        ),
    }
    asked = [part for bad in cases.values() for part in (good, bad)]

    made = thumbnailer.thumbnails([*asked, document])

    assert [type(one) for one in made[1:-1:2]] == list(cases)
    assert all(isinstance(one, Thumbnail) for one in made[0:-1:2])
    assert isinstance(made[-1], Thumbnail), "the other page of the same document"


def test_what_has_no_picture_is_not_even_opened(thumbnailer):
    text, nowhere = thumbnailer.thumbnails(
        [MediaPart(uri="a.txt", kind="text"), MediaPart(uri="", kind="image")]
    )
    assert isinstance(text, KindMismatchError)
    assert isinstance(nowhere, MissingMediaError)


def test_a_store_whose_package_is_missing_costs_only_its_own_rows(tmp_path):
    script = (
        "import sys\n"
        "sys.modules['gcsfs'] = None\n"
        "from qvl_batch.media.thumbnail import *\n"
        "from qvl_batch.storage import Storage\n"
        "here, there = sys.argv[1], 'gs://bucket/a.png'\n"
        "with Thumbnailer(Storage()) as one:\n"
        "    made = one.thumbnails([MediaPart(uri=u, kind='image') for u in (there, here)])\n"
        "print(type(made[0]).__name__, type(made[1]).__name__)\n"
    )
    part = written(tmp_path / "a.png", picture())
    assert run(script, part.uri) == "FetchError Thumbnail"


@pytest.mark.parametrize("temper", ["hang", "crash", "devour", "no_json"])
def test_what_hangs_or_kills_the_decoder_costs_only_itself(tmp_path, temper):
    limits = DecodeLimits(timeout_s=2.0, memory_bytes=400 << 20)
    bad = written(tmp_path / "bad.mp4", clip(8), "video")
    same = MediaPart(uri=bad.uri, kind="video", etag=bad.etag, start_s=0.1, end_s=0.4)
    good = written(tmp_path / "good.png", picture())
    resize = f"tests.media.resizes:{temper}"
    with Thumbnailer(Storage(), decode_limits=limits, resize=resize) as thumbnailer:
        made = thumbnailer.thumbnails([bad, good, same])
    assert isinstance(made[0], DecoderKilledError)
    assert isinstance(made[1], Thumbnail)
    assert isinstance(made[2], DecoderKilledError), "told for every part of the object"


def test_the_parent_process_never_loads_a_decoder_of_pages_or_videos(tmp_path):
    parts = [
        written(tmp_path / "a.pdf", pdf((50, 50)), "document"),
        written(tmp_path / "a.mp4", clip(8), "video"),
    ]
    script = (
        "import sys\n"
        "from qvl_batch.media.thumbnail import *\n"
        "from qvl_batch.storage import Storage\n"
        "parts = [MediaPart(uri=sys.argv[1], kind='document'),\n"
        "         MediaPart(uri=sys.argv[2], kind='video')]\n"
        "with Thumbnailer(Storage()) as one:\n"
        "    made = one.thumbnails(parts)\n"
        "print([len(one.pictures) for one in made], {'av', 'pypdfium2'} & set(sys.modules))\n"
    )
    assert run(script, *(part.uri for part in parts)) == "[1, 4] set()"


def run(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    return result.stdout.strip()


def test_what_was_made_is_kept_while_its_etag_is_known(thumbnailer, tmp_path):
    known = written(tmp_path / "a.png", picture())
    unknown = MediaPart(uri=known.uri, kind="image")
    first = thumbnailer.thumbnails([known, unknown])
    os.unlink(known.uri)
    assert thumbnailer.thumbnail(known) == first[0]
    assert isinstance(thumbnailer.thumbnail(unknown), MissingMediaError)


def test_only_so_many_bytes_are_kept(tmp_path):
    parts = [written(tmp_path / f"{i}.png", picture(i)) for i in range(4)]
    with Thumbnailer(Storage()) as first:
        size = max(made.num_bytes for made in first.thumbnails(parts))
    with Thumbnailer(Storage(), max_cached_bytes=2 * size) as thumbnailer:
        thumbnailer.thumbnails(parts)
        for part in parts:
            os.unlink(part.uri)
        kept = [isinstance(thumbnailer.thumbnail(part), Thumbnail) for part in reversed(parts)]
    assert kept[0]
    assert not kept[-1]


def test_an_object_over_the_limit_is_not_read(tmp_path):
    part = written(tmp_path / "a.png", picture())
    with Thumbnailer(Storage(), fetch_limits=FetchLimits(max_object_bytes=10)) as thumbnailer:
        assert isinstance(thumbnailer.thumbnail(part), LimitExceededError)


def test_order_and_repeats_are_those_of_the_question(thumbnailer, tmp_path):
    parts = [written(tmp_path / f"{i}.png", picture(width=10 + i, height=10)) for i in range(12)]
    asked = [parts[i] for i in (3, 0, 3, 11, 7)]
    widths = [made.pictures[0].width_px for made in thumbnailer.thumbnails(asked)]
    assert widths == [13, 10, 13, 21, 17]


def test_from_an_object_store_the_etag_is_checked(bucket):
    with bucket.fs().open(bucket.uri("a.png"), "wb") as file:
        file.write(picture())
    etag = bucket.fs().info(bucket.uri("a.png"))["ETag"].strip('"')
    listed = MediaPart(uri=bucket.uri("a.png"), kind="image", etag=etag)
    with Thumbnailer(bucket.storage) as thumbnailer:
        assert isinstance(thumbnailer.thumbnail(listed), Thumbnail)
    with bucket.fs().open(bucket.uri("a.png"), "wb") as file:
        file.write(picture(2))
    with Thumbnailer(bucket.storage) as thumbnailer:
        changed, gone = thumbnailer.thumbnails(
            [listed, MediaPart(uri=bucket.uri("b.png"), kind="image")]
        )
    assert isinstance(changed, ChangedMediaError)
    assert isinstance(gone, MissingMediaError)


@pytest.mark.parametrize("form", ["path", "bytes", "image", "array"])
def test_a_querys_own_picture(thumbnailer, tmp_path, form):
    data = picture(width=128, height=64)
    image = Image.open(io.BytesIO(data))
    path = tmp_path / "q.png"
    path.write_bytes(data)
    value = {"path": path, "bytes": data, "image": image, "array": np.asarray(image)}[form]
    (one,) = thumbnailer.picture(value).pictures
    assert (one.width_px, one.height_px) == (64, 32)


@pytest.mark.parametrize(
    "value", [b"", b"no picture", np.zeros((2, 2, 7), np.uint8), "/nowhere/at/all.png"]
)
def test_a_querys_picture_that_is_none(thumbnailer, value):
    assert isinstance(thumbnailer.picture(value), UnitError)


@given(
    st.integers(1, 10_000),
    st.floats(0.1, 240),
    st.none() | st.floats(0, 4000),
    st.none() | st.floats(0, 4000),
    st.integers(1, 9),
)
def test_frames_lie_within_the_video_and_rise(num_frames, fps, start_s, end_s, most):
    header = Header(kind="video", num_frames=num_frames, fps=fps)
    chosen = frames_between(header, start_s, end_s, most)
    assert 1 <= len(chosen) <= most
    assert chosen[0] >= 0
    assert chosen[-1] < num_frames
    assert all(b > a for a, b in itertools.pairwise(chosen))


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf")])
def test_frames_of_a_video_without_a_rate(fps):
    header = Header(kind="video", num_frames=8, fps=fps)
    assert frames_between(header, 1.0, 2.0, 4) == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((640, 480), (64, 48)), ((10, 5), (10, 5)), ((10_000, 1), (64, 1)), ((0, 0), (1, 1))],
)
def test_fit(size, fitted):
    assert fit(*size, 64) == fitted
