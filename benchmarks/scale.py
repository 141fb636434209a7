"""What looking at a whole store costs, as it grows: requests, seconds, memory. `python -m benchmarks.scale`.

The store is simulated: its chunks are names and sizes, no bytes; its manifests are real ones. Each request waits as
long as one to S3 may (`--latency`, really slept, so that requests overlap as far as the code lets them), and is counted
as S3 bills it. Each operation is measured in a process of its own.
"""

import argparse
import builtins
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.listing import page_seconds
from benchmarks.timing import fresh
from ckptstore import Store
from ckptstore.errors import UnavailableError
from ckptstore.format import MARKER_KEY, new_save_id
from ckptstore.manifest import ChunkRef, Manifest, Marker, Segment, Writer, encode
from ckptstore.objects.base import Bytes, ObjectInfo, Objects

SIZES = ((10_000, 10), (100_000, 100), (1_000_000, 1000))
"""Chunks and checkpoints."""
LATENCY = 0.02
PAGE = 1000
"""Keys that S3 puts on a page of a listing, or takes in a bulk delete."""
LIVES = 4
"""In so many checkpoints, one after the other, a chunk is named: three in four are shared with the one before."""
RUN_CHECKPOINTS = 100
"""So many make a run; the next one begins from where it ended, as a fine-tune does."""
CHUNKS_OF_A_TENSOR = 4
CHUNK_BYTES = 8 * 2**20
BEGAN = 1_790_000_000.0
TIME = "2026-09-21T14:13:20Z"
LIST_PRICE, GET_PRICE = 0.005 / 1000, 0.0004 / 1000
"""Dollars a request on S3 Standard in us-east-1: LIST, PUT; GET. Deletes cost nothing."""


@dataclass(frozen=True)
class Size:
    """How large a store is. A tenth of its chunks is garbage, which no checkpoint names."""

    chunks: int
    checkpoints: int

    @property
    def garbage(self) -> int:
        return self.chunks - self.fresh * self.checkpoints

    @property
    def fresh(self) -> int:
        """How many chunks each save has uploaded that committed."""
        return self.chunks * 9 // 10 // self.checkpoints


@dataclass
class Measured:
    """What one operation took."""

    operation: str
    requests: dict[str, int]
    deleted_keys: int
    seconds: float
    processor_seconds: float
    peak_bytes: int
    """Of the whole process, the simulated store and the interpreter included."""
    before_bytes: int
    """What these two took before it began."""

    @property
    def billed(self) -> int:
        return sum(self.requests.values())

    @property
    def dollars(self) -> float:
        kinds = self.requests
        return LIST_PRICE * (kinds["list"] + kinds["put"] + kinds["create"]) + GET_PRICE * kinds["get"]


