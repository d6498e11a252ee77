"""The killable child: its limits, its deaths, and what does not get in or out of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl_batch.errors import (
    ChangedMediaError,
    CorruptMediaError,
    DecoderKilledError,
    EmptyMediaError,
    KindMismatchError,
    LimitExceededError,
)
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Source, local_etag
from qvl_batch.media.process import ChildProcess, DecoderBugError
from qvl_batch.units import PartPlan
from tests.media.clips import all_frames, clip, image_bytes, moving_picture, pdf

RESIZES = "tests.media.resizes"
PICTURE = image_bytes(Image.fromarray(moving_picture(1, 64, 32)))


@pytest.fixture(scope="module")
def video() -> bytes:
    return clip(20, b_frames=2)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(DecodeLimits(), f"{RESIZES}:crop") as shared:
        yield shared


def source(data: bytes, uri: str = "u") -> Source:
    return Source(uri, len(data), data=data)


def plan(width: int, height: int, *indices: int) -> PartPlan:
    return PartPlan(segment=0, frame_indices=indices or (0,), width_px=width, height_px=height)


def decode_video(decoder: Decoder, data: bytes) -> np.ndarray:
    decoder.open(source(data), "video")
    (frames,) = decoder.decode([plan(96, 64, 0, 7, 19)])
    return frames


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_one_child_decodes_one_medium_after_the_other(decoder, video):
    header = decoder.open(source(PICTURE), "image")
    assert (header.width_px, header.height_px) == (64, 32)
    (picture,) = decoder.decode([plan(64, 32)])
    np.testing.assert_array_equal(picture[0], moving_picture(1, 64, 32))
    child = decoder.child_pid

    frames = decode_video(decoder, video)
    expected = list(all_frames(video))
    np.testing.assert_array_equal(frames, [expected[i] for i in (0, 7, 19)])

    assert decoder.open(source(pdf((100, 50), (50, 50))), "document", dpi=72).page_sizes_px == (
        (100, 50),
        (50, 50),
    )
    pages = decoder.decode([plan(32, 32, 1), plan(64, 32, 0)])
    assert [p.shape for p in pages] == [(1, 32, 32, 3), (1, 32, 64, 3)]
    assert decoder.child_pid == child


def test_parts_of_one_video_may_be_asked_for_one_by_one(decoder, video):
    decoder.open(source(video), "video")
    expected = list(all_frames(video))
    for indices in ((0, 1), (18, 19), (3, 4)):
        (frames,) = decoder.decode([plan(96, 64, *indices)])
        np.testing.assert_array_equal(frames, [expected[i] for i in indices])


def test_a_file_on_disk_is_decoded_as_its_bytes_are(decoder, video, tmp_path):
    file = tmp_path / "clip.png"
    file.write_bytes(video)
    etag = local_etag(file.stat())
    on_disk = Source("u", len(video), path=str(file), live_etag=etag)
    decoder.open(on_disk, "video")
    (frames,) = decoder.decode([plan(96, 64, 0, 7, 19)])
    np.testing.assert_array_equal(frames, decode_video(decoder, video))


def test_a_file_that_changes_while_it_is_decoded_is_a_failure(decoder, video, tmp_path):
    file = tmp_path / "clip.mp4"
    file.write_bytes(video)
    on_disk = Source("u", len(video), path=str(file), live_etag=local_etag(file.stat()))
    decoder.open(on_disk, "video")
    os.utime(file, ns=(1, 1))
    with pytest.raises(ChangedMediaError, match="while it was read"):
        decoder.decode([plan(96, 64, 0, 7)])
    file.unlink()
    with pytest.raises(ChangedMediaError, match="any more"):
        decoder.open(on_disk, "video")


def test_texts_are_read_as_texts(decoder):
    decoder.open(source("Grüße".encode()), "text")
    assert decoder.text() == "Grüße"
    decoder.open(source(b" \n"), "text")
    with pytest.raises(EmptyMediaError):
        decoder.text()
    decoder.open(source(b"a" * (1 << 20) + b"b"), "text")
    with pytest.raises(LimitExceededError, match="1048577 bytes"):
        decoder.text()
    decoder.open(source(b"caf\xe9 au lait"), "text")
    with pytest.raises(CorruptMediaError):
        decoder.text()


@pytest.mark.parametrize(
    ("kind", "data", "found"),
    [
        ("image", b"just words", "text"),
        ("text", PICTURE, "image"),
        ("video", PICTURE, "image"),
        ("document", PICTURE, "image"),
        ("image", pdf((10, 10)), "document"),
        ("mixed", pdf((10, 10)), "document"),
        ("video", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n", "text"),
    ],
)
def test_bytes_of_another_kind_are_a_mismatch_that_names_both(decoder, kind, data, found):
    with pytest.raises(KindMismatchError, match=f"says {kind}, the bytes are {found}"):
        decoder.open(source(data), kind)


def test_mixed_media_say_what_they_are(decoder, video):
    assert decoder.open(source(PICTURE), "mixed").kind == "image"
    assert decoder.open(source(video), "mixed").kind == "video"
    with pytest.raises(CorruptMediaError, match="image or video"):
        decoder.open(source(b"\0\1\2\3" * 100), "mixed")


def test_a_corrupt_unit_leaves_the_child_and_its_neighbours_alone(decoder, video):
    before = decode_video(decoder, video)
    child = decoder.child_pid
    with pytest.raises(CorruptMediaError, match="u: "):
        decoder.open(source(video[:60] + bytes(2000)), "video")
    decoder.open(source(PICTURE[:-60]), "image")
    with pytest.raises(CorruptMediaError, match="runcated"):
        decoder.decode([plan(64, 32)])
    np.testing.assert_array_equal(decode_video(decoder, video), before)
    assert decoder.child_pid == child


def test_limits_cross_to_the_child():
    with Decoder(DecodeLimits(max_image_px=1000), f"{RESIZES}:crop") as small:
        with pytest.raises(LimitExceededError):
            small.open(source(PICTURE), "image")
        with pytest.raises(LimitExceededError):
            small.open(source(pdf((100, 100))), "document")


def failing(resize: str, video: bytes, **limits: float) -> tuple[Exception, float]:
    """Return how decoding with a resize ends, and that the next unit is well."""
    with Decoder(DecodeLimits(**limits), f"{RESIZES}:{resize}") as one:
        one.open(source(PICTURE), "image")
        child = one.child_pid
        started = time.monotonic()
        with pytest.raises(Exception) as caught:  # noqa: PT011  (what it is, the tests check)
            decode_video(one, video)
        took_s = time.monotonic() - started
        assert gone_within(child, 2)
        one.open(source(PICTURE), "image")
        assert one.child_pid != child
        (picture,) = one.decode([plan(64, 32)])
        np.testing.assert_array_equal(picture[0], moving_picture(1, 64, 32))
    return caught.value, took_s


def test_the_time_limit_kills(video):
    error, took_s = failing("hang", video, timeout_s=1)
    assert isinstance(error, DecoderKilledError)
    assert "time limit of 1 s" in error.reason
    assert took_s < 30


def test_the_memory_limit_kills(video):
    error, _ = failing("devour", video, memory_bytes=400 << 20)
    assert isinstance(error, DecoderKilledError)
    assert "the limit is 400 MiB" in error.reason


def test_a_crash_names_the_signal(video):
    error, _ = failing("crash", video)
    assert isinstance(error, DecoderKilledError)
    assert "SIGSEGV" in error.reason


@pytest.mark.parametrize(
    ("resize", "reason"),
    [
        ("leave", "status 7"),
        ("lie_about_place", "not asked for"),
        ("lie_about_length", "4294967295 bytes"),
        ("no_json", "not JSON"),
    ],
)
def test_a_decoder_that_was_taken_over_costs_its_unit_only(video, resize, reason):
    error, took_s = failing(resize, video)
    assert isinstance(error, DecoderKilledError)
    assert reason in error.reason
    assert took_s < 30


def test_a_bug_of_ours_is_no_failure_of_the_unit(video):
    error, _ = failing("mistake", video)
    assert isinstance(error, DecoderBugError)
    assert "a bug of ours" in str(error)
    with (
        Decoder(DecodeLimits(), f"{RESIZES}:no_such_function") as one,
        pytest.raises(DecoderBugError, match="no_such_function"),
    ):
        one.open(source(video), "video")


def test_killed_from_outside_in_the_middle(video):
    with Decoder(DecodeLimits(), f"{RESIZES}:hang") as one:
        one.open(source(video), "video")
        threading.Timer(0.3, os.kill, (one.child_pid, signal.SIGKILL)).start()
        with pytest.raises(DecoderKilledError, match="SIGKILL"):
            one.decode([plan(96, 64, 0, 1)])


def test_killed_between_two_units_costs_nothing(video):
    with Decoder(DecodeLimits(), f"{RESIZES}:crop") as one:
        one.open(source(PICTURE), "image")
        os.kill(one.child_pid, signal.SIGKILL)
        time.sleep(0.2)
        assert decode_video(one, video).shape == (3, 64, 96, 3)


def test_the_child_outlives_the_thread_that_opened_a_medium(video):
    with Decoder(DecodeLimits(), f"{RESIZES}:crop") as one:
        opening = threading.Thread(target=one.open, args=(source(video), "video"))
        opening.start()
        opening.join()
        time.sleep(0.2)
        (frames,) = one.decode([plan(96, 64, 0, 7, 19)])
    assert frames.shape == (3, 64, 96, 3)


def test_the_child_has_no_secret(video, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("HF_TOKEN", "hidden")
    error, _ = failing("tell_environment", video)
    assert "PATH" in str(error)
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "hidden"} & set(str(error).split())


def test_the_child_prints_nothing(video, capfd):
    with Decoder(DecodeLimits(), f"{RESIZES}:chatter") as one:
        assert decode_video(one, video).shape == (3, 64, 96, 3)
    assert capfd.readouterr() == ("", "")


def test_the_child_leaves_no_core_dump():
    with Decoder(DecodeLimits(), f"{RESIZES}:crop") as one:
        one.open(source(PICTURE), "image")
        limits = Path(f"/proc/{one.child_pid}/limits").read_text()
    (line,) = (row for row in limits.splitlines() if row.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]


def test_the_child_ends_when_its_pipe_is_closed():
    child = ChildProcess(1 << 30)
    child._requests.close()
    try:
        assert child._process.wait(timeout=10) == 0
    finally:
        child.kill()


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_ends_with_its_parent(busy, tmp_path, video):
    (tmp_path / "clip.mp4").write_bytes(video)
    program = textwrap.dedent(f"""
        import os, threading, time
        from qvl_batch.media.decoder import DecodeLimits, Decoder
        from qvl_batch.media.fetch import Source
        from qvl_batch.units import PartPlan
        decoder = Decoder(DecodeLimits(), "{RESIZES}:hang")
        data = open({str(tmp_path / "clip.mp4")!r}, "rb").read()
        decoder.open(Source("u", len(data), data=data), "video")
        print(decoder.child_pid, flush=True)
        if {busy}:
            decoder.decode([PartPlan(segment=0, frame_indices=(0,), width_px=96, height_px=64)])
        time.sleep(600)
    """)
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        child = int(parent.stdout.readline())
        assert alive(child)
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert gone_within(child, 5)
