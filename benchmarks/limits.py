"""What the machine itself can do: memory, disk, one connection to the S3 server. Nothing of ours can be faster.

Each of the limits is that of the bytes of the LSTM's state: all of them in memory, those that are stored on the disk
and on the way to the bucket.
"""

import http.client
import os
import statistics
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.save import fsync
from benchmarks.states import work_folder
from benchmarks.timing import Report, Row
from ckptstore.chunk import digest
from ckptstore.pipeline import worker_threads

STATE_BYTES, STORED_BYTES = 115_368_028, 82_225_478
"""Of the LSTM's state after 100 steps."""
FILES = 4
"""As many as a save writes at a time on a local disk."""
OBJECT_BYTES = 8 * 2**20
QUESTION = f"limits: of this machine, for {STATE_BYTES / 1e6:.0f} MB in memory and {STORED_BYTES / 1e6:.0f} MB stored"


def ask(folder: Path, rounds: int) -> Report:
    """What memory, disk and one connection to the S3 server can do, without anything of ours."""
    threads = worker_threads()
    source = np.frombuffer(os.urandom(STATE_BYTES), np.uint8)
    copy = np.empty_like(source)
    copy[:] = 1  # touched, so that no page faults are in the figures
    measured: dict[str, tuple[int, Callable[[], object]]] = {
        "memcpy, one thread": (STATE_BYTES, lambda: np.copyto(copy, source)),
        f"memcpy, {threads} threads": (STATE_BYTES, lambda: _copied(source, copy, threads)),
        f"BLAKE3, {threads} threads": (STATE_BYTES, lambda: _hashed(source, threads)),
        "memcpy into new memory": (STATE_BYTES, lambda: source.copy()),
    }
    stored = source[:STORED_BYTES]
    with work_folder(folder) as work:
        measured |= {
            "write + fsync, one file": (STORED_BYTES, lambda: _written(work, stored, 1)),
            f"write + fsync, {FILES} files at a time": (STORED_BYTES, lambda: _written(work, stored, FILES)),
            "read of the page cache, one file": (STORED_BYTES, lambda: (work / "0").read_bytes()),
        }
        rows = [_row(name, count, act, rounds) for name, (count, act) in measured.items()]
    return Report(QUESTION, [*rows, *_of_the_server(stored, rounds)])


def disk_rate(folder: Path, rounds: int) -> float:
    """Bytes a second that are made durable, several files at a time."""
    content = np.frombuffer(os.urandom(STORED_BYTES), np.uint8)
    with work_folder(folder) as work:
        row = _row("disk", STORED_BYTES, lambda: _written(work, content, FILES), rounds)
    return float(row.figures["bytes_per_second"])


def memory_rate(rounds: int) -> float:
    """Bytes a second that all threads together copy: what is read and written again cannot go faster."""
    threads = worker_threads()
    source = np.ones(STATE_BYTES, np.uint8)
    copy = np.ones_like(source)
    return float(
        _row("memory", STATE_BYTES, lambda: _copied(source, copy, threads), rounds).figures["bytes_per_second"]
    )


def _row(name: str, count: int, act: Callable[[], object], rounds: int) -> Row:
    seconds = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        act()
        if number:
            seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds)
    text = f"{middle:6.3f} s ({min(seconds):.3f}-{max(seconds):.3f})  {count / middle / 1e9:6.2f} GB/s"
    return Row(name, text, {"median": middle, "seconds": seconds, "bytes_per_second": count / middle})


def _copied(source: Any, copy: Any, threads: int) -> None:
    parts = zip(np.array_split(source, threads), np.array_split(copy, threads), strict=True)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))


def _hashed(source: Any, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(digest, np.array_split(source, max(threads, len(source) // OBJECT_BYTES))))


def _written(work: Path, content: Any, files: int) -> None:
    def write(pair: tuple[int, Any]) -> None:
        with (work / str(pair[0])).open("wb", buffering=0) as file:
            file.write(pair[1].data)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(files) as pool:
        list(pool.map(write, enumerate(np.array_split(content, files))))
    fsync(work)


def _of_the_server(content: Any, rounds: int) -> list[Row]:
    """One plain connection, with presigned URLs: no client of S3 in between."""
    from tests.servers import running_seaweed

    parts = [part.tobytes() for part in np.array_split(content, max(1, len(content) // OBJECT_BYTES))]
    with running_seaweed() as server:
        client, bucket = server.client(), server.new_bucket()
        place = urllib.parse.urlsplit(server.endpoint_url)

        def signed(operation: str, number: int) -> str:
            given = {"Bucket": bucket, "Key": f"{number:03}"}
            whole = urllib.parse.urlsplit(client.generate_presigned_url(operation, Params=given))
            return f"{whole.path}?{whole.query}"

        puts = [signed("put_object", number) for number in range(len(parts))]
        gets = [signed("get_object", number) for number in range(len(parts))]
        connection = http.client.HTTPConnection(place.hostname or "", place.port)

        def put() -> None:
            for path, part in zip(puts, parts, strict=True):
                _asked(connection, "PUT", path, part)

        def get() -> None:
            for path, part in zip(gets, parts, strict=True):
                assert len(_asked(connection, "GET", path, None)) == len(part)

        size = f"objects of {OBJECT_BYTES // 2**20} MiB"
        rows = [
            _row(f"put to SeaweedFS, one connection, {size}", len(content), put, rounds),
            _row(f"get from SeaweedFS, one connection, {size}", len(content), get, rounds),
        ]
        connection.close()
    return rows


def _asked(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None) -> bytes:
    connection.request(method, path, body=body)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content[:500]
    return content