class SimulatedObjects(Objects):
    """A bucket whose chunks are names and sizes; counts what S3 would bill."""

    request_threads = 16
    delete_batch = PAGE

    def __init__(self, folder: Path, latency: float) -> None:
        self.url = "simulated://store"
        self.requests = Counter(dict.fromkeys(("list", "get", "put", "create", "delete"), 0))
        self.deleted_keys = 0
        self._latency = latency
        self._lock = threading.Lock()
        self._small: dict[str, tuple[bytes, float]] = {}
        index = json.loads((folder / "index.json").read_text())
        self._manifests = {key: (start, size, modified) for key, start, size, modified in index["manifests"]}
        self._file = os.open(folder / "manifests", os.O_RDONLY)
        self._save_ids: list[str] = index["saves"]
        self._digests = np.load(folder / "digests.npy")
        self._heads = _heads(self._digests)
        self._saves, self._sizes = np.load(folder / "saves.npy"), np.load(folder / "sizes.npy")
        self._stands = np.ones(len(self._sizes), bool)
        marker = Marker(store=32 * "0", created=TIME, chunk_bytes=CHUNK_BYTES, small_bytes=65536)
        self._small[MARKER_KEY] = encode(marker), BEGAN

    def create(self, key: str, content: Bytes) -> bool:
        self._request("create")
        return key not in self._manifests and self._small.setdefault(key, entry := _entry(content)) is entry

    def put(self, key: str, content: Bytes) -> None:
        self._request("put")
        self._manifests.pop(key, None)
        self._small[key] = _entry(content)

    def get(self, key: str) -> bytes | None:
        self._request("get")
        if key.startswith(("chunks/", "deltas/")):
            raise UnavailableError(f"{key} is simulated: nothing that is measured here reads a chunk")
        if key in self._manifests:
            start, size, _ = self._manifests[key]
            return os.pread(self._file, size, start)
        return self._small.get(key, (None,))[0]

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        rows = [ObjectInfo(key, size, at) for key, (_, size, at) in self._manifests.items() if key.startswith(prefix)]
        rows += [ObjectInfo(key, len(was), at) for key, (was, at) in self._small.items() if key.startswith(prefix)]
        rows += self._chunks(prefix)
        rows.sort(key=lambda row: row.key)
        self._request("list", max(1, math.ceil(len(rows) / PAGE)))
        return rows

    def children(self, prefix: str) -> builtins.list[str]:
        below = (
            key[len(prefix) :].partition("/") for key in [*self._manifests, *self._small] if key.startswith(prefix)
        )
        names = sorted({name for name, slash, _ in below if slash})
        self._request("list", max(1, math.ceil(len(names) / PAGE)))
        return names

    def delete(self, key: str) -> None:
        self._request("delete")
        self._remove([key])

    def delete_many(self, keys: Sequence[str]) -> None:
        self._request("delete")
        self._remove(keys)

    def _request(self, kind: str, count: int = 1) -> None:
        with self._lock:
            self.requests[kind] += count
        if self._latency:
            time.sleep(self._latency * count)

    def _chunks(self, prefix: str) -> builtins.list[ObjectInfo]:
        folder, _, name = prefix.partition("/")
        if not "chunks/".startswith(prefix) and folder != "chunks":
            return []
        first, last = 0, len(self._heads)
        if len(name) >= 2:
            number = int(name[:2], 16) << 56
            first = int(np.searchsorted(self._heads, np.uint64(number)))
            last = int(np.searchsorted(self._heads, np.uint64(number + (1 << 56) - 1), side="right"))
        rows = []
        for index in np.flatnonzero(self._stands[first:last]) + first:
            digest = self._digests[index].tobytes().hex()
            key = f"chunks/{digest[:2]}/{digest}.{self._save_ids[self._saves[index]]}"
            if key.startswith(prefix):
                rows.append(ObjectInfo(key, int(self._sizes[index]), BEGAN))
        return rows

    def _remove(self, keys: Sequence[str]) -> None:
        with self._lock:
            self.deleted_keys += len(keys)
            for key in keys:
                self._small.pop(key, None)
                self._manifests.pop(key, None)
            heads = np.array([int(key[10:26], 16) for key in keys if key.startswith("chunks/")], np.uint64)
            self._stands[np.searchsorted(self._heads, heads)] = False


def _entry(content: Bytes) -> tuple[bytes, float]:
    return bytes(content), time.time()


def _heads(digests: Any) -> Any:
    """The first eight bytes of each digest, by which it is found: among some millions no two are alike."""
    return digests[:, :8].copy().view(">u8").ravel().astype(np.uint64)


