"""Frame resizing of every temper: what a decoder may do inside the child, by import path."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import struct
import time

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]


def crop(frame: Frame, height_px: int, width_px: int) -> Frame:
    return np.ascontiguousarray(frame[:height_px, :width_px])


def hang(frame: Frame, height_px: int, width_px: int) -> Frame:
    time.sleep(600)
    return crop(frame, height_px, width_px)


def devour(frame: Frame, height_px: int, width_px: int) -> Frame:
    held = []
    for _ in range(400):
        held.append(np.ones(10 << 20, np.uint8))
        time.sleep(0.01)
    return crop(frame, height_px, width_px)


def crash(frame: Frame, height_px: int, width_px: int) -> Frame:
    os.kill(os.getpid(), signal.SIGSEGV)
    return crop(frame, height_px, width_px)


def leave(frame: Frame, height_px: int, width_px: int) -> Frame:
    os.write(_answers(), b"\x20\x00")
    os._exit(7)


def chatter(frame: Frame, height_px: int, width_px: int) -> Frame:
    print("a library prints", flush=True)
    os.write(1, b"and writes to descriptor 1\n")
    os.write(2, b"and to 2\n")
    return crop(frame, height_px, width_px)


def mistake(frame: Frame, height_px: int, width_px: int) -> Frame:
    raise KeyError("a bug of ours")


def tell_environment(frame: Frame, height_px: int, width_px: int) -> Frame:
    raise KeyError(" ".join(sorted(os.environ)))


def lie_about_place(frame: Frame, height_px: int, width_px: int) -> Frame:
    return _say(b'{"type":"frame","part":[0],"position":{}}')


def lie_about_length(frame: Frame, height_px: int, width_px: int) -> Frame:
    os.write(_answers(), struct.pack("<IQ", 0xFFFFFFFF, 0))
    time.sleep(600)
    return frame


def no_json(frame: Frame, height_px: int, width_px: int) -> Frame:
    return _say(b"cposix\nsystem\n(S'true'\ntR.")


def _say(header: bytes) -> Frame:
    os.write(_answers(), struct.pack("<IQ", len(header), 0) + header)
    time.sleep(600)
    raise AssertionError("the parent should have ended this")


def _answers() -> int:
    """The pipe to the parent."""
    for name in os.listdir("/proc/self/fd"):
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(int(name)).st_mode)
            mode = fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:
            continue
        if is_pipe and mode == os.O_WRONLY:
            return int(name)
    raise AssertionError("no pipe to the parent")
