"""Planned frames equal those of decoding everything; what is no video is refused."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.media.video import Packet, VideoMedium, plan_runs
from qvl_batch.units import PartPlan
from tests.media.clips import all_frames, clip, with_rotation
from tests.media.resizes import crop

OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=10:min-keyint=10:scenecut=0"}
PYRAMID = {"x264-params": "b-pyramid=normal:ref=4:bframes=4:b-adapt=0"}
# 40 gaps between 5 and 300 ms.
UNEVEN_MS = list(itertools.accumulate((i * 7919) % 296 + 5 for i in range(40)))

CLIPS = {
    "no B-frames": lambda: clip(),
    "B-frames": lambda: clip(b_frames=3),
    "B-pyramid": lambda: clip(60, b_frames=4, options=PYRAMID),
    "open GOP": lambda: clip(60, b_frames=3, options=OPEN_GOP),
    "open GOP in a transport stream": lambda: clip(
        60, b_frames=3, options=OPEN_GOP, container="mpegts"
    ),
    "one long GOP": lambda: clip(100, gop=250, b_frames=2),
    "only keyframes": lambda: clip(30, gop=1),
    "variable rate": lambda: clip(40, times=UNEVEN_MS, b_frames=2),
    "odd size": lambda: clip(30, size=(97, 65), pix_fmt="yuv444p", b_frames=2),
    "transport stream": lambda: clip(container="mpegts", b_frames=2),
    "transport stream, MPEG-2": lambda: clip(
        container="mpegts", codec="mpeg2video", fps=25, b_frames=2
    ),
    "Matroska": lambda: clip(container="matroska", b_frames=2),
    "WebM": lambda: clip(
        30, container="webm", codec="libvpx", options={"deadline": "realtime", "cpu-used": "8"}
    ),
    "AVI, MPEG-4 with B-frames": lambda: clip(container="avi", codec="mpeg4", b_frames=2),
    "AVI without presentation times": lambda: clip(container="avi", b_frames=2),
    "no keyframe but the first": lambda: clip(
        60, options={"x264-params": "intra-refresh=1:keyint=10:bframes=0"}
    ),
}


def opened(data: bytes, max_image_px: int = 10**6) -> VideoMedium:
    return VideoMedium(io.BytesIO(data), uri="v", max_image_px=max_image_px, resize=crop)


def plan(indices: list[int], size: tuple[int, int]) -> PartPlan:
    return PartPlan(segment=0, frame_indices=tuple(indices), width_px=size[0], height_px=size[1])


def decoded(medium: VideoMedium, *index_lists: list[int]) -> list[list[np.ndarray]]:
    size = medium.header.width_px, medium.header.height_px
    parts = [[None] * len(indices) for indices in index_lists]
    for part, position, frame in medium.decode([plan(i, size) for i in index_lists]):
        assert parts[part][position] is None
        parts[part][position] = frame
    return parts


@pytest.mark.parametrize("name", CLIPS)
def test_planned_frames_equal_those_of_decoding_everything(name):
    data = CLIPS[name]()
    expected = list(all_frames(data))
    medium = opened(data)
    assert medium.header.num_frames == len(expected)
    n = len(expected)
    sparse = [round(i * (n - 1) / 6) for i in range(7)]
    close = [n // 2, n // 2 + 1, n // 2 + 2]
    for indices in (sparse, close, [n - 1], [0], list(range(n))):
        (frames,) = decoded(medium, indices)
        for index, frame in zip(indices, frames, strict=True):
            np.testing.assert_array_equal(frame, expected[index], err_msg=f"frame {index}")


def test_the_picture_of_a_frame_is_the_one_that_was_encoded():
    # The left edge of the white square tells the frame number without any decoder.
    medium = opened(CLIPS["B-frames"]())
    (frames,) = decoded(medium, [0, 17, 39])
    left = [int(np.argmax(frame[8, :, :].min(axis=-1) > 200)) for frame in frames]
    np.testing.assert_allclose(left, [n * 3 % 84 for n in (0, 17, 39)], atol=2)


def test_several_parts_are_decoded_in_one_pass_and_may_overlap():
    data = CLIPS["B-frames"]()
    expected = list(all_frames(data))
    parts = decoded(opened(data), [0, 10, 20], [20, 20, 39], [5])
    for indices, frames in zip(([0, 10, 20], [20, 20, 39], [5]), parts, strict=True):
        for index, frame in zip(indices, frames, strict=True):
            np.testing.assert_array_equal(frame, expected[index])


def test_frames_are_resized_one_by_one_to_the_size_of_their_part():
    medium = opened(CLIPS["no B-frames"]())
    plans = [plan([3, 4], (64, 32)), plan([4], (32, 64))]
    shapes = sorted((part, frame.shape) for part, _, frame in medium.decode(plans))
    assert shapes == [(0, (32, 64, 3)), (0, (32, 64, 3)), (1, (64, 32, 3))]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_to_header_and_frames(degrees):
    upright = clip(12)
    expected = [np.rot90(frame, degrees // 90) for frame in all_frames(upright)]
    medium = opened(with_rotation(upright, degrees))
    assert (medium.header.height_px, medium.header.width_px) == expected[0].shape[:2]
    (frames,) = decoded(medium, [0, 7, 11])
    for index, frame in zip((0, 7, 11), frames, strict=True):
        np.testing.assert_array_equal(frame, expected[index])


def test_rate_is_the_containers_average():
    assert opened(clip(20, fps=24)).header.fps == 24.0
    uneven = opened(CLIPS["variable rate"]()).header
    assert uneven.fps == pytest.approx(40 / (sum(np.diff(UNEVEN_MS)) / 1000), rel=0.05)
    assert uneven.duration_s == pytest.approx(40 / uneven.fps)


def test_a_file_whose_last_frames_are_missing_is_what_is_left_of_it():
    whole = clip(60, b_frames=2, mux={"movflags": "faststart"})
    cut = whole[: len(whole) * 6 // 10]
    expected = list(all_frames(cut))
    medium = opened(cut)
    assert 20 < medium.header.num_frames == len(expected) < 50
    (frames,) = decoded(medium, list(range(len(expected))))
    for frame, wanted in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame, wanted)


def test_damage_in_the_middle_fails():
    data = bytearray(clip(60, mux={"movflags": "faststart"}))
    middle = len(data) // 2
    data[middle : middle + 800] = bytes(800)
    medium = opened(bytes(data))
    with pytest.raises(CorruptMediaError, match="Invalid"):
        decoded(medium, list(range(60)))


def test_without_its_index_a_file_is_corrupt():
    data = clip(20)
    with pytest.raises(CorruptMediaError):
        opened(data[: data.index(b"moov")])


def test_sound_alone_is_no_video():
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(CorruptMediaError, match="no video stream"):
        opened(file.getvalue())


def test_frames_above_the_limit_are_refused():
    with pytest.raises(LimitExceededError, match="96x64"):
        opened(clip(4), max_image_px=96 * 64 - 1)


def packets(*pts_and_keys: tuple[int, bool]) -> list[Packet]:
    return [Packet(pts, None, is_key) for pts, is_key in pts_and_keys]


def test_a_run_goes_from_the_keyframe_to_the_last_wanted_picture():
    stream = packets((0, True), (2, False), (1, False), (3, True), (5, False), (4, False))
    assert [(r.first, r.last) for r in plan_runs(stream, [1])] == [(0, 2)]
    assert [(r.first, r.last) for r in plan_runs(stream, [5])] == [(3, 4)]
    assert [(r.first, r.last) for r in plan_runs(stream, [2, 4])] == [(0, 1), (3, 5)]
    assert plan_runs(stream, [3])[0].wanted == {3}


def test_a_picture_shown_before_its_keyframe_needs_the_group_before():
    # Open group: 2 and 3 are coded after keyframe 4 but shown before it.
    stream = packets((0, True), (1, False), (4, True), (2, False), (3, False), (5, False))
    assert [(r.first, r.last) for r in plan_runs(stream, [3])] == [(0, 4)]
    assert [(r.first, r.last) for r in plan_runs(stream, [3, 5])] == [(0, 5)]
    assert [(r.first, r.last) for r in plan_runs(stream, [5])] == [(2, 5)]
