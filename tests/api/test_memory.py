"""Memory of preprocessing a long 4K video, in the decoding child and in the process that asks."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from qvl_batch.demo.checkpoint import embedding_dir

GB = 10**9
# In a process of its own: this one may have been large before. The first clip is small, so that
# what it leaves behind is the imports; VmHWM is the largest resident size so far.
SCRIPT = """
import json, sys
from pathlib import Path
import qvl_batch.model.engine
from qvl_batch.api.inputs import parse_item
from qvl_batch.api.reader import ItemReader
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.storage import Storage

def memory(pid, field):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def look():
    pids = {"parent": "self", "child": reader._decoder.child_pid}
    return {
        f"{who} {field}": memory(pid, field)
        for who, pid in pids.items() for field in ("VmRSS", "VmHWM")
    }

small, large, model = map(Path, sys.argv[1:])
reader = ItemReader(PromptTokenizer(model, max_tokens=32_768), storage=Storage())
reader.read(parse_item(small))
before = look()
(vision,) = reader.read(parse_item(large)).videos
print(json.dumps({"shape": vision.pixels.shape, "before": before, "after": look()}))
"""


def write_video(path: Path, size: tuple[int, int], num_frames: int) -> None:
    """One frame a second, each of one grey: nothing costs time but the pixels themselves."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            planes = np.full((size[1] * 3 // 2, size[0]), 128, np.uint8)
            planes[: size[1]] = 16 + 3 * number
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("4k")
    write_video(folder / "small.mp4", (64, 64), 4)
    write_video(folder / "large.mp4", (3840, 2160), 70)
    places = [folder / "small.mp4", folder / "large.mp4", embedding_dir()]
    command = [sys.executable, "-c", SCRIPT, *map(str, places)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.full
@pytest.mark.parametrize("who", ["child", "parent"])
def test_a_64_frame_4k_video_takes_less_than_1_gb_over_imports(measured, who):
    frames, height, width, _ = measured["shape"]
    assert frames == 64
    assert height * width > 500_000
    peak = measured["after"][f"{who} VmHWM"] - measured["before"][f"{who} VmRSS"]
    print(f"{who}: {peak / 2**20:.0f} MiB over imports")
    assert peak < GB
    # What is asked for is really measured: the frames themselves lie in the parent.
    if who == "parent":
        assert peak > frames * height * width * 3
