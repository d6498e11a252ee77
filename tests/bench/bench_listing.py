"""Does listing a bucket keep memory bounded? Prints a table; run it by hand.

    python tests/bench/bench_listing.py [NUM_KEYS ...]

A loopback server in a process of its own makes up ListObjectsV2 pages, so nothing is stored. Every
line of the table is a fresh process; the growth of its peak resident memory is counted from behind
the imports and a first listing of 2,000 keys.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from urllib.parse import parse_qs, urlsplit

PAGE_KEYS = 1000
DEFAULT_SIZES = (10_000, 100_000, 1_000_000)
WARM_UP_KEYS = 2_000


class Pages(BaseHTTPRequestHandler):
    """Answers ``/keys-N?list-type=2``: N keys, 1,000 a page."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        num_keys = int(url.path.strip("/").removeprefix("keys-"))
        start = int(query.get("continuation-token", ["0"])[0])
        prefix = query.get("prefix", [""])[0]
        end = min(num_keys, start + int(query.get("max-keys", [PAGE_KEYS])[0]))
        if prefix not in ("", "media/"):
            end = start
        entries = "".join(
            f"<Contents><Key>media/dt%3D2026-01-{number % 28 + 1:02d}/image-{number:09d}.jpg</Key>"
            "<LastModified>2026-01-02T03:04:05.000Z</LastModified>"
            f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{100_000 + number % 977}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for number in range(start, end)
        )
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < num_keys else ""
        body = (
            f"<ListBucketResult><EncodingType>url</EncodingType>{entries}{more}"
            f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated></ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(port_to: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    port_to.send(server.server_port)
    server.serve_forever()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(step: str, port: int, num_keys: int, answer_to: Connection) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    from qvl_batch.media.listing import list_source
    from qvl_batch.media.manifest import build_manifest
    from qvl_batch.storage import Storage

    storage = Storage(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1")

    def run(count: int) -> int:
        source = f"s3://keys-{count}/media/"
        if step == "list":
            return sum(1 for _ in list_source(source, storage=storage))
        with tempfile.TemporaryDirectory() as folder:
            return build_manifest(source, f"{folder}/m.parquet", storage=storage).rows

    run(WARM_UP_KEYS)
    before, began = peak_mib(), time.monotonic()
    found = run(num_keys)
    answer_to.send((found, time.monotonic() - began, before, peak_mib() - before))


def main(sizes: list[int]) -> None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=serve, args=(there,), daemon=True)
    server.start()
    port = here.recv()
    print(f"{'step':<10}{'keys':>10}{'seconds':>10}{'base MiB':>10}{'peak growth MiB':>17}")
    for step in ("list", "manifest"):
        for num_keys in sizes:
            process = spawn.Process(target=measure, args=(step, port, num_keys, there))
            process.start()
            process.join()
            found, seconds, base, growth = here.recv() if here.poll(1) else (None, 0, 0, 0)
            if found != num_keys:
                sys.exit(f"{step} of {num_keys} keys found {found}")
            print(f"{step:<10}{num_keys:>10,}{seconds:>10.1f}{base:>10.0f}{growth:>17.1f}")
    server.terminate()


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or list(DEFAULT_SIZES))
