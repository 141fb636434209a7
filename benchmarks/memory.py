"""How much memory a save and a restore take beyond the state itself.

The state is several times as large as what the library allows itself, and random: nothing in it compresses, which is
when the most is held. Measured as the peak of resident memory in a process of its own, minus what was resident before.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptstore
from benchmarks.states import work_folder
from benchmarks.timing import Report, Row, fresh
from ckptstore.pipeline import MAX_INFLIGHT_BYTES

STATE_BYTES = 4 * MAX_INFLIGHT_BYTES
QUESTION = (
    f"memory: peak beyond a state of {STATE_BYTES / 2**20:.0f} MiB, "
    f"where the limit is {MAX_INFLIGHT_BYTES / 2**20:.0f} MiB (MAX_INFLIGHT_BYTES)"
)
MEASURED = {
    "ckptstore save": "our_save",
    "ckptstore save_async": "our_save_async",
    "ckptstore restore, in place": "our_restore",
    "ckptstore load, a new state": "our_load",
    "torch.save": "torch_save",
    "torch.load + load_state_dict": "torch_restore",
}


def ask(folder: Path, rounds: int) -> Report:
    rows = []
    with work_folder(folder) as work:
        for name, function in MEASURED.items():
            beyond = fresh(f"benchmarks.memory:{function}", work=str(work))
            text = f"{beyond / 2**20:6.0f} MiB  {beyond / MAX_INFLIGHT_BYTES:.2f} x the limit"
            rows.append(Row(name, text, {"bytes": beyond}))
    worst = max(rows[0].figures["bytes"], rows[2].figures["bytes"])
    kept = "kept" if worst <= MAX_INFLIGHT_BYTES else "EXCEEDED"
    return Report(QUESTION, rows, f"the limit is {kept} by save and restore")


def our_save(work: str) -> int:
    model, run = _model(), _run(work)
    return _peak_beyond(lambda: run.save({"model": model}, step=1))


def our_save_async(work: str) -> int:
    """The copy of the state counts here: it is what save_async needs beyond the state."""
    model, run = _model(seed=1), _run(work)
    return _peak_beyond(lambda: run.save_async({"model": model}, step=2).result())


def our_restore(work: str) -> int:
    model, run = _model(seed=2), _run(work)
    return _peak_beyond(lambda: run.restore({"model": model}, step=1))


def our_load(work: str) -> int:
    """The loaded state itself does not count."""
    run = _run(work)
    import ckptstore.restoring  # noqa: F401

    return _peak_beyond(lambda: run.load(1)) - STATE_BYTES


def torch_save(work: str) -> int:
    model = _model()
    return _peak_beyond(lambda: torch.save(model.state_dict(), f"{work}/state.pt"))


def torch_restore(work: str) -> int:
    model = _model(seed=2)
    return _peak_beyond(lambda: model.load_state_dict(torch.load(f"{work}/state.pt")))


def _run(work: str) -> ckptstore.Run:
    import ckptstore.restoring
    import ckptstore.saving

    return ckptstore.Store(Path(work) / "store").run("large")


def _model(seed: int = 0) -> nn.Module:
    """A half in tensors of 64 MiB, a half in tensors of 1 MiB, of float32."""
    torch.manual_seed(seed)
    large, small = 16 * 2**20, 2**18
    half = STATE_BYTES // 8
    sizes = [large] * (half // large) + [small] * (half // small)
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
