"""A save into a bucket that takes only so many requests a second. `python -m benchmarks.throttling`.

The server answers SlowDown to what comes faster, as S3 does for each prefix. Measured is how long the puts take, and
how many of them are refused on the way: each refused one has sent its content for nothing, and takes a share of what
others may ask.
"""

import argparse
import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

from ckptstore.objects.open import open_objects

MODES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "adaptive": {"config_kwargs": {"retries": {"mode": "adaptive", "max_attempts": 5}}},
}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Allowance:
    """So many requests a second, and at most those of one second at once."""

    rate: float
    left: float = 0.0
    seen: float = 0.0
    refused: int = 0

    def takes(self) -> bool:
        now = time.monotonic()
        self.left = min(self.rate, self.left + (now - self.seen) * self.rate)
        self.seen = now
        if self.left < 1:
            self.refused += 1
            return False
        self.left -= 1
        return True


def _serve(parent: Connection, rate: float) -> None:
    allowance, lock = Allowance(rate), threading.Lock()

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                taken = allowance.takes()
            body = b"" if taken else SLOW_DOWN
            self.send_response(200 if taken else 503)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"any"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    parent.send(server.server_port)
    parent.recv()
    parent.send(allowance.refused)


def measure(options: dict[str, Any], rate: float, puts: int, size: int) -> tuple[float, int]:
    """Seconds for the puts, and how many were refused and sent again."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, rate), daemon=True)
    server.start()
    try:
        place = {"key": "any", "secret": "any", "endpoint_url": f"http://127.0.0.1:{ours.recv()}"}
        objects = open_objects("s3://bucket/store", {**place, **options})
        objects.connect()
        content = bytes(size)
        began = time.perf_counter()
        with ThreadPoolExecutor(objects.request_threads) as threads:
            list(threads.map(lambda number: objects.put(f"chunks/{number}", content), range(puts)))
        seconds = time.perf_counter() - began
        ours.send("done")
        return seconds, ours.recv()
    finally:
        server.terminate()
        server.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throttling", description=__doc__)
    parser.add_argument("--puts", type=int, default=400, help="how many objects (400)")
    parser.add_argument("--size", type=int, default=100_000, help="bytes of each (100000)")
    parser.add_argument("--rates", type=float, nargs="*", default=(1e6, 50, 10), help="requests a second (1e6 50 10)")
    given = parser.parse_args()
    print("| requests a second | retries | s | at least s | refused |\n| ---: | --- | ---: | ---: | ---: |")
    for rate in given.rates:
        for mode, options in MODES.items():
            seconds, refused = measure(options, rate, given.puts, given.size)
            least = max(0.0, given.puts / rate - 1)
            print(f"| {rate:,.0f} | {mode} | {seconds:.1f} | {least:.1f} | {refused} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
