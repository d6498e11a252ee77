"""An HTTP proxy in front of an S3 server that makes faults, by seed.

    python -m tests.faults.proxy http://127.0.0.1:9000 SEED RATE

Prints ``ready URL`` once it listens and ends when its standard input closes. RATE is the share of
the requests that meet a fault, all kinds alike. ``GET /-/faults`` returns how many of each kind
were made, and ``requests``, as JSON, and starts again from nothing; ``POST /-/rate/0.05`` changes
the rate.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# `late-500` and `cut` come after the server has done what it was asked: a write that succeeded and
# is not acknowledged.
KINDS = ("503", "500", "late-500", "reset", "cut", "delay", "truncate")
LONGEST_DELAY_S = 1.0
_OF_A_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}
_ERROR = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code>"
    "<Message>Made by the fault proxy.</Message></Error>"
)


class Faults:
    """Decides which request meets which fault, and counts them."""

    def __init__(self, seed: int, rate: float) -> None:
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self._counts: Counter[str] = Counter()
        self.rate = rate

    def next(self) -> tuple[str, float]:
        """Return a kind, or ``''``, and how long a delay is in seconds."""
        with self._lock:
            kind = self._rng.choice(KINDS) if self._rng.random() < self.rate else ""
            self._counts[kind or "none"] += 1
            self._counts["requests"] += 1
            return kind, self._rng.uniform(0.1, LONGEST_DELAY_S)

    def take_counts(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one to the server behind it."""

    protocol_version = "HTTP/1.1"
    upstream: str
    faults: Faults
    _behind: http.client.HTTPConnection | None = None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding"):
            self._answer(501, {}, b"the fault proxy takes no chunked bodies")
            return
        if self.path.startswith("/-/"):
            self._control()
            return
        kind, delay_s = self.faults.next()
        if kind in ("503", "500"):
            code = "SlowDown" if kind == "503" else "InternalError"
            self._answer(int(kind), {"Content-Type": "application/xml"}, _error(code))
            return
        if kind == "reset":
            self._reset()
            return
        if kind == "delay":
            time.sleep(delay_s)
        status, headers, answer = self._ask(body)
        if kind == "late-500":
            self._answer(500, {"Content-Type": "application/xml"}, _error("InternalError"))
        elif kind == "cut":
            self._reset()
        elif kind == "truncate" and answer:
            self._answer(status, headers, answer, sent=len(answer) // 2)
            self._reset()
        else:
            self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_A_HOP}
        for attempt in range(2):
            if self._behind is None:
                self._behind = http.client.HTTPConnection(self.upstream, timeout=60)
            try:
                self._behind.request(self.command, self.path, body, headers)
                response = self._behind.getresponse()
                answer = response.read()
                kept = {k: v for k, v in response.getheaders() if k.lower() not in _OF_A_HOP}
                return response.status, kept, answer
            except (http.client.RemoteDisconnected, ConnectionError):
                # A connection that the server has closed while it was idle.
                self._behind.close()
                self._behind = None
                if attempt:
                    raise
        raise AssertionError("unreachable")

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None
    ) -> None:
        self.send_response_only(status)
        names = {name.lower() for name in headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in names and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def _reset(self) -> None:
        self.wfile.flush()
        # Closing with a linger time of 0 sends a RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        if self._behind is not None:
            self._behind.close()
        try:
            super().finish()
        except (OSError, ValueError):
            return

    def _control(self) -> None:
        if self.path.startswith("/-/rate/"):
            self.faults.rate = float(self.path.rsplit("/", 1)[1])
        counts = json.dumps(self.faults.take_counts()).encode()
        self._answer(200, {"Content-Type": "application/json"}, counts)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients leave when they are reset."""


def _error(code: str) -> bytes:
    return _ERROR.format(code=code).encode()


if __name__ == "__main__":
    Handler.upstream = urlsplit(sys.argv[1]).netloc
    Handler.faults = Faults(int(sys.argv[2]), float(sys.argv[3]))
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"ready http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