def make(folder: Path, size: Size) -> None:
    """Write a simulated store into `folder`: the manifests as they are, the chunks as arrays."""
    random = np.random.default_rng(7)
    digests = random.integers(0, 256, (size.chunks, 32), np.uint8)
    sizes = random.integers(CHUNK_BYTES // 2, CHUNK_BYTES, size.chunks)
    # Saves that were killed have left the garbage: as much each as others have uploaded.
    saves = np.minimum(np.arange(size.chunks) // size.fresh, 2 * size.checkpoints)
    ids = [new_save_id() for _ in range(int(saves.max()) + 1)]
    refs = [
        ChunkRef(
            digest=digests[index].tobytes().hex(), save=ids[saves[index]], raw=CHUNK_BYTES, stored=int(sizes[index])
        )
        for index in range(size.fresh * size.checkpoints)
    ]
    rows = []
    with (folder / "manifests").open("wb") as file:
        for number in range(size.checkpoints):
            named = refs[max(0, number + 1 - LIVES) * size.fresh : (number + 1) * size.fresh]
            manifest = _manifest(number, ids[number], named, size.fresh)
            content = encode(manifest)
            rows.append((str(manifest.key), file.tell(), len(content), BEGAN + number))
            file.write(content)
    order = np.argsort(_heads(digests))
    np.save(folder / "digests.npy", digests[order])
    np.save(folder / "saves.npy", saves[order])
    np.save(folder / "sizes.npy", sizes[order])
    (folder / "index.json").write_text(json.dumps({"manifests": rows, "saves": ids}))


def _manifest(number: int, save_id: str, named: list[ChunkRef], new: int) -> Manifest:
    segments: list[Segment] = []
    nodes: dict[str, Any] = {}
    for start in range(0, len(named), CHUNKS_OF_A_TENSOR):
        chunks = list(range(start, min(start + CHUNKS_OF_A_TENSOR, len(named))))
        nodes[f"layers.{len(nodes)}.mlp.up_proj.weight"] = {
            "$": "tensor",
            "dtype": "bfloat16",
            "shape": [len(chunks) * CHUNK_BYTES // 8192, 4096],
            "segment": len(segments),
            "requires_grad": True,
            "parameter": True,
        }
        segments.append(Segment(bytes=len(chunks) * CHUNK_BYTES, element=2, chunks=chunks))
    return Manifest(
        run=f"run-{number // RUN_CHECKPOINTS:03d}",
        step=1000 * (number % RUN_CHECKPOINTS + 1),
        save=save_id,
        created=TIME,
        writer=Writer(host="trainer-0", pid=4711, version="0.1.0"),
        replaces=[],
        metrics={"loss": 2.0 + 1 / (number + 1)},
        metadata={},
        content=64 * "0",
        raw_bytes=len(named) * CHUNK_BYTES,
        stored_bytes=sum(ref.stored for ref in named),
        new_bytes=sum(ref.stored for ref in named[-new:]),
        tree={"model": nodes, "step": number},
        segments=segments,
        chunks=named,
    )


def _collect_dry(store: Store, size: Size) -> None:
    report = store.collect(dry_run=True)
    _check((report.chunks, report.checkpoints, report.garbage), (size.chunks, size.checkpoints, size.garbage))


def _collect(store: Store, size: Size) -> None:
    _check(store.collect().deleted, size.garbage)


def _verify(store: Store, size: Size) -> None:
    report = store.verify(quick=True)
    _check((report.ok, report.chunks, report.bytes), (True, size.chunks - size.garbage, 0))


def _prune(store: Store, size: Size) -> None:
    report = store.prune(keep_last=5, keep_best="loss", dry_run=True)
    _check(len(report.kept) + len(report.removed), size.checkpoints)


def _steps(store: Store, size: Size) -> None:
    _check(len(store.run("run-000").steps()), min(RUN_CHECKPOINTS, size.checkpoints))


def _latest(store: Store, size: Size) -> None:
    newest = store.run("run-000").latest()
    _check(newest and newest.step, 1000 * min(RUN_CHECKPOINTS, size.checkpoints))


def _ls(store: Store, size: Size) -> None:
    _list(store, None)


def _ls_run(store: Store, size: Size) -> None:
    _list(store, "run-000")


def _du(store: Store, size: Size) -> None:
    usage = store.usage()
    _check(sum(run.checkpoints for run in usage.runs.values()), size.checkpoints)
    _check(usage.unreferenced_bytes > 0, True)


def _list(store: Store, run: str | None) -> None:
    from ckptstore.cli import listing
    from ckptstore.cli.target import Target

    place = Target(store._objects, run)  # which no URL leads to
    printed = io.StringIO()
    with mock.patch.object(listing, "resolve", lambda *_: place), contextlib.redirect_stdout(printed):
        _check(listing.ls("simulated", as_json=True), 0)
    _check("run-000" in printed.getvalue(), True)


OPERATIONS: dict[str, Callable[[Store, Size], None]] = {
    "collect(dry_run=True)": _collect_dry,
    "collect()": _collect,
    "verify(quick=True)": _verify,
    "prune(dry_run=True)": _prune,
    "ls STORE": _ls,
    "du STORE": _du,
    "ls STORE/RUN": _ls_run,
    "run.latest()": _latest,
    "run.steps()": _steps,
}


def _check(found: object, expected: object) -> None:
    if found != expected:
        raise SystemExit(f"the operation that was to be measured found {found}, where {expected} was to be found")


def measure(folder: Path, size: Size, operation: str, latency: float) -> Measured:
    """Do one operation on a store that was made, in this process."""
    # Imports do not count.
    import ckptstore.cli.listing
    import ckptstore.collecting
    import ckptstore.pruning
    import ckptstore.verifying  # noqa: F401

    objects = SimulatedObjects(folder, latency)
    store = Store(objects)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_bytes("VmRSS")
    began, processor_began = time.perf_counter(), time.process_time()
    OPERATIONS[operation](store, size)
    return Measured(
        operation,
        dict(objects.requests),
        objects.deleted_keys,
        time.perf_counter() - began,
        time.process_time() - processor_began,
        _status_bytes("VmHWM"),
        before,
    )


def measure_fresh(folder: str, chunks: int, checkpoints: int, operation: str, latency: float) -> dict[str, Any]:
    """The same, called in a process of its own."""
    return asdict(measure(Path(folder), Size(chunks, checkpoints), operation, latency))


def _status_bytes(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field_name} here")


@dataclass
class Figures:
    """What was measured of one store."""

    size: Size
    measured: list[Measured] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(each), "billed": each.billed, "dollars": each.dollars} for each in self.measured]
        return {"chunks": self.size.chunks, "checkpoints": self.size.checkpoints, "operations": rows}


HEADER = "| operation | chunks | checkpoints | requests: list | get | put, create | delete | keys deleted | s | \
processor s | peak MB | $ |"


def _row(size: Size, each: Measured) -> str:
    kinds = each.requests
    cells = [
        f"`{each.operation}`",
        f"{size.chunks:,}",
        f"{size.checkpoints:,}",
        f"{kinds['list']:,}",
        f"{kinds['get']:,}",
        f"{kinds['put'] + kinds['create']:,}",
        f"{kinds['delete']:,}",
        f"{each.deleted_keys:,}",
        f"{each.seconds:.1f}",
        f"{each.processor_seconds:.1f}",
        f"{each.peak_bytes / 1e6:,.0f}",
        f"{each.dollars:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _print(figures: Sequence[Figures]) -> None:
    print(HEADER)
    print("| --- |" + " ---: |" * (HEADER.count("|") - 2))
    for operation in OPERATIONS:
        for each in figures:
            for found in each.measured:
                if found.operation == operation:
                    print(_row(each.size, found))


def main() -> int:
    options = _parse()
    sizes = SIZES if options.chunks is None else ((options.chunks, options.checkpoints),)
    found = []
    for chunks, checkpoints in sizes:
        size = Size(chunks, checkpoints)
        figures = Figures(size)
        with tempfile.TemporaryDirectory(prefix="ckptstore-scale-", dir=options.folder) as work:
            make(Path(work), size)
            for operation in OPERATIONS:
                if options.only and options.only not in operation:
                    continue
                arguments = {"folder": work, **asdict(size), "operation": operation, "latency": options.latency}
                figures.measured.append(Measured(**fresh("benchmarks.scale:measure_fresh", **arguments)))
                print(_row(size, figures.measured[-1]), file=sys.stderr, flush=True)
        found.append(figures)
    _print(found)
    print(f"\nReading a page of {PAGE:,} keys of S3's takes {page_seconds():.3f} s of processor more.")
    if options.json:
        options.json.write_text(json.dumps([each.to_json() for each in found], indent=1) + "\n")
    return 0


def _parse() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--chunks", type=int, metavar="N", help="measure one store of N chunks, in place of three")
    parser.add_argument("--checkpoints", type=int, metavar="N", default=1000, help="with --chunks: how many (1000)")
    parser.add_argument("--latency", type=float, metavar="S", default=LATENCY, help=f"seconds a request ({LATENCY})")
    parser.add_argument("--only", metavar="TEXT", help="measure only operations with TEXT in their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the manifests are written meanwhile; 1 GB for a million chunks",
    )
    options = parser.parse_args()
    if options.chunks is not None and not 0 < options.checkpoints <= options.chunks * 9 // 10:
        parser.error("--checkpoints must be at least 1, and few enough for each to have a chunk of its own")
    return options


if __name__ == "__main__":
    sys.exit(main())
