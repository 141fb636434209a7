"""What reading S3's answer to a listing costs the processor, page by page; the server's part is in another process."""

import multiprocessing
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection

from ckptstore.objects.open import open_objects

KEYS = 1000
PAGES = 20
ROW = (
    "<Contents><Key>store/chunks/ab/{number:064x}/01hf3q4zj4v2y9</Key>"
    "<LastModified>2026-11-26T16:{minute:02d}:05.000Z</LastModified><ETag>&quot;{number:032x}&quot;</ETag>"
    "<Size>8388608</Size><StorageClass>STANDARD</StorageClass></Contents>"
)
PAGE = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>bucket</Name><Prefix>store/</Prefix><KeyCount>{keys}</KeyCount><MaxKeys>{keys}</MaxKeys>"
    "<IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
)


def page_seconds() -> float:
    """Seconds of processor time of this process for one page of 1,000 keys, as S3 lists them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{ours.recv()}"
        objects = open_objects("s3://bucket/store", {"key": "any", "secret": "any", "endpoint_url": endpoint})
        assert len(objects.list("chunks/")) == KEYS  # and what is made at the first request is made
        began = time.process_time()
        for _ in range(PAGES):
            objects.list("chunks/")
        return (time.process_time() - began) / PAGES
    finally:
        server.terminate()
        server.join()


def _serve(port: Connection) -> None:
    rows = "".join(ROW.format(number=number, minute=number % 60) for number in range(KEYS))
    answer = PAGE.format(keys=KEYS, rows=rows).encode()

    class Listing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        port.send(server.server_port)
        server.serve_forever()
