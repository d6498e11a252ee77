"""Files made to make a decoder read other files, call servers, or wait for ever."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections.abc import Iterator

import av
import pytest

from qvl_batch.errors import CorruptMediaError, KindMismatchError, UnitError
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Source
from qvl_batch.media.video import VideoMedium
from tests.media.clips import clip
from tests.media.resizes import crop


@pytest.fixture(scope="module")
def video() -> bytes:
    return clip(10, container="mpegts")


@pytest.fixture
def web(video) -> Iterator[http.server.HTTPServer]:
    """A server that would gladly give a video, and remembers who asked."""

    class Giving(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(video)))
            self.end_headers()
            self.wfile.write(video)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Giving)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def traps(web, video, tmp_path, monkeypatch) -> dict[str, bytes]:
    """Playlists and descriptions that name a server and a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.ts").write_bytes(video)

    def hls(target: str) -> bytes:
        return (
            "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n"
            f"#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
        ).encode()

    return {
        "HLS to a server": hls(f"{web.url}/a.ts"),
        "HLS to a file": hls(f"file://{tmp_path}/local.ts"),
        "HLS to a name": hls("local.ts"),
        "concat of a name": b"ffconcat version 1.0\nfile local.ts\n",
        "concat of a server": f"ffconcat version 1.0\nfile {web.url}/a.ts\n".encode(),
        "SDP": (
            b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
            b"m=video 19701 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
        ),
        "DASH": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT1S"><Period><AdaptationSet><Representation id="1" '
            f'bandwidth="1"><BaseURL>{web.url}/a.mp4</BaseURL></Representation></AdaptationSet>'
            "</Period></MPD>"
        ).encode(),
    }


def test_the_traps_are_real(traps, web):
    # What the refusals below guard against: without the options, these open what they name.
    with av.open(io.BytesIO(traps["concat of a name"])) as container:
        assert next(container.decode(video=0)).width == 96
    # SDP is left out: it would wait for a sender.
    for name, data in traps.items():
        if name not in ("SDP", "concat of a name"):
            with pytest.raises((av.error.FFmpegError, IndexError, StopIteration)):
                next(av.open(io.BytesIO(data)).decode(video=0))


def test_the_demuxer_refuses_every_trap_at_once(traps, web):
    for name, data in traps.items():
        started = time.monotonic()
        with pytest.raises(CorruptMediaError):
            VideoMedium(io.BytesIO(data), uri=name, max_image_px=10**6, resize=crop)
        assert time.monotonic() - started < 5, name
    assert web.asked == []


@pytest.mark.parametrize("kind", ["video", "image", "document", "mixed"])
def test_the_decoder_sees_that_a_trap_is_no_medium(traps, web, kind):
    with Decoder(DecodeLimits(timeout_s=20), "tests.media.resizes:crop") as decoder:
        for data in traps.values():
            with pytest.raises(KindMismatchError):
                decoder.open(Source("trap", len(data), data=data), kind)
        assert decoder.child_pid is None
    assert web.asked == []


def test_a_trap_behind_the_first_bytes_of_a_video_is_refused(traps, web, video):
    # The start says MP4, so that it passes the look at its first bytes.
    start = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"
    with Decoder(DecodeLimits(timeout_s=20), "tests.media.resizes:crop") as decoder:
        for data in traps.values():
            with pytest.raises(UnitError):
                decoder.open(Source("trap", len(data) + 24, data=start + data), "video")
        good = decoder.open(Source("good", len(video), data=video), "video")
    assert good.num_frames == 10
    assert web.asked == []
