"""Videos: the frame table from the packets, then only the planned frames, in one pass.

Frames are addressed by their place in presentation order. Between a group of pictures' keyframe and
its last wanted frame only what is needed is decoded: pictures that no other picture refers to are
skipped unless they are wanted. The pixels equal those of decoding everything from the start.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.units import Header, PartPlan

Resize = Callable[[npt.NDArray[np.uint8], int, int], npt.NDArray[np.uint8]]

# Only containers of media proper: a playlist or a session description (m3u8, ffconcat, SDP, DASH)
# makes FFmpeg open other files and sockets. Nor may a container open anything by a protocol.
OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,avi",
    "protocol_whitelist": "none",
}
_BUFFER_BYTES = 1 << 18
# What PyAV raises on malformed input: FFmpeg's errors, Python's own for values that no frame,
# rate or time may have, and those of reading the file.
_LIBRARY_ERRORS = (av.error.FFmpegError, OSError, ValueError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Packet:
    """One coded picture, in decoding order."""

    pts: int | None
    dts: int | None
    is_key: bool
    # An edit list hides pictures that others still refer to.
    is_shown: bool = True
    # Its bytes are incomplete: where the file ends early, or a transport stream lost some.
    is_damaged: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Packets [first, last] in decoding order, from a keyframe to the last wanted picture."""

    first: int
    last: int
    wanted: frozenset[int]


def plan_runs(packets: Sequence[Packet], wanted: Sequence[int]) -> list[Run]:
    """Return what to decode for the wanted pts.

    A picture shown before the keyframe that precedes it in decoding order (open group of pictures)
    may refer to the group before, so decoding starts there.

    Args:
        packets: All packets, each with its own pts; the first is a keyframe.
        wanted: Pts among those of the packets.

    Returns:
        Disjoint runs in decoding order.
    """
    place = {packet.pts: i for i, packet in enumerate(packets)}
    keys = [i for i, packet in enumerate(packets) if packet.is_key]
    targets: dict[int, set[int]] = defaultdict(set)
    for pts in wanted:
        group = bisect_right(keys, place[pts]) - 1
        while group > 0 and pts < packets[keys[group]].pts:
            group -= 1
        targets[keys[group]].add(pts)
    runs: list[Run] = []
    for first in sorted(targets):
        pts_set = targets[first]
        last = max(place[pts] for pts in pts_set)
        if runs and first <= runs[-1].last:
            before = runs.pop()
            first, last = before.first, max(last, before.last)
            pts_set = pts_set | before.wanted
        runs.append(Run(first, last, frozenset(pts_set)))
    return runs


