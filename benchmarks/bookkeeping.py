"""What a chunk costs beside its bytes: planning, manifest, matching. Its growth with the number of chunks.

The chunks are tiny, so that hashing and copying them is next to nothing, and the store is in memory. What is measured
is the processor time of each operation in a process of its own, for each chunk: two requests for each are in it, and
threads. A state of 100,000 chunks of the usual 8 MiB would be one of 840 GB.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Report, Row, Stopwatch, fresh, target
from ckptstore.format import MARKER_KEY, new_save_id
from ckptstore.manifest import Marker, encode
from ckptstore.objects.memory import MemoryObjects
from ckptstore.writer import now_text

COUNTS = (1_000, 10_000, 100_000)
CHUNK_BYTES = 256
CHUNKS_OF_A_TENSOR = 10
QUESTION = f"bookkeeping: microseconds of processor time a chunk, {CHUNKS_OF_A_TENSOR} chunks a tensor, in memory"
TARGET = 100e-6
LINEAR = 2.0
"""So many times as long a chunk may take with the most chunks as with the fewest: caches have their part in it."""
OPERATIONS = {
    "new": "a save, all of it new",
    "again": "the same state again",
    "latest": "latest(): reading the manifest",
    "restore": "a restore",
}


def ask(folder: Path, rounds: int, counts: tuple[int, ...] = COUNTS) -> Report:
    """What a chunk costs beside its bytes, and whether that grows with the number of chunks."""
    found = {count: _least(count, rounds) for count in counts}
    rows = [Row("chunks", "".join(f"{count:>10,}" for count in counts))]
    for name, said in OPERATIONS.items():
        seconds = [found[count][name] for count in counts]
        text = "".join(f"{each * 1e6:>7.1f} µs" for each in seconds)
        text += f"  {seconds[-1] / seconds[0]:.2f} times the first"
        rows.append(Row(said, text, {"seconds_a_chunk": dict(zip(map(str, counts), seconds, strict=True))}))
    worst = max(max(each.values()) for each in found.values())
    growth = max(found[counts[-1]][name] / found[counts[0]][name] for name in OPERATIONS)
    verdict = target("the most a chunk takes, in µs, is", worst * 1e6, at_most=TARGET * 1e6)
    return Report(QUESTION, rows, f"{verdict}; {target('it grows by', growth, at_most=LINEAR)}")


def _least(count: int, rounds: int) -> dict[str, float]:
    """The least of some rounds: what else the machine does only makes it more."""
    all_rounds = [fresh("benchmarks.bookkeeping:measure", count=count) for _ in range(rounds)]
    return {name: min(each[name] for each in all_rounds) for name in OPERATIONS}


def measure(count: int) -> dict[str, float]:
    """Seconds of processor time a chunk, by operation."""
    import ckptstore.restoring
    import ckptstore.saving

    objects = MemoryObjects("memory://bookkeeping")
    marker = Marker(store=new_save_id(), created=now_text(), chunk_bytes=CHUNK_BYTES, small_bytes=0)
    objects.create(MARKER_KEY, encode(marker))
    run = ckptstore.Store(objects, codec="none").run("wide")
    run.save(_state(50), step=0)  # what is made once in a process is made
    run.restore(_state(50))
    state = _state(count)
    acts: dict[str, Callable[[], Any]] = {
        "new": partial(run.save, state, step=1),
        "again": partial(run.save, state, step=2),
        "latest": run.latest,
        "restore": partial(run.restore, state),
    }
    found = {}
    for name in OPERATIONS:
        with Stopwatch() as watch:
            acts[name]()
        found[name] = watch.took[1] / count
    return found


def _state(count: int) -> dict[str, torch.Tensor]:
    numbers = torch.randn(count, CHUNK_BYTES // 4, generator=torch.Generator().manual_seed(count))
    parts = numbers.view(-1, CHUNKS_OF_A_TENSOR * CHUNK_BYTES // 4)
    return {f"layers.{number}.weight": part for number, part in enumerate(parts)}
