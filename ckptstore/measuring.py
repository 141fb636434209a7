"""What a place and this machine can do, measured: latencies, throughput by requests at a time, encoding; and from that,
how long a save and a restore are likely to take. Needs no torch.
"""

import math
import os
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptstore import chunk
from ckptstore.format import DEFAULT_CHUNK_BYTES, Codec
from ckptstore.kernels import ByteArray
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress, each

SMALL_BYTES = 1024
LATENCY_ROUNDS = 5
OBJECTS_A_REQUEST = 2
SAVE_REQUESTS, RESTORE_REQUESTS = 9, 4
"""One after the other, beside the chunks: what an ordinary save and restore wait for (tests count them)."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Bytes a second with so many requests at a time, made durable where they are put."""

    requests: int
    put: float
    get: float


@dataclass(frozen=True, slots=True)
class Processing:
    """Raw bytes a second that all threads together encode and decode, and what part of them is stored."""

    codec: Codec
    encode: float
    decode: float
    share: float


@dataclass(frozen=True, slots=True)
class Measured:
    """The outcome of `measure`.

    Attributes:
        latencies: seconds of one small request, by operation (median).
        throughput: by requests at a time.
        hashing: raw bytes a second that all threads together hash.
        processing: by codec.
    """

    latencies: dict[str, float]
    throughput: list[Throughput]
    hashing: float
    processing: list[Processing]


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a state is likely to take with a codec: seconds, stored bytes."""

    codec: Codec
    save: float
    restore: float
    stored_bytes: int


def measure(
    objects: Objects,
    *,
    threads: int,
    object_bytes: int = DEFAULT_CHUNK_BYTES,
    requests: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Try a place and this machine. What is written, below `scratch/`, is deleted again.

    Args:
        objects: the place; it need not hold a store.
        threads: how many encode, decode and hash.
        object_bytes: size of the objects for the throughput.
        requests: how many requests at a time to try; None: one, four, and as many as a save makes there.
        progress: called with the bytes put and got so far and those in all.

    Raises:
        UnavailableError: the place refuses or fails.
    """
    wanted = sorted({1, 4, objects.request_threads}) if requests is None else list(requests)
    total = sum(2 * OBJECTS_A_REQUEST * count * object_bytes for count in wanted)
    moved = 0

    def count(put_or_got: int) -> None:
        nonlocal moved
        moved += put_or_got
        if progress:
            progress(moved, total)

    latencies = _latencies(objects)
    throughput = []
    for number in wanted:
        throughput.append(_throughput(objects, number, object_bytes))
        count(2 * OBJECTS_A_REQUEST * number * object_bytes)
    weights = _like_weights(object_bytes)
    hashing = _rate(lambda raw: chunk.digest(raw), weights, threads)
    return Measured(
        latencies, throughput, hashing, [_processing(codec, weights, threads) for codec in ("fast", "none")]
    )


def forecast(measured: Measured, state_bytes: int) -> list[Forecast]:
    """How long a save of an all new state and a restore are likely to take, by codec.

    Encoding and putting overlap, as fetching and decoding do, so the slower of the two counts. A state is hashed
    before anything is put, and once more while it is encoded.
    """
    put = max(each.put for each in measured.throughput)
    get = max(each.get for each in measured.throughput)
    found = []
    for codec in measured.processing:
        stored = codec.share * state_bytes
        encoding = state_bytes / codec.encode + state_bytes / measured.hashing
        save = state_bytes / measured.hashing + max(encoding, stored / put)
        restore = max(state_bytes / codec.decode, stored / get)
        waiting = statistics.mean(measured.latencies.values())
        found.append(
            Forecast(codec.codec, save + SAVE_REQUESTS * waiting, restore + RESTORE_REQUESTS * waiting, int(stored))
        )
    return found


def interval_seconds(save_seconds: float, failure_seconds: float) -> float:
    """How often to save so that the least time is lost: sqrt(2 C M), after Young (1974) and Daly (2006)."""
    return math.sqrt(2 * save_seconds * failure_seconds)


def _latencies(objects: Objects) -> dict[str, float]:
    objects.connect()
    _small_requests(objects)  # the first makes connections
    rounds = [_small_requests(objects) for _ in range(LATENCY_ROUNDS)]
    return {operation: statistics.median(took[operation] for took in rounds) for operation in rounds[0]}


def _small_requests(objects: Objects) -> dict[str, float]:
    """The seconds of one small request of each kind."""
    created, key, content = _scratch_key(), _scratch_key(), os.urandom(SMALL_BYTES)
    took: dict[str, float] = {}

    def durable_put() -> None:
        objects.put(key, content)
        objects.sync([key])

    requests: dict[str, Callable[[], Any]] = {
        "create": lambda: objects.create(created, content),
        "put": durable_put,
        "get": lambda: objects.get(key),
        "list": lambda: objects.list(key),
        "delete": lambda: objects.delete(key),
    }
    try:
        for operation, request in requests.items():
            began = time.perf_counter()
            request()
            took[operation] = time.perf_counter() - began
    finally:
        for each_key in (created, key):
            objects.delete(each_key)
    return took


def _throughput(objects: Objects, requests: int, object_bytes: int) -> Throughput:
    keys = [_scratch_key() for _ in range(OBJECTS_A_REQUEST * requests)]
    # Each of other bytes, as some file systems store equal ones once.
    contents = {key: _noise(object_bytes) for key in keys}
    try:
        began = time.perf_counter()
        each(lambda key: objects.put(key, contents[key]), keys, threads=requests)
        objects.sync(keys)
        put = time.perf_counter() - began
        began = time.perf_counter()
        each(objects.get, keys, threads=requests)
        got = time.perf_counter() - began
    finally:
        each(objects.delete, keys, threads=requests)
    moved = len(keys) * object_bytes
    return Throughput(requests, moved / put, moved / got)


def _scratch_key() -> str:
    return f"scratch/{uuid.uuid4().hex}"


def _noise(count: int) -> bytes:
    return np.random.default_rng().bytes(count)


def _like_weights(count: int) -> ByteArray:
    """Numbers distributed as weights in training are: their exponents compress, the rest does not."""
    weights = np.random.default_rng(0).normal(0, 0.05, count // 4 + 1).astype("<f4")
    raw: ByteArray = weights.view(np.uint8)[:count]
    return raw


def _processing(codec: Codec, raw: ByteArray, threads: int) -> Processing:
    content = bytes(chunk.encode(raw, 4, codec))
    name = chunk.digest(raw)
    encode = _rate(lambda raw: chunk.encode(raw, 4, codec), raw, threads)
    decode = _rate(lambda raw: chunk.decode(content, name, np.empty(len(raw), np.uint8)), raw, threads)
    return Processing(codec, encode, decode, len(content) / len(raw))


def _rate(work: Callable[[ByteArray], object], raw: ByteArray, threads: int) -> float:
    """Bytes a second of `work` on all threads; the best of three, as what else runs here only makes it slower."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        each(work, [raw] * (2 * threads), threads=threads)
        seconds.append(time.perf_counter() - began)
    return 2 * threads * len(raw) / min(seconds)