class VideoMedium:
    """An opened video.

    Args:
        file: Its bytes, seekable; stays open while the medium is used. Never a name: FFmpeg would
            take it for a URL.
        uri: For messages.
        max_image_px: Frames with more pixels than this are refused.
        resize: Maps (uint8 RGB frame, height_px, width_px) to the resized frame.

    Raises:
        CorruptMediaError: If it can not be opened, has no video stream or no decodable frame.
        LimitExceededError: If its frames are too large.
    """

    def __init__(self, file: BinaryIO, *, uri: str, max_image_px: int, resize: Resize) -> None:
        self._file, self._uri, self._resize = file, uri, resize
        self._max_image_px = max_image_px
        self._container = self._stream = None
        try:
            self._open()
            self._packets, first_frame = self._index()
            self._by_order = self._numbered()
            if self._by_order:
                num_frames = sum(1 for _ in self._sequential())
            else:
                self._pts = sorted(packet.pts for packet in self._packets if packet.is_shown)
                num_frames = len(self._pts)
        except _LIBRARY_ERRORS as error:
            raise CorruptMediaError(uri, _reason(error)) from None
        if not num_frames:
            raise CorruptMediaError(uri, "no frame is shown, or none is complete")
        rotation = _quarter_turns(first_frame)
        width, height = first_frame.width, first_frame.height
        if rotation % 2:
            width, height = height, width
        fps = self._average_fps(num_frames)
        self.header = Header(
            kind="video",
            width_px=width,
            height_px=height,
            num_frames=num_frames,
            fps=fps,
            duration_s=num_frames / fps if fps > 0 else 0.0,
        )

    def decode(self, plans: Sequence[PartPlan]) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
        """Yield (part, frame of the part, uint8 RGB of shape (height_px, width_px, 3)).

        Frames come as they are decoded, not in the order of the plans; each exactly once.

        Raises:
            CorruptMediaError: If a wanted frame can not be decoded.
        """
        uses: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for part, plan in enumerate(plans):
            for position, index in enumerate(plan.frame_indices):
                if not 0 <= index < self.header.num_frames:
                    raise ValueError(f"frame {index} of {self.header.num_frames} was planned")
                uses[index].append((part, position))
        for index, pixels in self._rgb_frames(sorted(uses)):
            resized: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
            for part, position in uses[index]:
                size = plans[part].height_px, plans[part].width_px
                if size not in resized:
                    resized[size] = self._resize(pixels, *size)
                yield part, position, resized[size]

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None

    def _open(self) -> None:
        """Open the container at its start."""
        self.close()
        self._file.seek(0)
        self._container = av.open(
            self._file, options=OPEN_OPTIONS, metadata_errors="ignore", buffer_size=_BUFFER_BYTES
        )
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise CorruptMediaError(self._uri, "no video stream")
        context = self._stream.codec_context
        if context is None:
            raise CorruptMediaError(self._uri, "no decoder for the video stream")
        self._check_px(context.width, context.height)
        # One actor is one core: threads inside the decoder cost CPU time and gain nothing.
        context.thread_count = 1

    def _check_px(self, width: int, height: int) -> None:
        if width * height > self._max_image_px:
            raise LimitExceededError(
                self._uri, f"frames of {width}x{height} px, the limit is {self._max_image_px} px"
            )

    def _index(self) -> tuple[list[Packet], av.VideoFrame]:
        """Return all packets from the first keyframe on, and the first frame decoded of them."""
        packets: list[Packet] = []
        first_frame: av.VideoFrame | None = None
        failure = "no frame"
        for packet in self._container.demux(self._stream):
            if packet.size and (packets or packet.is_keyframe):
                shown = not packet.is_discard
                packets.append(
                    Packet(packet.pts, packet.dts, packet.is_keyframe, shown, packet.is_corrupt)
                )
            if first_frame is None and (packets or not packet.size):
                try:
                    first_frame = next(iter(packet.decode()), None)
                except av.error.FFmpegError as error:
                    # A recording may begin with pictures that refer to what was cut off.
                    failure = _reason(error)
        if first_frame is None:
            raise CorruptMediaError(self._uri, f"no frame can be decoded: {failure}")
        while packets and packets[-1].is_damaged:
            # The file is cut: what is there of it counts.
            packets.pop()
        return packets, first_frame

    def _numbered(self) -> bool:
        """Whether frames can only be told by their order.

        That is so where a pts is missing or stands twice, and in AVI, which stores none: what
        FFmpeg states there are decoding times.
        """
        if self._container.format.name == "avi":
            return True
        pts = [packet.pts for packet in self._packets]
        return None in pts or len(set(pts)) < len(pts)

    def _average_fps(self, num_frames: int) -> float:
        """Return the container's average rate, as the official decoders report it."""
        if self._stream.average_rate:
            return float(self._stream.average_rate)
        if self._stream.guessed_rate:
            return float(self._stream.guessed_rate)
        if self._stream.duration and self._stream.time_base:
            return num_frames / float(self._stream.duration * self._stream.time_base)
        return 0.0

    def _rgb_frames(self, indices: list[int]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield (index, upright uint8 RGB frame at full size)."""
        try:
            for index, frame in self._wanted_frames(indices):
                self._check_px(frame.width, frame.height)
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=_quarter_turns(frame))
                yield index, np.ascontiguousarray(pixels)
        except _LIBRARY_ERRORS as error:
            raise CorruptMediaError(self._uri, _reason(error)) from None

    def _wanted_frames(self, indices: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        if self._by_order:
            yield from self._in_order(indices)
            return
        index_of = {self._pts[index]: index for index in indices}
        missing = set(index_of)
        for frame in self._planned(list(index_of)):
            if frame.pts in missing:
                missing.discard(frame.pts)
                yield index_of[frame.pts], frame
        if missing:
            for pts, frame in self._next_frames(sorted(missing)):
                yield index_of[pts], frame

    def _in_order(self, indices: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        wanted = iter(indices)
        index = next(wanted, None)
        for number, frame in enumerate(self._sequential()):
            if index is None:
                return
            if number == index:
                yield index, frame
                index = next(wanted, None)
        if index is not None:
            raise CorruptMediaError(self._uri, f"frame {index} is missing")

    def _planned(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """Yield the decoded frames of the runs that hold the wanted pts, in no fixed order.

        A run whose keyframe the container does not find again is left out.
        """
        context = self._stream.codec_context
        for run in plan_runs(self._packets, wanted):
            key = self._packets[run.first]
            key_pts = key.pts
            # FFmpeg's index of a transport stream goes by dts, that of the others by pts.
            by_dts = self._container.format.name == "mpegts" and key.dts is not None
            self._container.seek(
                key.dts - 1 if by_dts else key_pts, stream=self._stream, backward=True
            )
            left, fed = set(run.wanted), -1
            for packet in self._container.demux(self._stream):
                if fed < 0:
                    if not packet.size:
                        break
                    if packet.pts != key_pts:
                        continue
                fed = run.first if fed < 0 else fed + 1
                context.skip_frame = "DEFAULT" if packet.pts in run.wanted else "NONREF"
                for frame in packet.decode():
                    left.discard(frame.pts)
                    yield frame
                if not left or not packet.size:
                    break
                if fed >= run.last:
                    # All references are in: the rest only waits for the decoder's reordering.
                    yield from context.decode(None)
                    break
            context.skip_frame = "DEFAULT"

    def _next_frames(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield for every pts the first frame at or after it, decoding all from the start.

        For what the runs did not yield: streams without exact keyframes, pictures that are never
        shown (VP8's alternate references), or a damaged part.
        """
        waiting = sorted(wanted, reverse=True)
        for frame in self._sequential():
            while waiting and frame.pts is not None and frame.pts >= waiting[-1]:
                yield waiting.pop(), frame
            if not waiting:
                return
        index = bisect_right(self._pts, waiting[-1]) - 1
        raise CorruptMediaError(self._uri, f"frame {index} of {len(self._pts)} is missing")

    def _sequential(self) -> Iterator[av.VideoFrame]:
        """Yield all frames of the listed packets in presentation order, from a fresh start."""
        self._open()
        fed = 0
        for packet in self._container.demux(self._stream):
            if not packet.size or fed == len(self._packets):
                break
            if fed or packet.is_keyframe:
                yield from packet.decode()
                fed += 1
        yield from self._stream.codec_context.decode(None)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Return how many times to turn the frame by 90 degrees counter-clockwise."""
    return frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
