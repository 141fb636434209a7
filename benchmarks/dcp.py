"""torch.distributed.checkpoint of two ranks: to our store, and as it comes. `python -m benchmarks.dcp`.

The state is one of the LSTM's with Adam, repeated with other factors until it is as long as asked for, so that no two
parts of it are equal. Each rank holds one half of every tensor. Both ways end with fsync; each load is of files in the
page cache, into tensors that are there. Rounds are taken in turn.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.states import DEFAULT_FOLDER, state_file

RANKS = 2
OURS, NONE, THEIRS = "ckptstore", "ckptstore, codec none", "DCP FileSystemWriter"
BUCKET_OURS, BUCKET_THEIRS = "ckptstore", "DCP FsspecWriter"


@cache
def _state(file: str, gigabytes: float, rank: int) -> dict[str, Any]:
    """One half of every tensor, which is this rank's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    saved = torch.load(file)
    tensors = dict(saved["model"])
    for number, moments in saved["optimizer"]["state"].items():
        tensors |= {f"{number}.{name}": tensor for name, tensor in moments.items() if tensor.dim()}
    length = sum(tensor.nbytes for tensor in tensors.values())
    state: dict[str, Any] = {}
    for copy in range(max(1, round(gigabytes * 1e9 / length))):
        for name, tensor in tensors.items():
            half = tensor.chunk(RANKS)[rank] * (1 + copy / 997)
            state[f"{copy}.{name}"] = DTensor.from_local(half, mesh, [Shard(0)], run_check=False)
    return state


def _changed(state: dict[str, Any]) -> None:
    """Another training step, as far as bytes go: every value is another."""
    for tensor in state.values():
        tensor.to_local().mul_(1.0001)


def run(rank: int, what: str, place: dict[str, Any], file: str, gigabytes: float, step: int) -> float:
    """One save or load in this rank; the seconds until all ranks have done it."""
    import torch.distributed as dist

    state = _state(file, gigabytes, rank)
    if what.startswith("save "):
        _changed(state)
    elif what.startswith("load "):
        for tensor in state.values():
            tensor.to_local().zero_()
    dist.barrier()
    began = time.perf_counter()
    WAYS[what](state, place, step)
    dist.barrier()
    seconds = time.perf_counter() - began
    if what.startswith("load ") and not all(bool(tensor.to_local().any()) for tensor in list(state.values())[:4]):
        raise AssertionError(f"{what} has loaded nothing")
    return seconds


def _save_ours(codec: Any) -> Callable[[dict[str, Any], dict[str, Any], int], None]:
    def save(state: dict[str, Any], place: dict[str, Any], step: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

        from ckptstore.integrations.dcp import CkptstoreWriter

        url, options = f"{place['url']}/{codec}", place["options"]
        writer = CkptstoreWriter(url, run="run", step=step, storage_options=options, codec=codec)
        dcp_save(state, storage_writer=writer)

    return save


def _load_ours(codec: str) -> Callable[[dict[str, Any], dict[str, Any], int], None]:
    def load(state: dict[str, Any], place: dict[str, Any], step: int) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

        from ckptstore.integrations.dcp import CkptstoreReader

        reader = CkptstoreReader(f"{place['url']}/{codec}", run="run", storage_options=place["options"])
        dcp_load(state, storage_reader=reader)

    return load


def _save_theirs(state: dict[str, Any], place: dict[str, Any], step: int) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = f"{place['url']}/dcp-{step}"
    if place["options"] is None:
        save(state, storage_writer=FileSystemWriter(path, sync_files=True))
    else:
        save(state, storage_writer=FsspecWriter(path, **place["options"]))


def _load_theirs(state: dict[str, Any], place: dict[str, Any], step: int) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    path = f"{place['url']}/dcp-{step}"
    if place["options"] is None:
        load(state, storage_reader=FileSystemReader(path))
    else:
        load(state, storage_reader=FsspecReader(path, **place["options"]))


WAYS: dict[str, Callable[[dict[str, Any], dict[str, Any], int], None]] = {
    "save ckptstore": _save_ours("fast"),
    "save none": _save_ours("none"),
    "save theirs": _save_theirs,
    "again ckptstore": _save_ours("fast"),
    "load ckptstore": _load_ours("fast"),
    "load none": _load_ours("none"),
    "load theirs": _load_theirs,
}


def _measured(ranks: Any, place: dict[str, Any], ways: list[str], file: str, gigabytes: float, rounds: int) -> None:
    """Print the median of each way and its speed as a multiple of theirs."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways:
            if way.startswith("load ") and number == 0:
                continue
            seconds = max(ranks.run(run, way, place, file, gigabytes, number + 1000 * way.startswith("again")))
            if number:  # the first makes the store and the connections
                found[way].append(seconds)
        if place["options"] is None and number > 1:
            shutil.rmtree(f"{place['url']}/dcp-{number - 1}", ignore_errors=True)
    for way, seconds_of in found.items():
        kind, _, _ = way.partition(" ")
        base = found["load theirs" if kind == "load" else "save theirs"]
        ratios = [theirs / ours for theirs, ours in zip(base, seconds_of, strict=True)]
        spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {way} | {statistics.median(seconds_of):.2f} | {statistics.median(ratios):.2f} {spread} |", flush=True)


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> int:
    from tests.ranks import Ranks
    from tests.servers import running_seaweed

    parser = argparse.ArgumentParser(prog="python -m benchmarks.dcp", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of state on a disk (1)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each, in turn (5)")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where states are kept and written")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    file = str(state_file(given.folder))
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)
    print("| way | s | speed / that of DCP's own |\n| --- | ---: | ---: |")
    ways = [
        "save ckptstore",
        "again ckptstore",
        "save none",
        "save theirs",
        "load ckptstore",
        "load none",
        "load theirs",
    ]
    with tempfile.TemporaryDirectory(prefix="ckptstore-dcp-", dir=given.folder) as work:
        ranks = Ranks(RANKS)
        try:
            _measured(ranks, {"url": work, "options": None}, ways, file, given.gigabytes, given.rounds)
            one = Path(work) / "one"
            ranks.run(run, "save ckptstore", {"url": str(one), "options": None}, file, given.gigabytes, 1)
            ranks.run(run, "save theirs", {"url": str(one), "options": None}, file, given.gigabytes, 1)
            print(f"stored bytes / theirs: {_bytes_below(one / 'fast') / _bytes_below(one / 'dcp-1'):.3f}")
        finally:
            ranks.stop()
    print("\nTo SeaweedFS on this machine, 115 MB:\n| way | s | speed / that of FsspecWriter, FsspecReader |")
    print("| --- | ---: | ---: |")
    with running_seaweed() as server:
        ranks = Ranks(RANKS)
        try:
            place = {"url": f"s3://{server.new_bucket()}", "options": server.storage_options}
            ways = ["save ckptstore", "save theirs", "load ckptstore", "load theirs"]
            _measured(ranks, place, ways, file, 0.115, given.rounds)
        finally:
            ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
