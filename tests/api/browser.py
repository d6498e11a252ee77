"""Headless Chromium on a local file, spoken to over two pipes: no port, no driver to install."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TIMEOUT_S = 60.0


class Page:
    """An opened page; `requests` holds every address that it asked for."""

    def __init__(self, requests_to: int, answers_from: int) -> None:
        self._to, self._from = requests_to, answers_from
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self._events: set[str] = set()
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, path: Path, *, width_px: int = 1280, dark: bool = False) -> None:
        """Load a file at a width and wait until all of it is there."""
        if self._session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Network", "Page", "Log"):
                self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=900,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _TIMEOUT_S
        while "Page.loadEventFired" not in self._events:
            self._read(deadline)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, run by the debugger, not by the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self._from, 1 << 16) if ready else b""
            if not chunk:
                raise RuntimeError("Chromium does not answer")
            self._buffer += chunk
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self._events.add(message["method"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
        return message


@contextmanager
def chromium() -> Iterator[Page]:
    """Run a browser without a window, network access of its own, or a profile that stays."""
    program = shutil.which("chromium")
    assert program is not None
    requests_from, requests_to = os.pipe()
    answers_from, answers_to = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as home:
        options = (
            "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--disable-background-networking --disable-component-update --disable-sync "
            f"--remote-debugging-pipe --user-data-dir={home}"
        )
        # The browser reads from descriptor 3 and answers on 4.
        line = f"exec {program} {options} 3<&{requests_from} 4>&{answers_to}"
        process = subprocess.Popen(
            ["bash", "-c", line],
            pass_fds=(requests_from, answers_to),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": home},
        )
        os.close(requests_from)
        os.close(answers_to)
        try:
            yield Page(requests_to, answers_from)
        finally:
            os.close(requests_to)
            os.close(answers_from)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
