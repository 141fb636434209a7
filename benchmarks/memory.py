"""How much memory a save and a restore take beyond the state itself, for states of several sizes.

The states are random: nothing in them compresses, which is when the most is held. Measured as the peak of resident
memory in a process of its own, minus what was resident before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptstore
from benchmarks.states import work_folder
from benchmarks.timing import Report, Row, fresh
from ckptstore.pipeline import MAX_INFLIGHT_BYTES

GIGABYTES = (0.1, 1.0, 4.0)
"""The largest takes twice its size of memory, and 13 GB of disk."""
LARGE_BYTES, SMALL_BYTES = 64 * 2**20, 2**20
QUESTION = (
    f"memory: peak beyond the state, in MiB, where the limit is {MAX_INFLIGHT_BYTES / 2**20:.0f} MiB "
    "(MAX_INFLIGHT_BYTES)"
)
OURS = {
    "ckptstore save": "our_save",
    "ckptstore save_async, its copy of the state included": "our_save_async",
    "ckptstore restore, in place": "our_restore",
    "ckptstore load, the new state not counted": "our_load",
}
THEIRS = {"torch.save": "torch_save", "torch.load + load_state_dict": "torch_restore"}
LIMITED = ("ckptstore save", "ckptstore restore, in place")


def ask(folder: Path, rounds: int, gigabytes: Sequence[float] = GIGABYTES) -> Report:
    """How much memory a save and a restore take beyond the state itself, for states of several sizes."""
    found: dict[str, list[int]] = {name: [] for name in OURS | THEIRS}
    for size in gigabytes:
        with work_folder(folder) as work:
            for name, function in (OURS | THEIRS).items():
                child = partial(fresh, f"benchmarks.memory:{function}", work=str(work), state_bytes=int(size * 1e9))
                found[name].append(max(child() for _ in range(rounds)))
    rows = [Row("a state of", "".join(f"{size:>7g} GB" for size in gigabytes))]
    for name, peaks in found.items():
        text = "".join(f"{beyond / 2**20:>10,.0f}" for beyond in peaks)
        sizes = (f"{size:g} GB" for size in gigabytes)
        rows.append(Row(name, text, {"bytes": dict(zip(sizes, peaks, strict=True))}))
    kept = all(peak <= MAX_INFLIGHT_BYTES for name in LIMITED for peak in found[name])
    return Report(QUESTION, rows, f"the limit is {'kept' if kept else 'EXCEEDED'} by save and restore")


def our_save(work: str, state_bytes: int) -> int:
    model, run = _model(state_bytes), _run(work)
    return _peak_beyond(lambda: run.save({"model": model}, step=1))


def our_save_async(work: str, state_bytes: int) -> int:
    """The copy of the state counts here: it is what save_async needs beyond the state."""
    model, run = _model(state_bytes, seed=1), _run(work)
    return _peak_beyond(lambda: run.save_async({"model": model}, step=2).result())


def our_restore(work: str, state_bytes: int) -> int:
    model, run = _model(state_bytes, seed=2), _run(work)
    return _peak_beyond(lambda: run.restore({"model": model}, step=1))


def our_load(work: str, state_bytes: int) -> int:
    """The loaded state itself does not count."""
    run = _run(work)
    return _peak_beyond(lambda: run.load(1)) - run.checkpoint(1).raw_bytes


def torch_save(work: str, state_bytes: int) -> int:
    model = _model(state_bytes)
    return _peak_beyond(lambda: torch.save(model.state_dict(), f"{work}/state.pt"))


def torch_restore(work: str, state_bytes: int) -> int:
    model = _model(state_bytes, seed=2)
    return _peak_beyond(lambda: model.load_state_dict(torch.load(f"{work}/state.pt")))


def _run(work: str) -> ckptstore.Run:
    import ckptstore.restoring
    import ckptstore.saving

    return ckptstore.Store(Path(work) / "store").run("large")


def _model(state_bytes: int, seed: int = 0) -> nn.Module:
    """Of float32: a half in tensors of 64 MiB, the rest in tensors of 1 MiB."""
    torch.manual_seed(seed)
    large, small = LARGE_BYTES // 4, SMALL_BYTES // 4
    larges = state_bytes // 2 // LARGE_BYTES
    sizes = [large] * larges + [small] * max(1, (state_bytes - larges * LARGE_BYTES) // SMALL_BYTES)
    return nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])


def _peak_beyond(act: Callable[[], Any]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_bytes("VmRSS")
    kept = act()
    peak = _status_bytes("VmHWM")
    del kept
    return peak - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field} here")
