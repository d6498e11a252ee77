"""Like `serve_moto.py`, and counts the requests.

``GET /-/counts`` returns them as JSON, by method (a listing is ``LIST``), and starts again from
nothing.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

COUNTS_PATH = "/-/counts"


class Counted:
    """A WSGI application that counts what another one is asked."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._counts, self._lock = app, Counter[str](), threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == COUNTS_PATH:
            with self._lock:
                counts, self._counts = self._counts, Counter()
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(counts).encode()]
        is_list = environ["REQUEST_METHOD"] == "GET" and "list-type=" in environ["QUERY_STRING"]
        with self._lock:
            self._counts["LIST" if is_list else environ["REQUEST_METHOD"]] += 1
        return self._app(environ, start)


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: object) -> None:
        """Say nothing: a line a request costs more than the request."""


if __name__ == "__main__":
    app = Counted(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"ready http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
