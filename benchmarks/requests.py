"""What requests to S3 cost the client: puts and gets of chunks, many at a time, through s3fs alone and with obstore.

The server is SeaweedFS on this machine, with and without TLS, which buckets elsewhere have. It takes its share of the
same processor, so by the clock the clients differ by less than they would; their own processor time is told apart.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.timing import Report, Row, Stopwatch, Took, compared, in_turn
from ckptstore.objects.obstore import ObstoreObjects
from ckptstore.objects.s3 import S3Objects

QUESTION = "bucket-requests: 64 chunks of 3.7 MB, 16 or 64 at a time, and a listing of 10,000 keys"
COUNT, SIZE = 64, 3_700_000
"""The size is what chunks of 8 MiB of an LSTM's state come to in the mean, compressed."""
LISTED = 10_000
KINDS = {"s3fs": S3Objects, "obstore": ObstoreObjects}


def ask(folder: Path, rounds: int) -> Report:
    """What puts, gets and listings cost the client, through s3fs alone and with obstore beside it."""
    from tests.servers import running_seaweed, self_signed

    bodies = [os.urandom(SIZE) for _ in range(8)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as certificates:
        certificate, key = self_signed(Path(certificates))
        os.environ["AWS_CA_BUNDLE"] = os.environ["SSL_CERT_FILE"] = certificate  # whom s3fs trusts, and obstore
        with running_seaweed(f"-s3.cert.file={certificate}", f"-s3.key.file={key}") as server:
            bucket = server.new_bucket()
            for scheme, options in {
                "http": server.storage_options,
                "https": server.storage_options_of_https,
            }.items():
                ways = {name: kind(f"s3://{bucket}/{name}", options) for name, kind in KINDS.items()}
                for threads in (16, 64):
                    with ThreadPoolExecutor(threads) as pool:
                        acts: dict[str, Callable[..., Took]] = {"put": partial(_put, bodies), "get": _get}
                        for act, calls in acts.items():
                            measured = in_turn(rounds, {name: partial(calls, pool, way) for name, way in ways.items()})
                            rows += _named(measured, f"{act} {scheme}, {threads} at a time", COUNT * SIZE)
            rows += _listing(S3Objects(f"s3://{bucket}/list", server.storage_options), rounds)
    return Report(QUESTION, rows)


def _put(bodies: list[bytes], pool: ThreadPoolExecutor, objects: S3Objects, number: int) -> Took:
    return _timed(pool, lambda index: objects.put(f"{index:03}", bodies[index % len(bodies)]), range(COUNT))


def _get(pool: ThreadPoolExecutor, objects: S3Objects, number: int) -> Took:
    return _timed(pool, lambda index: objects.get(f"{index:03}"), range(COUNT))


def _timed(pool: ThreadPoolExecutor, call: Callable[[int], object], indexes: Iterable[int]) -> Took:
    with Stopwatch() as watch:
        list(pool.map(call, indexes))
    return watch.took


def _listing(objects: S3Objects, rounds: int) -> list[Row]:
    """Through s3fs as we do it; and through obstore, which we do not let list."""
    import obstore
    from obstore.store import S3Store

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: objects.put(f"{index:05}", b"x"), range(LISTED)))
    bucket, options = objects.url.split("/")[2], objects._options
    store = S3Store(
        bucket,
        endpoint=options["client_kwargs"]["endpoint_url"],
        region=options["client_kwargs"]["region_name"],
        access_key_id=options["key"],
        secret_access_key=options["secret"],
        client_options={"allow_http": True},
    )

    def ours(number: int) -> Took:
        with Stopwatch() as watch:
            assert len(objects.list("")) == LISTED
        return watch.took

    def theirs(number: int) -> Took:
        with Stopwatch() as watch:
            assert sum(len(rows) for rows in obstore.list(store, "list", chunk_size=1000)) == LISTED
        return watch.took

    return _named(in_turn(rounds, {"s3fs": ours, "obstore": theirs}), "list", 0)


def _named(measured: Mapping[str, Any], act: str, payload_bytes: int) -> list[Row]:
    return [replace(row, name=f"{act}: {row.name}") for row in compared(measured, "s3fs", payload_bytes)]
