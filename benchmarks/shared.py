"""N processes that restore the same from a bucket: each for itself, and together. `python -m benchmarks.shared`.

The server is SeaweedFS on this machine. What it sends is counted where it arrives. The time is from when the first
process begins to when the last one has all; the processes share the machine's cores, and so does the server.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ckptstore
from benchmarks.states import DEFAULT_FOLDER, Training, raw_bytes, state_file
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects

WAYS = ("each for itself", "together")


def restore(rank: int, url: str, options: dict[str, Any], way: str) -> tuple[float, int]:
    """Restore in this process; the seconds until all processes have, and the bytes that came from the server here."""
    import torch.distributed as dist

    training = Training.fresh()
    objects = RecordingObjects(open_objects(url, options))
    objects.connect()
    store = ckptstore.Store(objects, threads=1)
    dist.barrier()
    began = time.perf_counter()
    destination = {"model": training.model, "optimizer": training.optimizer}
    checkpoint = store.run("lstm").restore(destination, group=dist.group.WORLD if way == "together" else None)
    assert checkpoint is not None
    dist.barrier()
    seconds = time.perf_counter() - began
    return seconds, sum(call.size or 0 for call in objects.calls if call.operation == "get")


def main() -> int:
    from tests.ranks import Ranks
    from tests.servers import running_seaweed

    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=(1, 2, 4, 8), help="how many (1 2 4 8)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each, in turn (5)")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    training = Training.resumed(state_file(given.folder))
    print("| processes | way | s | times the other | sent / stored |\n| ---: | --- | ---: | ---: | ---: |")
    with running_seaweed() as server:
        place: dict[str, Any] = {"url": f"s3://{server.new_bucket()}/ckpts", "options": server.storage_options}
        saved = ckptstore.Store(place["url"], place["options"]).run("lstm").save(training.state(), step=1)
        for size in given.processes:
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            processes = Ranks(size)
            try:
                for number in range(given.rounds + 1):
                    for way in WAYS if number % 2 else reversed(WAYS):
                        answers = processes.run(restore, place["url"], place["options"], way)
                        sent = sum(count for _, count in answers) / saved.stored_bytes
                        if number:  # the first makes connections, and touches memory
                            found[way].append((max(seconds for seconds, _ in answers), sent))
            finally:
                processes.stop()
            alone = statistics.median(seconds for seconds, _ in found[WAYS[0]])
            for way, rounds in found.items():
                seconds = statistics.median(each for each, _ in rounds)
                print(f"| {size} | {way} | {seconds:.2f} | {seconds / alone:.2f} | {rounds[0][1]:.2f} |", flush=True)
    print(f"\nThe state takes {raw_bytes(training.state_dicts()):,} bytes, {saved.stored_bytes:,} in the store.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
