"""Serve S3 from memory on a free loopback port until standard input closes.

Prints ``ready http://127.0.0.1:PORT`` once it answers. A process of its own, so that its work does
not share an interpreter lock with the tests; it ends with them even when they are killed, since
that closes its standard input.
"""

import sys

from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
print(f"ready http://{host}:{port}", flush=True)
sys.stdin.read()
